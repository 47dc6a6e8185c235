// See launcher.h.
#include "comm/launcher.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "comm/socket.h"
#include "runtime/error.h"
#include "runtime/metrics.h"

namespace {

// In which ranks that are connected end by themselves, but for a file they finish. One that looks for a rank 0 that is gone would do so until --comm-timeout.
constexpr double kMoment = 3;

int usable_cores() {
    cpu_set_t cores;
    return sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
}

// This process's environment with what world_from_environment reads, for one rank.
std::vector<std::string> environment_of(int rank, int processes, int port) {
    std::vector<std::pair<std::string, std::string>> own = {{"LOQT_LAUNCHER", "train_loqt"},
                                                            {"RANK", std::to_string(rank)},
                                                            {"LOCAL_RANK", std::to_string(rank)},
                                                            {"WORLD_SIZE", std::to_string(processes)},
                                                            {"MASTER_ADDR", "127.0.0.1"},
                                                            {"MASTER_PORT", std::to_string(port)}};
    // Threads of several processes that wait actively for the same cores would starve each other.
    if (!std::getenv("OMP_NUM_THREADS")) own.push_back({"OMP_NUM_THREADS", std::to_string(std::max(1, usable_cores() / processes))});
    std::vector<std::string> environment;
    for (char** entry = environ; *entry; ++entry) {
        std::string text = *entry, name = text.substr(0, text.find('='));
        if (std::none_of(own.begin(), own.end(), [&](auto& o) { return o.first == name; })) environment.push_back(text);
    }
    for (auto& [name, value] : own) environment.push_back(name + "=" + value);
    return environment;
}

// The children, and the signals that concern them: blocked, and taken with sigtimedwait, so that none comes at a bad moment.
class Children {
  public:
    explicit Children(double grace) : grace_(grace) {
        sigemptyset(&signals_);
        for (int s : {SIGINT, SIGTERM, SIGCHLD}) sigaddset(&signals_, s);
        pthread_sigmask(SIG_BLOCK, &signals_, &signals_before_);
        child_handler_before_ = std::signal(SIGCHLD, SIG_DFL);  // where it was ignored nobody would learn how a child ended
    }
    ~Children() {
        for (Child& child : children_)
            if (child.running) kill(child.pid, SIGKILL), waitpid(child.pid, nullptr, 0);
        std::signal(SIGCHLD, child_handler_before_);
        pthread_sigmask(SIG_SETMASK, &signals_before_, nullptr);
    }
    Children(const Children&) = delete;

    void start(char** argv, std::vector<std::string> environment) {
        // By its name where that still leads to it, for those who look for it in a list of processes.
        std::error_code ignored;
        std::string program = std::filesystem::read_symlink("/proc/self/exe", ignored).string();
        std::vector<char*> envp;
        for (std::string& entry : environment) envp.push_back(&entry[0]);
        envp.push_back(nullptr);
        pid_t parent = getpid(), pid = fork();
        if (pid < 0) throw UserError(format("cannot start process %zu: %s; check ulimit -u", children_.size(), std::strerror(errno)));
        if (pid == 0) {  // from here on only what is safe in the copy of a process with threads
            prctl(PR_SET_PDEATHSIG, SIGTERM);
            if (getppid() != parent) _exit(128 + SIGTERM);  // it died before we could ask to be told
            int null = open("/dev/null", O_RDONLY);
            if (null >= 0) dup2(null, 0), close(null);
            pthread_sigmask(SIG_SETMASK, &signals_before_, nullptr);
            execve(program.c_str(), argv, envp.data());
            execve("/proc/self/exe", argv, envp.data());
            const char message[] = "train_loqt: cannot start itself again from /proc/self/exe\n";
            ssize_t written = write(2, message, sizeof message - 1);
            _exit(written < 0 ? 1 : 2);
        }
        children_.push_back({pid, true, 0});
    }

    int wait_for_all() {
        for (reap(); running(); reap()) {
            timespec nap{0, 100'000'000};  // deadlines are looked at as often
            int signal = sigtimedwait(&signals_, nullptr, &nap);
            if (signal == SIGINT || signal == SIGTERM) {
                passed_on_.insert(signal);
                send(signal);
            }
            hurry();
        }
        report();
        // Who was killed could not say why; who then ended by itself did, and its code goes with that.
        for (const Child& child : children_)
            if (first_failure_ && WIFSIGNALED(first_failure_->status) && WIFEXITED(child.status) && WEXITSTATUS(child.status)) return WEXITSTATUS(child.status);
        return first_failure_ ? exit_code(first_failure_->status) : 0;
    }

  private:
    struct Child {
        pid_t pid;
        bool running;
        int status;
    };
    static int exit_code(int status) { return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status); }

    bool running() const {
        return std::any_of(children_.begin(), children_.end(), [](const Child& c) { return c.running; });
    }
    void send(int signal) {
        for (Child& child : children_)
            if (child.running) kill(child.pid, signal);
    }
    void reap() {
        for (Child& child : children_) {
            if (!child.running || waitpid(child.pid, &child.status, WNOHANG) != child.pid) continue;
            child.running = false;
            if (child.status == 0 || first_failure_) continue;
            first_failure_ = &child;
            next_blow_ = wall_seconds() + std::min(grace_, kMoment);
        }
    }
    void hurry() {
        if (!first_failure_) return;
        send(SIGCONT);  // one that was stopped could not end by itself
        if (wall_seconds() < next_blow_) return;
        send(terminated_ ? SIGKILL : SIGTERM);  // by the first a rank at work still finishes its file
        terminated_ = true;
        next_blow_ = wall_seconds() + grace_;
    }
    void report() const {
        if (!first_failure_ || !WIFSIGNALED(first_failure_->status)) return;
        for (const Child& child : children_)
            if (WIFEXITED(child.status) && WEXITSTATUS(child.status)) return;  // it has said why
        int signal = WTERMSIG(first_failure_->status);
        if (passed_on_.count(signal)) return;  // that was asked for
        std::fprintf(stderr, "train_loqt: rank %d was killed by signal %d (%s)%s\n", int(first_failure_ - children_.data()), signal, strsignal(signal),
                     signal == SIGKILL ? "; look for an out-of-memory killer (dmesg)" : "");
    }

    double grace_, next_blow_ = 0;
    bool terminated_ = false;
    std::vector<Child> children_;
    const Child* first_failure_ = nullptr;
    std::set<int> passed_on_;
    sigset_t signals_, signals_before_;
    void (*child_handler_before_)(int);
};

}  // namespace

int launch_processes(int processes, char** argv, double grace_seconds) {
    CHECK_INTERNAL(processes > 0, "%d processes", processes);
    int port = free_port();
    Children children(grace_seconds);
    for (int rank = 0; rank < processes; ++rank) children.start(argv, environment_of(rank, processes, port));
    return children.wait_for_all();
}

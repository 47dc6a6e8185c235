// Processes for tests: forked with their stderr in a file, waited for no longer than told, killed when the test ends.
#pragma once
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <functional>
#include <map>

#include "runtime/metrics.h"
#include "test/support.h"
#include "test/temp_dir.h"

class Processes {
  public:
    ~Processes() {
        for (auto& [rank, pid] : running_) kill(pid, SIGKILL), waitpid(pid, nullptr, 0);
    }
    // body ends with an exit code; what it throws is printed as main does, with code 2.
    void start(int rank, const std::function<int()>& body) {
        std::fflush(nullptr);
        pid_t pid = fork();
        REQUIRE(pid >= 0);
        if (pid == 0) {
            int file = open(file_of(rank).c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
            if (file < 0 || dup2(file, 2) < 0) _exit(99);
            int code = 2;
            try {
                code = body();
            } catch (const std::exception& error) {
                std::fprintf(stderr, "train_loqt: %s\n", error.what());
            }
            _exit(code);
        }
        running_[rank] = pid;
    }
    void signal(int rank, int signal) { kill(running_.at(rank), signal); }
    pid_t pid(int rank) const { return running_.at(rank); }
    bool running() const { return !running_.empty(); }

    // Exit code (128 + n for signal n), or -1 if it has not ended by then.
    int wait(int rank, double seconds = 10) {
        double deadline = wall_seconds() + seconds;
        do {
            int status = 0;
            if (waitpid(running_.at(rank), &status, WNOHANG) > 0) {
                running_.erase(rank);
                return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
            }
            usleep(1000);
        } while (wall_seconds() < deadline);
        return -1;
    }
    std::string said(int rank) const { return access(file_of(rank).c_str(), F_OK) == 0 ? file_bytes(file_of(rank)) : ""; }
    const TempDir& folder() const { return folder_; }

  private:
    std::string file_of(int rank) const { return folder_ / ("stderr" + std::to_string(rank)); }
    TempDir folder_;
    std::map<int, pid_t> running_;
};

// Until the condition holds, but not for long.
inline bool eventually(const std::function<bool()>& condition, double seconds = 5) {
    for (double deadline = wall_seconds() + seconds; wall_seconds() < deadline; usleep(1000))
        if (condition()) return true;
    return condition();
}

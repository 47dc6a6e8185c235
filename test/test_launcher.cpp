// The processes that --gpus N starts: this test program again, in the part that LOQT_TEST_LAUNCHED names.
#include "comm/launcher.h"

#include <sys/stat.h>

#include "comm/world.h"
#include "test/processes.h"

namespace {

volatile std::sig_atomic_t got_signal = 0;

// What a launched process does instead of main; %s of its files is the rank.
__attribute__((constructor)) void play_part() {
    const char* part = std::getenv("LOQT_TEST_LAUNCHED");
    const char* rank_text = std::getenv("RANK");
    if (!part || !rank_text) return;
    std::string name = part;
    int rank = std::atoi(rank_text);
    auto note = [&](const std::string& text) {
        std::string file = std::string(std::getenv("LOQT_TEST_FOLDER")) + "/rank" + rank_text;
        std::FILE* f = std::fopen((file + ".new").c_str(), "w");
        std::fputs(text.c_str(), f);
        std::fclose(f);
        std::rename((file + ".new").c_str(), file.c_str());
    };
    auto hang = [&] {
        note(std::to_string(getpid()));
        for (;;) pause();
    };
    if (name == "say") {
        World world = world_from_environment();
        struct stat in {}, null {};
        fstat(0, &in), stat("/dev/null", &null);
        note(world.launcher + " " + std::to_string(world.rank) + " " + std::to_string(world.local_rank) + " " + std::to_string(world.size) + " " + world.address + " " +
             std::to_string(world.port) + " " + (in.st_rdev == null.st_rdev ? "null" : "other") + " " + std::getenv("OMP_NUM_THREADS") + " " + program_invocation_short_name);
    } else if (name == "codes") {  // rank 1 fails first
        if (rank != 1) usleep(300'000);
        _exit(rank == 1 ? 3 : 7 * rank);
    } else if (name == "rank 1 dies") {
        if (rank == 1) usleep(100'000), kill(getpid(), SIGKILL);
        else usleep(300'000);
    } else if (name == "rank 1 dies, 0 tells") {
        if (rank == 1) kill(getpid(), SIGKILL);
        usleep(300'000);
        _exit(3);
    } else if (name == "rank 1 fails, 0 hangs") {
        if (rank == 1) _exit(5);
        std::signal(SIGTERM, SIG_IGN);
        hang();
    } else if (name == "hang") {
        hang();
    } else if (name == "count signals") {
        for (int s : {SIGINT, SIGTERM}) std::signal(s, [](int s) { got_signal = s; });
        sigset_t blocked;
        sigprocmask(SIG_BLOCK, nullptr, &blocked);
        note(sigismember(&blocked, SIGTERM) ? "blocked" : "ready");
        while (!got_signal) usleep(1000);
        note("signal " + std::to_string(got_signal));
    }
    _exit(0);
}

// A launcher in a process of its own (rank -1 of `processes`).
void launch(Processes& processes, const char* part, int count, double grace = 20) {
    processes.start(-1, [&processes, part, count, grace] {
        setenv("LOQT_TEST_LAUNCHED", part, 1);
        setenv("LOQT_TEST_FOLDER", processes.folder().path.c_str(), 1);
        setenv("TORCHELASTIC_USE_AGENT_STORE", "True", 1);  // of a launcher around this one
        setenv("WORLD_SIZE", "77", 1);
        unsetenv("OMP_NUM_THREADS");
        char name[] = "a name of its own", argument[] = "argument";
        char* argv[] = {name, argument, nullptr};
        return launch_processes(count, argv, grace);
    });
}

std::string noted(const Processes& processes, int rank) {
    std::string file = processes.folder() / ("rank" + std::to_string(rank));
    return access(file.c_str(), F_OK) == 0 ? file_bytes(file) : "";
}

bool all_noted(const Processes& processes, int count, const std::string& text = "") {
    return eventually([&] {
        for (int rank = 0; rank < count; ++rank)
            if (text.empty() ? noted(processes, rank).empty() : noted(processes, rank) != text) return false;
        return true;
    });
}

// Ended, whether or not someone has asked for its exit code by now.
bool gone(const Processes& processes, int rank) {
    return eventually([&] {
        std::ifstream stat("/proc/" + noted(processes, rank) + "/stat");
        std::string pid, name, state;
        return !(stat >> pid >> name >> state) || state == "Z";
    });
}

}  // namespace

TEST_CASE("Launched processes know their place, and read nothing", "[launcher]") {
    Processes processes;
    launch(processes, "say", 3);
    REQUIRE(processes.wait(-1) == 0);
    std::string port;
    for (int rank = 0; rank < 3; ++rank) {
        std::istringstream in(noted(processes, rank));
        std::vector<std::string> words{std::istream_iterator<std::string>(in), {}};
        INFO(noted(processes, rank));
        REQUIRE(words.size() >= 9);
        CHECK(words[0] == "train_loqt");
        CHECK(words[1] == std::to_string(rank));
        CHECK(words[2] == std::to_string(rank));
        CHECK(words[3] == "3");
        CHECK(words[4] == "127.0.0.1");
        if (rank == 0) port = words[5];
        CHECK(words[5] == port);
        CHECK(std::stoi(port) > 1023);
        CHECK(words[6] == "null");
        CHECK(std::stoi(words[7]) >= 1);
        CHECK(words[8] == "a");  // the arguments are those given
    }
    CHECK(processes.said(-1) == "");
}

TEST_CASE("The exit code is that of the first failure", "[launcher]") {
    Processes processes;
    launch(processes, "codes", 3);
    CHECK(processes.wait(-1) == 3);
    CHECK(processes.said(-1) == "");  // who ends with a code has said why
}

TEST_CASE("A process killed with none left to tell is told by the launcher", "[launcher]") {
    Processes processes;
    launch(processes, "rank 1 dies", 2);
    CHECK(processes.wait(-1) == 137);
    CHECK(processes.said(-1) == "train_loqt: rank 1 was killed by signal 9 (Killed); look for an out-of-memory killer (dmesg)\n");

    Processes others;
    launch(others, "rank 1 dies, 0 tells", 2);
    CHECK(others.wait(-1) == 3);
    CHECK(others.said(-1) == "");
}

TEST_CASE("Who does not end by itself after a failure is ended", "[launcher]") {
    Processes processes;
    double begin = wall_seconds();
    launch(processes, "rank 1 fails, 0 hangs", 2, 0.4);  // 0 ignores SIGTERM
    CHECK(processes.wait(-1) == 5);
    CHECK(wall_seconds() - begin > 0.75);
    CHECK(wall_seconds() - begin < 3);
    CHECK(gone(processes, 0));
}

TEST_CASE("SIGINT and SIGTERM are passed on", "[launcher]") {
    for (int signal : {SIGINT, SIGTERM}) {
        Processes processes;
        launch(processes, "count signals", 2);
        REQUIRE(all_noted(processes, 2, "ready"));
        processes.signal(-1, signal);
        CHECK(processes.wait(-1) == 0);
        CHECK(all_noted(processes, 2, "signal " + std::to_string(signal)));
    }
    Processes processes;  // without handlers they end by it, as was asked for
    launch(processes, "hang", 2);
    REQUIRE(all_noted(processes, 2));
    processes.signal(-1, SIGINT);
    CHECK(processes.wait(-1) == 130);
    CHECK(processes.said(-1) == "");
}

TEST_CASE("Launched processes do not outlive their launcher", "[launcher]") {
    Processes processes;
    launch(processes, "hang", 2);
    REQUIRE(all_noted(processes, 2));
    processes.signal(-1, SIGKILL);
    CHECK(processes.wait(-1) == 137);
    CHECK(gone(processes, 0));
    CHECK(gone(processes, 1));
}

// Tests that need several processes: the test program starts itself once per rank, with a hidden test case (tag [.rank]) for each to run.
// Not a fork: a process with threads cannot be copied.
#pragma once
#include <arpa/inet.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "test/catch.h"

struct RankEnd {
    int status = -1;     // its exit code, 128 + n after signal n
    std::string output;  // stdout and stderr
};

// A port of this machine that was free a moment ago.
inline int free_port() {
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    REQUIRE(bind(fd, reinterpret_cast<sockaddr*>(&address), length) == 0);
    REQUIRE(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length) == 0);
    close(fd);
    return ntohs(address.sin_port);
}

// The hidden test case in `size` processes; `argument` is what rank_argument() gives them. Whoever has not ended after `limit` seconds is killed.
inline std::vector<RankEnd> run_ranks(const std::string& test_case, int size, const std::string& argument = "", double limit = 120) {
    const std::string port = std::to_string(free_port());
    std::vector<FILE*> outputs;
    std::vector<pid_t> processes;
    for (int rank = 0; rank < size; ++rank) {
        outputs.push_back(std::tmpfile());
        REQUIRE(outputs.back());
        const std::string number = std::to_string(rank);
        std::vector<std::pair<std::string, std::string>> settings{
            {"RANK", number}, {"LOCAL_RANK", number}, {"WORLD_SIZE", std::to_string(size)}, {"MASTER_ADDR", "127.0.0.1"}, {"MASTER_PORT", port},
            {"OMP_NUM_THREADS", "1"}, {"OPENBLAS_NUM_THREADS", "1"}, {"LOQT_TEST_RANK_ARGUMENT", argument}};
        const pid_t process = fork();
        REQUIRE(process >= 0);
        if (process == 0) {
            for (auto& [name, value] : settings) setenv(name.c_str(), value.c_str(), 1);
            dup2(fileno(outputs.back()), STDOUT_FILENO);
            dup2(fileno(outputs.back()), STDERR_FILENO);
            execl("/proc/self/exe", "tests", test_case.c_str(), static_cast<char*>(nullptr));
            _exit(127);
        }
        processes.push_back(process);
    }
    std::vector<RankEnd> ends(size);
    const auto begin = std::chrono::steady_clock::now();
    for (int running = size; running > 0;) {
        const bool late = std::chrono::steady_clock::now() - begin > std::chrono::duration<double>(limit);
        for (int rank = 0; rank < size; ++rank) {
            int status = 0;
            if (ends[rank].status >= 0) continue;
            if (late) kill(processes[rank], SIGKILL);
            if (waitpid(processes[rank], &status, late ? 0 : WNOHANG) != processes[rank]) continue;
            ends[rank].status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
            --running;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    for (int rank = 0; rank < size; ++rank) {
        std::rewind(outputs[rank]);
        for (int c; (c = std::fgetc(outputs[rank])) != EOF;) ends[rank].output += char(c);
        std::fclose(outputs[rank]);
    }
    return ends;
}

inline std::string rank_argument() {
    const char* argument = std::getenv("LOQT_TEST_RANK_ARGUMENT");
    return argument ? argument : "";
}

// For tests in which nothing goes wrong.
inline void check_ranks(const std::string& test_case, int size, const std::string& argument = "") {
    const std::vector<RankEnd> ends = run_ranks(test_case, size, argument);
    for (int rank = 0; rank < size; ++rank) {
        INFO("rank " << rank << " of " << size << ":\n" << ends[rank].output);
        CHECK(ends[rank].status == 0);
    }
}

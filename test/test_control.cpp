// Ranks that talk, die, hang, fail and come late: as threads where all goes well, as processes where one ends the others.
#include "comm/control.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "comm/socket.h"
#include "runtime/error.h"
#include "test/processes.h"

namespace {

using Kind = Control::Kind;
constexpr double kTimeout = 1, kBeat = 0.2;

World world_of(int rank, int size, int port) {
    World world;
    world.rank = world.local_rank = rank, world.size = size, world.port = port;
    return world;
}

[[noreturn]] void hang() {
    for (;;) pause();
}

// The processes of a run; `body` computes what each does once all are connected.
class Run {
  public:
    Run(int size, const std::function<int(Control&)>& body, double timeout = kTimeout) : size_(size), port_(free_port()) {
        for (int rank = 0; rank < size; ++rank)
            processes.start(rank, [this, rank, body, timeout] {
                Control control(world_of(rank, size_, port_), timeout, kBeat);
                return body(control);
            });
    }
    // For the bodies: says that this one is where it should be.
    static void arrive(Control& control, const TempDir& folder) { put_file(folder / ("at" + std::to_string(control.world().rank)), ""); }
    void wait_until_there(const TempDir& folder) const {
        REQUIRE(eventually([&] { return folder.files() >= size_t(size_); }));
        usleep(250'000);  // for the reports of it
    }
    // All end with this code by then, and rank 0 (or `speaker`) alone has said one line, which is returned.
    std::string ended(int code, double seconds, int speaker = 0, int left_out = -1) {
        double deadline = wall_seconds() + seconds;
        for (int rank = 0; rank < size_; ++rank) {
            if (rank == left_out) continue;
            INFO("rank " << rank << " said " << processes.said(rank));
            CHECK(processes.wait(rank, std::max(0.01, deadline - wall_seconds())) == code);
            if (rank != speaker) CHECK(processes.said(rank) == "");
        }
        std::string line = processes.said(speaker);
        INFO(line);
        CHECK(std::count(line.begin(), line.end(), '\n') == 1);
        CHECK(line.rfind("train_loqt: ", 0) == 0);
        return line;
    }
    Processes processes;

  private:
    int size_, port_;
};

std::string random_text(uint64_t seed, int64_t limit) {
    std::mt19937_64 rng(seed);
    std::string text(size_t(rng() % 4 ? rng() % 100 : rng() % uint64_t(limit)), '\0');
    for (char& c : text) c = char(rng());
    return text;
}

// f(control) in a thread per rank.
void as_threads(int size, const std::function<void(Control&)>& f, double timeout = 20) {
    int port = free_port();
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size; ++rank)
        threads.emplace_back([=] {
            Control control(world_of(rank, size, port), timeout, kBeat);
            f(control);
        });
    for (std::thread& thread : threads) thread.join();
}

// A bare connection to a port of this machine, once something listens there.
Socket stranger(int port) {
    sockaddr_in address{};
    address.sin_family = AF_INET, address.sin_port = htons(uint16_t(port)), address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (;;) {
        Socket socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
        if (connect(socket.fd(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0) return socket;
        usleep(1000);
    }
}

}  // namespace

TEST_CASE("Messages of any size reach all ranks", "[control]") {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    for (int size = 2; size <= 5; ++size) {
        std::atomic<int> wrong{0};
        as_threads(size, [&](Control& control) {
            for (uint64_t round = 0; round < 30; ++round) {
                auto text_of = [&](int rank) { return random_text(seed + round * 100 + uint64_t(rank), 1 << 20); };
                if ((seed + round) % 3) {
                    wrong += control.broadcast(control.world().root() ? text_of(0) : "not this") != text_of(0);
                } else {
                    auto all = control.gather(text_of(control.world().rank));
                    wrong += int(all.size()) != size;
                    for (int rank = 0; rank < size; ++rank) wrong += all[size_t(rank)] != text_of(rank);
                }
            }
            usleep(useconds_t(random_text(seed + uint64_t(control.world().rank), 2).size() * 100));  // they end in any order
        });
        CHECK(wrong == 0);
    }
}

TEST_CASE("Long messages, and small ones at once", "[control]") {
    std::atomic<int> wrong{0};
    double seconds = 0;
    as_threads(2, [&](Control& control) {
        std::string big(size_t(24) << 20, char('a' + control.world().rank));
        auto all = control.gather(big);
        wrong += all[0] != std::string(big.size(), 'a') || all[1] != std::string(big.size(), 'b');
        double begin = wall_seconds();
        for (int i = 0; i < 200; ++i) wrong += control.gather(std::to_string(i))[1] != std::to_string(i);
        if (control.world().root()) seconds = wall_seconds() - begin;
    });
    CHECK(wrong == 0);
    CHECK(seconds < 1);  // 0.01 on an idle machine; with delayed packets 8
}

TEST_CASE("Activities cost next to nothing", "[control]") {
    double seconds = 0;
    as_threads(2, [&](Control& control) {
        double begin = wall_seconds();
        for (int i = 0; i < 100'000; ++i) Control::Activity activity(&control, Kind::waiting, "a sum");
        if (!control.world().root()) seconds = wall_seconds() - begin;
        control.gather("");
    });
    CHECK(seconds < 1);
    Control::Activity none(nullptr, Kind::waiting, "a sum");
    Control::Uninterrupted neither(nullptr);
}

TEST_CASE("A killed rank ends all, with its last activity", "[control]") {
    TempDir there;
    Run run(3, [&](Control& control) {
        Control::Activity step(&control, Kind::computing, "step 7");
        Control::Activity wait(&control, control.world().rank == 2 ? Kind::computing : Kind::waiting, "the gradients of step 7");
        Run::arrive(control, there);
        hang();
        return 0;
    }, 20);
    run.wait_until_there(there);
    run.processes.signal(1, SIGKILL);
    CHECK(run.processes.wait(1) == 137);
    std::string line = run.ended(3, 2, 0, 1);
    CHECK(has(line, "rank 1 (on "));
    CHECK(has(line, "ended without a word while it was in the gradients of step 7; no checkpoint is lost, --resume"));
}

TEST_CASE("A stopped rank ends all", "[control]") {
    TempDir there;
    Run run(3, [&](Control& control) {
        Control::Activity step(&control, Kind::computing, "step 7");
        Run::arrive(control, there);
        hang();
        return 0;
    });
    run.wait_until_there(there);
    run.processes.signal(2, SIGSTOP);
    std::string line = run.ended(3, kTimeout + 2, 0, 2);
    CHECK(has(line, "rank 2 (on "));
    CHECK(has(line, "has not been heard of for 1"));
    CHECK(has(line, "it was in step 7"));
    run.processes.signal(2, SIGCONT);
    CHECK(run.processes.wait(2, 2) == 3);
}

TEST_CASE("All stopped together and continued, as with Ctrl-Z, is no failure", "[control]") {
    TempDir there;
    Run run(2, [&](Control& control) {
        Control::Activity wait(&control, control.world().root() ? Kind::waiting : Kind::computing, "a sum");
        Run::arrive(control, there);
        usleep(control.world().root() ? 2'000'000 : 2'400'000);  // of which they are stopped 1.5 s
        return 0;
    }, 1.2);
    run.wait_until_there(there);
    for (int rank : {0, 1}) run.processes.signal(rank, SIGSTOP);
    usleep(1'500'000);
    for (int rank : {0, 1}) run.processes.signal(rank, SIGCONT);
    for (int rank : {0, 1}) CHECK(run.processes.wait(rank, 4) == 0);
    for (int rank : {0, 1}) CHECK(run.processes.said(rank) == "");
}

TEST_CASE("A rank that does not come ends all, and a collective that does not end; a rank that is busy does not", "[control]") {
    Run stuck(2, [&](Control& control) -> int {
        Control::Activity wait(&control, Kind::waiting, "the gradients of step 9");
        hang();
    });
    Run lazy(3, [&](Control& control) {
        Control::Activity step(&control, Kind::computing, "step 8");
        if (control.world().rank == 1) hang();
        control.gather("");
        return 0;
    });
    Run busy(2, [&](Control& control) {
        if (control.world().rank == 1) {
            Control::Activity checkpoint(&control, Kind::busy, "a checkpoint");
            usleep(2'000'000);
        }
        return control.gather("x").size() == 2 ? 0 : 1;
    }, 0.6);
    std::string line = lazy.ended(3, kTimeout + 2);
    CHECK(has(line, "rank 1 (on "));
    CHECK(has(line, "has not come to step 8, where ranks 0, 2 have waited for 1"));
    CHECK(has(stuck.ended(3, 1), "ranks 0, 1 have been in the gradients of step 9"));
    for (int rank : {0, 1}) CHECK(busy.processes.wait(rank, 4) == 0);
}

TEST_CASE("Rank 0 killed or stopped: one of the others tells", "[control]") {
    for (int signal : {SIGKILL, SIGSTOP}) {
        TempDir there;
        Run run(3, [&](Control& control) -> int {
            Control::Activity step(&control, Kind::computing, "step 7");
            Run::arrive(control, there);
            hang();
        });
        run.wait_until_there(there);
        run.processes.signal(0, signal);
        std::string line = run.ended(3, kTimeout + 2, 1, 0);
        CHECK(has(line, "rank 0 (on "));
        CHECK(has(line, "it was in step 7"));
        CHECK(has(line, signal == SIGKILL ? "ended without a word" : "not been heard of"));
    }
}

TEST_CASE("Failures of several ranks at once: one message, one code", "[control]") {
    for (int size : {1, 2, 4}) {
        Run run(size, [&](Control& control) -> int {
            control.gather("");
            control.fail("cuda is out of memory", 2);
        });
        CHECK(has(run.ended(2, 2), ": cuda is out of memory\n"));
    }
    Run one(3, [&](Control& control) -> int {
        if (control.world().rank == 2) control.fail("no space left", 2);
        hang();
    }, 20);
    CHECK(one.ended(2, 2) == "train_loqt: rank 2: no space left\n");
}

TEST_CASE("A collective that failed because a rank died names that rank, else itself", "[control]") {
    TempDir there;
    Run run(3, [&](Control& control) -> int {
        Run::arrive(control, there);
        if (control.world().rank == 2) {
            usleep(600'000);
            raise(SIGKILL);
        }
        usleep(500'000);
        control.lost("ncclAllReduce: remote error");
    }, 20);
    Run itself(2, [&](Control& control) -> int {
        if (control.world().rank == 1) control.lost("ncclAllReduce: remote error");
        hang();
    }, 20);
    CHECK(run.processes.wait(2) == 137);
    CHECK(has(run.ended(3, 3, 0, 2), "rank 2 (on "));
    CHECK(itself.ended(3, 4) == "train_loqt: rank 1: ncclAllReduce: remote error\n");
}

TEST_CASE("An orderly end is no failure, but nobody may wait for who has ended", "[control]") {
    std::vector<std::unique_ptr<Run>> runs;
    for (int first : {0, 1, 2})
        runs.push_back(std::make_unique<Run>(3, [first](Control& control) {
            bool right = control.gather("x").size() == 3;
            if (control.world().rank != first) usleep(1'000'000);
            return right ? 0 : 1;
        }, 0.6));
    for (auto& run : runs)
        for (int rank = 0; rank < 3; ++rank) {
            CHECK(run->processes.wait(rank, 3) == 0);
            CHECK(run->processes.said(rank) == "");
        }
    for (int first : {0, 1}) {
        Run run(2, [&](Control& control) {
            if (control.world().rank == first) return 0;
            Control::Activity step(&control, Kind::computing, "step 9");
            control.gather("x");
            return 1;
        }, 20);
        CHECK(run.processes.wait(first, 3) == 0);
        std::string line = run.ended(3, 2, 1 - first, first);
        CHECK(has(line, "rank " + std::to_string(first) + " (on "));
        CHECK(has(line, "has ended its run, but rank " + std::to_string(1 - first)));
        CHECK(has(line, "waits for it in step 9"));
    }
}

TEST_CASE("A file being written is finished before the end", "[control]") {
    TempDir folder;
    std::vector<std::unique_ptr<Run>> runs;
    for (bool root : {false, true})
        runs.push_back(std::make_unique<Run>(2, [root, file = folder / (root ? "root" : "other")](Control& control) -> int {
            if (control.world().root() != root) {
                control.gather("");
                control.fail("no space left", 2);
            }
            {
                Control::Uninterrupted writing(&control);
                control.gather("");
                usleep(800'000);
                put_file(file, "whole");
            }
            Control::Uninterrupted another(&control);  // too late for that
            put_file(file, "cut off");
            hang();
        }, 20));
    for (bool root : {false, true}) {
        std::string line = runs[root]->ended(2, 3);
        CHECK(has(line, root ? "train_loqt: rank 1: no space left" : "train_loqt: no space left"));
        CHECK(file_bytes(folder / (root ? "root" : "other")) == "whole");
    }
    Run itself(2, [&](Control& control) -> int {
        Control::Uninterrupted writing(control.world().root() ? nullptr : &control);
        if (!control.world().root()) control.fail("no space left", 2);
        hang();
    }, 20);
    itself.ended(2, 2);
}

TEST_CASE("Ranks that are missing at the start are named", "[control]") {
    int port = free_port();
    Processes processes;
    for (int rank : {0, 2}) processes.start(rank, [=] {
        Control control(world_of(rank, 4, port), 0.5, kBeat);
        return 0;
    });
    CHECK(processes.wait(0, 2) == 2);
    CHECK(processes.wait(2, 2) == 2);
    CHECK(has(processes.said(0), "not all ranks came within 0.5 s: rank 1, 3 missing of 4"));
    CHECK(processes.said(2) == "");

    std::string alone = user_error([=] { Control control(world_of(1, 2, port), 0.4, kBeat); });
    CHECK(has(alone, "rank 1 cannot reach rank 0 at 127.0.0.1, port " + std::to_string(port)));
    CHECK(has(alone, "Connection refused"));
    World nowhere = world_of(1, 2, port);
    nowhere.address = "no-such-machine.invalid";
    std::string name = user_error([=] { Control control(nowhere, 0.4, kBeat); });
    CHECK(has(name, "no-such-machine.invalid"));
}

TEST_CASE("Ranks may come late", "[control]") {
    int port = free_port();
    Processes processes;
    for (int rank : {2, 1, 0}) processes.start(rank, [=] {
        usleep(useconds_t((2 - rank) * 300'000));
        Control control(world_of(rank, 3, port), 3, kBeat);
        return control.gather("x").size() == 3 ? 0 : 1;
    });
    for (int rank : {0, 1, 2}) CHECK(processes.wait(rank, 4) == 0);
}

TEST_CASE("A rank that dies while others are waited for", "[control]") {
    int port = free_port();
    Processes processes;
    for (int rank : {0, 1, 2}) processes.start(rank, [=] {
        if (rank == 2) hang();
        Control control(world_of(rank, 3, port), 20, kBeat);
        return 0;
    });
    usleep(300'000);
    processes.signal(1, SIGKILL);
    CHECK(processes.wait(0, 2) == 2);
    CHECK(has(processes.said(0), "rank 1 on "));
    CHECK(has(processes.said(0), "ended while others were still being waited for"));
}

TEST_CASE("Strangers on the port neither disturb nor block", "[control]") {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    int port = free_port();
    Processes processes;
    for (int rank : {0, 1}) processes.start(rank, [=] {
        if (rank == 1) usleep(500'000);  // until then the strangers are alone with rank 0
        Control control(world_of(rank, 2, port), 3, kBeat);
        return control.gather("x").size() == 2 ? 0 : 1;
    });
    std::vector<Socket> strangers;
    std::vector<std::string> words = {"", "GET / HTTP/1.1\r\n\r\n", *encode(0, "short"), *encode(0, Writer().text("another magic").number(1).bytes), *encode(200, std::string(900, 'x')),
                                      *encode(0, Writer().number(-1).bytes), std::string("\3\0\0\0", 4)};
    for (int i = 0; i < 20; ++i) words.push_back(random_text(seed + uint64_t(i), 5000));
    for (const std::string& text : words) {
        strangers.push_back(stranger(port));
        CHECK(send(strangers.back().fd(), text.data(), text.size(), MSG_NOSIGNAL) == ssize_t(text.size()));
    }
    for (int rank : {0, 1}) CHECK(processes.wait(rank, 3) == 0);
    CHECK(processes.said(0) == "");
}

TEST_CASE("Ranks of another run are told so, and the run goes on", "[control]") {
    int port = free_port();
    Processes processes;
    auto start = [&](int id, int rank, int size, double timeout) {
        processes.start(id, [=] {
            Control control(world_of(rank, size, port), timeout, kBeat);
            return control.gather("x").size() == size_t(size) ? 0 : 1;
        });
    };
    start(0, 0, 3, 5);
    start(1, 1, 3, 5);
    usleep(300'000);
    start(10, 1, 3, 5);
    start(11, 2, 4, 5);
    start(12, 0, 2, 0.3);
    for (int id : {10, 11, 12}) CHECK(processes.wait(id, 3) == 2);
    CHECK(has(processes.said(10), "turned this process away: rank 1 is there twice (on "));
    CHECK(has(processes.said(11), "rank 2 on "));
    CHECK(has(processes.said(11), "belongs to a run of 4 processes, rank 0 to one of 3"));
    CHECK(has(processes.said(12), "cannot listen on port " + std::to_string(port) + ": Address already in use; set MASTER_PORT"));
    start(2, 2, 3, 5);
    for (int id : {0, 1, 2}) CHECK(processes.wait(id, 3) == 0);
    CHECK(processes.said(0) == "");
}

TEST_CASE("Another program where rank 0 should be", "[control]") {
    for (const std::string& answer : {std::string("HTTP/1.1 400 Bad Request\r\n"), *encode(1, "another"), *encode(1, Writer().text("another magic").number(1).text("").bytes)}) {
        int port = free_port();
        Processes processes;
        processes.start(0, [=] {
            Socket listener = listen_on("127.0.0.1", port, 1);
            for (;; usleep(1000))
                if (Socket socket = accept_from(listener); socket.open()) {
                    ssize_t sent = send(socket.fd(), answer.data(), answer.size(), 0);
                    sleep(sent > 0 ? 5 : 0);
                }
            return 0;
        });
        CHECK(has(user_error([=] { Control control(world_of(1, 2, port), 2, kBeat); }), "is another program"));
    }
    int port = free_port();
    Socket silent = listen_on("127.0.0.1", port, 1);
    CHECK(has(user_error([=] { Control control(world_of(1, 2, port), 0.4, kBeat); }), "accepts connections but does not answer"));
}

TEST_CASE("Rank 0 is reached over IPv4, IPv6 and by name", "[control]") {
    bool ipv6 = access("/proc/net/if_inet6", R_OK) == 0 && has(file_bytes("/proc/net/if_inet6"), " lo\n");
    std::vector<std::string> others = {"127.0.0.1", "localhost"};
    if (ipv6) others.push_back("::1");
    int port = free_port(), size = int(others.size()) + 1;
    Processes processes;
    for (int rank = 0; rank < size; ++rank) processes.start(rank, [&, rank] {
        World world = world_of(rank, size, port);
        world.address = rank ? others[size_t(rank - 1)] : "this-machine";  // no loopback address: listens everywhere
        Control control(world, 3, kBeat);
        return int(control.gather("x").size()) == size ? 0 : 1;
    });
    for (int rank = 0; rank < size; ++rank) CHECK(processes.wait(rank, 4) == 0);
}

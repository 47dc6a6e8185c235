// What is behind Control: the thread that does all that has to do with sockets, and ends the process if it has to be ended. The main thread leaves
// it what is to be sent and takes what came, under one mutex.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>

#include "comm/control.h"
#include "comm/protocol.h"
#include "comm/watch.h"

constexpr int kLostCode = 3;      // exit code where a rank died or hangs
constexpr double kMoment = 2;     // seconds in which rank 0 answers and a death gets known
constexpr int kAll = -1;          // a rank to post to

struct Control::Connections {
    Connections(const World& world, double timeout, double heartbeat);
    ~Connections();

    // For the main thread.
    void begin(Kind kind, std::string what);
    void finish();
    std::string exchange_name() const;
    void post(int rank, FrameKind kind, const std::string& payload);  // or to kAll
    std::string take(int rank, FrameKind kind);                       // waits
    [[noreturn]] void fail(const std::string& message, int code);

    // For the thread.
    void serve();
    bool speak(double& wait);
    void hear();
    void handle(int rank, const Frame& frame);
    void judge();
    void say_goodbye();
    void tell_end(int code);
    [[noreturn]] void end_all(const std::string& message, int code);
    [[noreturn]] void end_alone(const std::string& message, int code);
    [[noreturn]] void leave(int code);

    struct Failure {
        std::string message;
        int code;
    };

    const World world;
    const double heartbeat;
    Links links;  // the thread's, as all down to `mutex`
    Watch watch;
    Socket event;               // wakes the thread
    double clock = 0;           // seconds that the thread has seen pass: it stands still while the process is stopped
    double last_look = 0;       // when clock was set
    double next_heartbeat = 0, next_change = 0, failed_at = -1;
    int64_t reported = -1;      // serial of the activity reported last

    mutable std::mutex mutex;
    std::condition_variable changed;
    double timeout;
    std::vector<Doing> doing = {Doing()};  // nested activities, the innermost last
    int64_t serial = 0, entered = 0;
    bool napping = false;  // the thread sleeps, and wants to be woken
    bool closing = false, ending = false;
    std::vector<std::pair<int, FrameBytes>> outbox;
    std::vector<std::deque<Frame>> inbox;
    std::optional<Failure> failure;
    int uninterrupted = 0;
    std::thread::id uninterrupted_thread;

    std::thread thread;

  private:
    // Under the mutex.
    Doing state() const {
        Doing now = doing.back();
        now.entered = entered;
        return now;
    }
    double period() const { return std::min(heartbeat, timeout / 4); }
    void wake() const {
        uint64_t one = 1;
        ssize_t written = write(event.fd(), &one, sizeof one);
        (void)written;  // full: it is awake
    }
};

// See connections.h.
#include "comm/connections.h"

#include <sys/eventfd.h>

#include <cerrno>
#include <csignal>
#include <cstring>

#include "runtime/error.h"
#include "runtime/metrics.h"

namespace {

constexpr double kChangeGap = 0.1;     // seconds between reports of changes
constexpr double kUninterrupted = 60;  // seconds

std::string report_of(const Doing& doing) {
    return Writer().number(int64_t(doing.kind)).number(doing.serial).number(doing.number).number(doing.entered).text(doing.what).bytes;
}

Doing doing_from(const Frame& frame) {
    Reader reader(frame.payload);
    Doing doing;
    doing.kind = Control::Kind(reader.number());
    doing.serial = reader.number();
    doing.number = reader.number();
    doing.entered = reader.number();
    doing.what = reader.text();
    return doing;
}

void print(const std::string& message) {
    std::string line = "train_loqt: " + message + "\n";
    for (size_t at = 0; at < line.size();) {  // at once, so that no other process's output comes between
        ssize_t n = write(2, line.data() + at, line.size() - at);
        if (n < 0 && errno != EINTR) return;
        if (n > 0) at += size_t(n);
    }
}

}  // namespace

Control::Connections::Connections(const World& w, double seconds, double beat)
    : world(w), heartbeat(beat), links(connect_ranks(w, seconds)), watch(links.hosts, w.rank), event(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)), timeout(seconds), inbox(size_t(w.size)) {
    CHECK_INTERNAL(event.open(), "eventfd: %s", std::strerror(errno));
    for (int rank = 0; rank < world.size; ++rank)
        if (links.to[size_t(rank)].open()) watch.heard(rank, 0);
    last_look = wall_seconds();
    // Signals are the main thread's.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    thread = std::thread([this] {
        try {
            serve();
        } catch (const std::exception& error) {
            print(format("rank %d: internal error: %s", world.rank, error.what()));
            _exit(1);
        }
    });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Control::Connections::~Connections() {
    {
        std::lock_guard<std::mutex> lock(mutex);
        closing = true;
        wake();
    }
    thread.join();
}

void Control::Connections::begin(Kind kind, std::string what) {
    std::lock_guard<std::mutex> lock(mutex);
    Doing next;
    next.kind = kind, next.what = std::move(what), next.serial = ++serial;
    if (kind == Kind::waiting) next.number = ++entered;
    doing.push_back(std::move(next));
    if (kind != Kind::computing && napping) napping = false, wake();
}

void Control::Connections::finish() {
    std::lock_guard<std::mutex> lock(mutex);
    doing.pop_back();
}

std::string Control::Connections::exchange_name() const {
    std::lock_guard<std::mutex> lock(mutex);
    return doing.size() > 1 ? doing.back().what : "an exchange of messages";
}

void Control::Connections::post(int rank, FrameKind kind, const std::string& payload) {
    CHECK_INTERNAL(payload.size() <= kLongestFrame, "a message of %zu bytes", payload.size());
    FrameBytes frame = encode(kind, payload);
    std::lock_guard<std::mutex> lock(mutex);
    outbox.push_back({rank, std::move(frame)});
    wake();
}

// Who waits in vain is ended by the watch.
std::string Control::Connections::take(int rank, FrameKind kind) {
    std::unique_lock<std::mutex> lock(mutex);
    auto& queue = inbox[size_t(rank)];
    changed.wait(lock, [&] { return !queue.empty(); });
    CHECK_INTERNAL(queue.front().kind == kind, "rank %d and rank %d exchange different messages (%d, %d)", world.rank, rank, kind, queue.front().kind);
    std::string payload = std::move(queue.front().payload);
    queue.pop_front();
    return payload;
}

void Control::Connections::fail(const std::string& message, int code) {
    std::unique_lock<std::mutex> lock(mutex);
    if (!failure) failure = Failure{message, code};
    // Who fails writes no file to its end.
    if (uninterrupted_thread == std::this_thread::get_id()) uninterrupted = 0;
    changed.notify_all();
    wake();
    for (;;) changed.wait(lock);  // for the end
}

void Control::Connections::serve() {
    for (double wait = 0;;) {
        hear();
        judge();
        if (!speak(wait)) break;
        wait_and_flush(links.to, {event.fd()}, wait);
        uint64_t wakings;
        ssize_t got = read(event.fd(), &wakings, sizeof wakings);
        (void)got;
        std::lock_guard<std::mutex> lock(mutex);
        napping = false;
    }
    say_goodbye();
}

// Sends what there is to send; false: the last of it was that. wait: seconds until there is more to say.
bool Control::Connections::speak(double& wait) {
    std::unique_lock<std::mutex> lock(mutex);
    for (auto& [to, frame] : outbox)
        for (int rank = 0; rank < world.size; ++rank)
            if (to == kAll || to == rank) links.to[size_t(rank)].send(frame);
    outbox.clear();
    bool last = closing;
    double now = wall_seconds();
    if (failure) {
        Failure f = *failure;
        lock.unlock();
        std::string message = world.root() ? f.message : format("rank %d: ", world.rank) + f.message;
        if (world.root()) end_all(message, f.code);
        if (failed_at < 0) links.to[0].send(encode(kFail, Writer().number(f.code).text(f.message).bytes)), failed_at = now;
        if (!links.to[0].open() || now > failed_at + kMoment) print(message), leave(f.code);
        lock.lock();
    }
    bool changed_activity = doing.back().serial != reported, beat = now >= next_heartbeat;
    if (beat || (changed_activity && now >= next_change)) {
        reported = doing.back().serial;
        next_change = now + kChangeGap;
        if (beat || !world.root()) {  // the others, who judge nothing, hear of rank 0's changes in time
            FrameBytes report = encode(kReport, report_of(state()));
            for (Connection& link : links.to) link.send(report);
            next_heartbeat = now + period();
        }
    }
    napping = now >= next_change;
    wait = (napping ? next_heartbeat : std::min(next_heartbeat, next_change)) - now;
    if (failed_at >= 0) wait = std::min(wait, 0.1);
    lock.unlock();
    for (Connection& link : links.to)
        if (link.open()) link.flush();
    return !last;
}

void Control::Connections::hear() {
    double now = wall_seconds(), seen;
    {
        std::lock_guard<std::mutex> lock(mutex);
        seen = std::min(now - last_look, 2 * period());
    }
    clock += seen;
    last_look = now;
    for (int rank = 0; rank < world.size; ++rank) {
        Connection& link = links.to[size_t(rank)];
        if (!link.open()) continue;
        std::vector<Frame> frames;
        Connection::State state = link.receive(frames);
        try {
            for (const Frame& frame : frames) handle(rank, frame);
        } catch (const std::runtime_error&) {  // a frame that is none
            state = Connection::State::garbage;
        }
        if (state == Connection::State::open || !link.open()) continue;
        link.close();
        if (world.root()) end_all(watch.death(rank), kLostCode);
        end_alone(watch.death(rank), kLostCode);
    }
}

void Control::Connections::handle(int rank, const Frame& frame) {
    Connection& link = links.to[size_t(rank)];
    if (!link.open()) return;
    Reader reader(frame.payload);
    watch.heard(rank, clock);
    if (frame.kind == kReport) return watch.report(rank, doing_from(frame), clock);
    if (frame.kind == kGoodbye) {
        watch.report(rank, doing_from(frame), clock);
        watch.goodbye(rank);
        return link.close();
    }
    if (frame.kind == kFail && world.root()) {
        int code = int(reader.number());
        end_all(format("rank %d: ", rank) + reader.text(), code);
    }
    if (frame.kind == kEnd) {
        link.close();
        int code = int(reader.number());
        if (world.root()) tell_end(code);
        leave(code);
    }
    if (frame.kind != kText && frame.kind != kPart && frame.kind != kParts) throw std::runtime_error("an unknown message");
    std::lock_guard<std::mutex> lock(mutex);
    inbox[size_t(rank)].push_back(frame);
    changed.notify_all();
}

void Control::Connections::judge() {
    std::unique_lock<std::mutex> lock(mutex);
    if (closing) return;
    Doing own = state();
    double patience = timeout;
    lock.unlock();
    watch.report(world.rank, own, clock);
    std::string message = watch.silent(clock, patience);
    if (message.empty()) message = watch.deserted();
    if (message.empty() && world.root()) message = watch.stuck(clock, patience);
    if (message.empty()) return;
    if (world.root()) end_all(message, kLostCode);
    end_alone(message, kLostCode);
}

void Control::Connections::say_goodbye() {
    Doing last;
    {
        std::lock_guard<std::mutex> lock(mutex);
        last = state();
    }
    for (Connection& link : links.to) link.send(encode(kGoodbye, report_of(last)));
    drain(links.to, 1);
}

void Control::Connections::tell_end(int code) {
    for (Connection& link : links.to) {
        link.send(encode(kEnd, Writer().number(code).bytes));
        if (link.open()) link.flush();
    }
}

// On rank 0.
void Control::Connections::end_all(const std::string& message, int code) {
    tell_end(code);
    print(message);
    drain(links.to, 0.5);
    leave(code);
}

// On another rank, without rank 0.
void Control::Connections::end_alone(const std::string& message, int code) {
    tell_end(code);  // to rank 0, if that only sleeps
    links.to[0].close();
    if (world.speaks()) print(message);
    leave(code);
}

void Control::Connections::leave(int code) {
    std::unique_lock<std::mutex> lock(mutex);
    ending = true;
    changed.wait_for(lock, std::chrono::duration<double>(kUninterrupted), [&] { return uninterrupted == 0; });
    _exit(code);
}

// How the ranks find rank 0 (see protocol.h). The port is open to everyone who can reach it: who does not introduce himself is neither answered nor waited for.
#include <unistd.h>

#include <algorithm>

#include "comm/protocol.h"
#include "runtime/error.h"
#include "runtime/metrics.h"

namespace {

constexpr double kPatience = 5;  // seconds, for a port that is just being freed and for answers that need nothing but a thread

std::string host_name() {
    char name[256] = "";
    gethostname(name, sizeof name - 1);
    return std::string(name).substr(0, 64);
}

FrameBytes greeting(FrameKind kind, const std::string& text) { return encode(kind, Writer().text(kMagic).number(kVersion).text(text).bytes); }

class Root {
  public:
    Root(const World& world, double timeout) : world_(world), timeout_(timeout), listener_(listen_on(world.address, world.port, std::min(timeout, kPatience))) {
        links_.to.resize(size_t(world.size));
        links_.hosts.resize(size_t(world.size));
        links_.hosts[0] = host_name();
    }

    Links gather() {
        double deadline = wall_seconds() + timeout_;
        while (!missing().empty()) {
            double left = deadline - wall_seconds();
            if (left <= 0) give_up(format("not all ranks came within %g s: %s missing of %d%s", timeout_, missing().c_str(), world_.size, turned_away_.c_str()));
            std::vector<int> others = {listener_.fd()};
            for (const Connection& stranger : strangers_) others.push_back(stranger.fd());
            wait_and_flush(links_.to, others, std::min(left, 0.2));
            let_in();
            listen_to_strangers();
            look_after_ranks();
        }
        for (Connection& link : links_.to) link.send(encode(kStart, ""));
        return std::move(links_);
    }

  private:
    void let_in() {
        for (;;) {
            Socket socket = accept_from(listener_);
            if (!socket.open()) return;
            if (strangers_.size() >= size_t(world_.size) + 64) strangers_.erase(strangers_.begin());
            strangers_.emplace_back(std::move(socket), kLongestGreeting);
        }
    }

    void listen_to_strangers() {
        for (Connection& stranger : strangers_) {
            std::vector<Frame> frames;
            Connection::State state = stranger.receive(frames);
            try {
                if (!frames.empty()) meet(stranger, frames[0]);
                else if (state != Connection::State::open) stranger.close();
            } catch (const std::runtime_error&) {  // no greeting of ours
                stranger.close();
            }
        }
        strangers_.erase(std::remove_if(strangers_.begin(), strangers_.end(), [](const Connection& c) { return !c.open(); }), strangers_.end());
    }

    void meet(Connection& stranger, const Frame& frame) {
        Reader reader(frame.payload);
        if (frame.kind != kHello || reader.text() != kMagic) return stranger.close();
        if (int64_t version = reader.number(); version != kVersion)
            return refuse(stranger, format("the programs are not the same: one speaks version %lld, rank 0's %lld; use one build on all machines", (long long)version, (long long)kVersion));
        int64_t size = reader.number(), rank = reader.number();
        std::string host = reader.text();
        if (size != world_.size)
            return refuse(stranger, format("rank %lld on %s belongs to a run of %lld processes, rank 0 to one of %d: two runs on port %d, or a wrong WORLD_SIZE", (long long)rank,
                                           host.c_str(), (long long)size, world_.size, world_.port));
        if (rank < 1 || rank >= size || links_.to[size_t(rank)].open())
            return refuse(stranger, format("rank %lld is there twice (on %s and on %s): two runs on port %d, or a wrong RANK", (long long)rank,
                                           rank >= 0 && rank < size ? links_.hosts[size_t(rank)].c_str() : "?", host.c_str(), world_.port));
        links_.hosts[size_t(rank)] = host;
        stranger.send(greeting(kWelcome, links_.hosts[0]));
        stranger.allow(kLongestFrame);
        links_.to[size_t(rank)] = std::move(stranger);
        links_.to[size_t(rank)].flush();
        stranger.close();
    }

    // No reason to end: it may belong to another run.
    void refuse(Connection& stranger, const std::string& reason) {
        stranger.send(greeting(kRefused, reason));
        stranger.flush();
        stranger.close();
        turned_away_ = "; one was turned away: " + reason;
    }

    void look_after_ranks() {
        for (int rank = 1; rank < world_.size; ++rank) {
            Connection& link = links_.to[size_t(rank)];
            std::vector<Frame> none;
            if (link.open() && link.receive(none) != Connection::State::open)
                give_up(format("rank %d on %s ended while others were still being waited for", rank, links_.hosts[size_t(rank)].c_str()));
        }
    }

    std::string missing() const {
        std::string list;
        for (int rank = 1; rank < world_.size; ++rank)
            if (!links_.to[size_t(rank)].open()) list += (list.empty() ? "rank " : ", ") + std::to_string(rank);
        return list;
    }

    [[noreturn]] void give_up(const std::string& message) {
        for (Connection& link : links_.to) link.send(encode(kEnd, Writer().number(2).bytes));
        drain(links_.to, 0.5);
        throw UserError(message + "; see what the missing ones printed");
    }

    const World& world_;
    double timeout_;
    Socket listener_;
    Links links_;
    std::vector<Connection> strangers_;
    std::string turned_away_;
};

class Joining {
  public:
    Joining(const World& world, double timeout) : world_(world), timeout_(timeout), deadline_(wall_seconds() + timeout), place_(format("%s, port %d", world.address.c_str(), world.port)) {}

    Links join() {
        std::string why;
        for (double pause = 0.02;; pause = std::min(2 * pause, 0.5)) {
            Socket socket = connect_to(world_.address, world_.port, std::min(left(), kPatience), why);
            if (socket.open() && introduce(std::move(socket), why)) break;
            if (left() < pause) throw UserError(format("rank %d cannot reach rank 0 at %s, for %g s now: %s; look whether rank 0 runs there", world_.rank, place_.c_str(), timeout_, why.c_str()));
            usleep(useconds_t(pause * 1e6));
        }
        Frame frame;
        // Rank 0 ends the waiting; if it does not it is no longer there.
        if (!receive(frame, timeout_ + kPatience)) throw UserError("rank 0 at " + place_ + " ended, or was stopped, while ranks were still being waited for; see what it printed");
        if (frame.kind == kEnd) _exit(int(Reader(frame.payload).number()));
        Links links;
        links.to.resize(size_t(world_.size));
        links.hosts.resize(size_t(world_.size));
        links.hosts[0] = root_host_, links.hosts[size_t(world_.rank)] = host_name();
        links.to[0] = std::move(link_[0]);
        return links;
    }

  private:
    double left() const { return deadline_ - wall_seconds(); }

    // The next frame; false with an end before.
    bool receive(Frame& frame, double seconds) {
        double deadline = wall_seconds() + seconds;
        for (std::vector<Frame> frames;;) {
            Connection::State state = link_[0].receive(frames, 1);
            if (state == Connection::State::garbage) throw_stranger();
            if (!frames.empty()) return frame = frames[0], true;
            double left = deadline - wall_seconds();
            if (state == Connection::State::ended || left <= 0) return false;
            wait_and_flush(link_, {}, left);
        }
    }

    // Whether rank 0 has answered.
    bool introduce(Socket socket, std::string& why) {
        link_.clear();
        link_.emplace_back(std::move(socket), kLongestGreeting);
        link_[0].send(encode(kHello, Writer().text(kMagic).number(kVersion).number(world_.size).number(world_.rank).text(host_name()).bytes));
        Frame frame;
        if (!receive(frame, std::min(std::max(left(), 0.1), kPatience))) {
            why = "something there accepts connections but does not answer as train_loqt does";
            return false;
        }
        Reader reader(frame.payload);
        std::string magic, text;
        try {
            magic = reader.text();
            reader.number();
            text = reader.text();
        } catch (const std::runtime_error&) {
            throw_stranger();
        }
        if (magic != kMagic) throw_stranger();
        if (frame.kind == kRefused) throw UserError("rank 0 at " + place_ + " turned this process away: " + text);
        root_host_ = text;
        link_[0].allow(kLongestFrame);
        return true;
    }

    [[noreturn]] void throw_stranger() {
        throw UserError("what answers at " + place_ + ", where rank 0 should be, is another program; set MASTER_PORT to another one, the same for all ranks");
    }

    const World& world_;
    double timeout_, deadline_;
    std::string place_, root_host_;
    std::vector<Connection> link_;  // one
};

}  // namespace

Links connect_ranks(const World& world, double timeout) { return world.root() ? Root(world, timeout).gather() : Joining(world, timeout).join(); }

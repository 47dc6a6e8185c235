// Judges whether all ranks of a run are well, from what they report: no sockets, no threads, no clock of its own.
#pragma once
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "comm/control.h"

// What the main thread of a rank is about. Waits are numbered in the order in which they are entered, which is the same on all ranks.
struct Doing {
    Control::Kind kind = Control::Kind::computing;
    std::string what = "other work";
    int64_t serial = 0;   // of the activity
    int64_t number = 0;   // of the wait, where it is one
    int64_t entered = 0;  // waits entered so far
};

// Times are seconds of one clock, that of the rank which judges. The messages are for "train_loqt: ...", empty: all is well.
class Watch {
  public:
    Watch(std::vector<std::string> hosts, int self);
    void heard(int rank, double now) { ranks_[size_t(rank)].heard = now; }
    void report(int rank, const Doing& doing, double now);
    void goodbye(int rank) { ranks_[size_t(rank)].gone = true; }

    // Of a rank whose connection broke.
    std::string death(int rank) const;
    // A rank that was heard once has not been for `timeout` seconds.
    std::string silent(double now, double timeout) const;
    // A rank waits for one that has ended in good order.
    std::string deserted() const;
    // A rank has waited for more than `timeout` seconds for one that neither comes nor is busy, or all have come and it does not end.
    // Counted from the report that showed it first: how long the clocks of the others stood still does not matter.
    std::string stuck(double now, double timeout) const;

  private:
    static constexpr double kNever = -std::numeric_limits<double>::infinity();
    struct Rank {
        std::string host;
        Doing doing;
        double heard = kNever;  // last sign of life
        double since = 0;       // the activity
        double moved = 0;       // last time that it was seen to have entered another wait
        double busy = kNever;   // last time that it was seen busy
        bool gone = false;
        bool waits() const { return !gone && doing.kind == Control::Kind::waiting; }
    };
    std::string name(size_t rank) const;
    std::string waiting_for(int64_t number) const;

    std::vector<Rank> ranks_;
    size_t self_;
};

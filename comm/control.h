// The processes of a run watch over each other, beside what they compute: a connection from every rank to rank 0, over TCP, on which small
// messages go and a heartbeat, served by a thread of its own. What kills, hangs or stops one rank ends all of them, with one message.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "comm/world.h"

class Control {
  public:
    // Returns when all ranks are connected. timeout: seconds, for this and for whatever later waits for another rank. UserError: rank 0 cannot
    // be reached, its port is taken, ranks are missing after the timeout (which), or what answers is another program or version.
    // heartbeat: seconds between signs of life.
    Control(const World& world, double timeout, double heartbeat = 1);
    // An orderly end: the others are told, so that it is no failure. Does not wait for them.
    ~Control();
    Control(const Control&) = delete;

    const World& world() const { return world_; }
    double timeout() const { return timeout_; }
    void set_timeout(double seconds);

    // Messages of the main thread, any bytes, called by all ranks in the same order. They wait for the others, up to the timeout.
    std::string broadcast(const std::string& text);               // rank 0's on all ranks
    std::vector<std::string> gather(const std::string& text);     // all ranks', by rank, on all ranks

    // What the main thread is about, for messages and for the watch. While one waits(for others) in something, every rank has to come to
    // it within the timeout, unless that is busy(with) what may take long: a checkpoint, making weights.
    enum class Kind { computing, waiting, busy };
    class Activity {
      public:
        Activity(Control* control, Kind kind, std::string what);  // null: does nothing
        ~Activity();                                              // back to the activity it is nested in
        Activity(const Activity&) = delete;
      private:
        Control* control_;
    };

    // This rank cannot go on: every rank ends with exit code `code`, rank 0 having printed "train_loqt: rank R: MESSAGE" on stderr (once, whoever
    // fails first). Runs no destructors.
    [[noreturn]] void fail(const std::string& message, int code);
    // A collective operation failed here, as it does when another rank is gone: waits a moment for that to be known, so that the message names
    // the cause, else fails with this one.
    [[noreturn]] void lost(const std::string& what);

    // While one exists the process is not ended from elsewhere (for 60 s at most): a file being written is finished first.
    class Uninterrupted {
      public:
        explicit Uninterrupted(Control* control);  // null: does nothing
        ~Uninterrupted();
        Uninterrupted(const Uninterrupted&) = delete;
      private:
        Control* control_;
    };

  private:
    struct Connections;
    World world_;
    double timeout_;
    std::unique_ptr<Connections> connections_;
};

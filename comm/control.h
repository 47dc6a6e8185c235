// The processes of a run watch over each other, beside what they compute: a connection from every rank to rank 0, over TCP (comm/world.h says
// which port), on which small messages go and a heartbeat, served by a thread of its own. What kills, hangs or stops one rank ends all of them,
// with one message on rank 0's stderr: exit code 3 where a rank died or hangs. Where it is rank 0 that is lost, rank 1 and one rank on every other
// machine print. Without authentication, as all such launchers: for a network whose machines trust each other.
//
//   Control control(world_from_environment(), 120);   // before anything that can fail on one rank only
//   try { … } catch (const UserError& error) { control.fail(error.what(), 2); }
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "comm/world.h"

class Control {
  public:
    // Returns when all ranks are connected. timeout: seconds, for this and for whatever later waits for another rank. UserError: rank 0 cannot
    // be reached, its port is taken, ranks are missing after the timeout (which), or what answers is another program or version. Rank 0's mistakes
    // are thrown there only: the others end with exit code 2. heartbeat: seconds between signs of life.
    // Unless caught on every rank, print it where world.speaks().
    Control(const World& world, double timeout, double heartbeat = 1);
    // An orderly end: the others are told, so that it is no failure. Does not wait for them to end, too (but for a second at most until they know).
    ~Control();
    Control(const Control&) = delete;

    const World& world() const { return world_; }
    double timeout() const;
    void set_timeout(double seconds);  // by all ranks

    // Messages of the main thread, any bytes, up to 1 GiB together, called by all ranks in the same order. They wait for the others, up to the
    // timeout: then the process ends. Named to the user by the activity they are called in.
    std::string broadcast(const std::string& text);               // rank 0's on all ranks
    std::vector<std::string> gather(const std::string& text);     // all ranks', by rank, on all ranks

    // What the main thread is about, for messages ("it was in WHAT") and for the watch. While one waits(for others) in something, every rank has to
    // come to it within the timeout, unless that is busy(with) what may take long: a checkpoint, making weights. All ranks enter the same waits
    // in the same order. Costs some 100 ns.
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
    // fails first; "train_loqt: MESSAGE" if that is rank 0). Runs no destructors and flushes no files.
    [[noreturn]] void fail(const std::string& message, int code);
    // A collective operation failed here, as it does when another rank is gone: waits a moment for that to be known, so that the message names
    // the cause, else fails with this one and exit code 3.
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
    std::unique_ptr<Connections> connections_;
};

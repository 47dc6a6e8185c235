// Host threads that work for a device beside its own: factorizations are chains of small kernels that leave a GPU idle and block the
// calling thread, so several are best under way at once.
//
//   Device& helper = device.workers()->idle();   // its scratch is empty; take what the job needs from it
//   …                                            // work on `device` that the job depends on
//   device.workers()->start(helper, job);        // the job begins when that work is done
//   device.workers()->finish();
//
// What a job computes must not depend on which worker runs it or when.
#pragma once
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "runtime/device.h"

class Workers {
  public:
    using Job = std::function<void(Device&)>;

    // Attaches itself to `device` until it ends. `count` threads with a fork of the device each, scratch_bytes of scratch per fork.
    // On a dry device there are no threads: jobs run at once and only their scratch is counted.
    Workers(Device& device, int count, int64_t scratch_bytes);
    ~Workers();
    Workers(const Workers&) = delete;

    int count() const { return int(workers_.size()); }
    // The fork of an idle worker; waits until there is one. Only the thread that owns `device` may ask.
    Device& idle();
    // Seconds that idle() has waited since the last call.
    double take_waited();
    // Runs job(helper) once all that is queued on `device` now is done. helper: from idle(). The job is destroyed when it has ended.
    void start(Device& helper, Job job);
    // Returns when all jobs have ended and what they queued is done. Throws what a job has thrown (the first).
    void finish();
    // The most scratch that a fork has used.
    int64_t scratch_high_water() const;

  private:
    struct Worker {
        std::unique_ptr<Device> device;
        Job job;  // empty: idle
        std::thread thread;
    };
    void serve(Worker& worker);
    void close();

    Device& device_;
    std::vector<std::unique_ptr<Worker>> workers_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::exception_ptr failure_;
    bool closing_ = false;
    double waited_ = 0;
};

// Where the time of a step goes: every operation reports its name and the work it does; while a Profiler is attached to the device
// each call is timed. Detached (always, except in bench/), a report costs one comparison.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "runtime/device.h"

// All calls of one operation under one label.
struct OperationProfile {
    std::string label, name;  // label: what the model used it for ("LM head"), may be empty
    int64_t calls = 0;
    double seconds = 0, flops = 0, bytes = 0;
};

// Collects the operations of `device` from construction to destruction; one at a time per device. On a GPU times come from events around
// each operation's kernels, on the CPU from the wall clock. An operation inside another counts for the outer one.
class Profiler {
  public:
    explicit Profiler(Device& device);
    ~Profiler();
    Profiler(const Profiler&) = delete;
    // Synchronizes. Sorted by time, longest first. Empties the books.
    std::vector<OperationProfile> take();

  private:
    friend class OperationTimer;
    friend class ProfileLabel;
    struct Books;
    Device& device_;
    std::unique_ptr<Books> books_;
};

// For the length of a scope: the operation `name`, which does `flops` floating-point operations on tensor cores (or in products on the
// CPU) and moves `bytes` to and from memory at the least. name must outlive the profiler.
class OperationTimer {
  public:
    OperationTimer(Device& device, const char* name, double flops, double bytes) {
        if (device.profiler()) begin(*device.profiler(), name, flops, bytes);
    }
    ~OperationTimer() {
        if (profiler_) end();
    }
    OperationTimer(const OperationTimer&) = delete;

  private:
    void begin(Profiler& profiler, const char* name, double flops, double bytes);
    void end();
    Profiler* profiler_ = nullptr;
};

// For the length of a scope operations are booked under `label` (innermost wins). label must outlive the profiler.
class ProfileLabel {
  public:
    ProfileLabel(Device& device, const char* label);
    ~ProfileLabel();
    ProfileLabel(const ProfileLabel&) = delete;

  private:
    Profiler* profiler_;
    const char* outer_ = nullptr;
};

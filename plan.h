// The memory plan: bytes by family, from the configuration alone. It is made by running the program on a dry device, so what it says is
// what the run takes.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "runtime/config.h"
#include "runtime/device.h"

struct MemoryPlan {
    std::vector<std::pair<std::string, int64_t>> lines;  // family or fixed cost, bytes
    int64_t scratch = 0;
    int64_t total = 0;
    bool cache_effective = false;
    int workers = 0;               // threads that share the work of merges (runtime/workers.h), and the scratch of each
    int64_t worker_scratch = 0;
};

// Bytes a device of this kind takes before any tensor: CUDA context and library handles (an estimate) and cuBLAS' workspace; 0 on a CPU.
int64_t library_bytes(DeviceKind kind);

// For a resolved micro-batch.
MemoryPlan plan_memory(const Config& config, DeviceKind kind, bool cache_effective, int workers = 0);

// Chooses train.micro_batch if it is auto, whether effective weights are kept and whether merges have workers, within `budget` bytes (0 = no limit), and writes the first two
// into the configuration. Throws UserError if not even the smallest fits, saying what would make it fit.
MemoryPlan choose_plan(Config& config, DeviceKind kind, int64_t budget);

// The plan as a table for people.
std::string describe_plan(const Config& config, const MemoryPlan& plan, DeviceKind kind, int64_t budget);

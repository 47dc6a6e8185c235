// The memory plan: bytes by family, from the configuration alone. It is made by running the program on a dry device, so what it says is
// what the run takes.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "runtime/config.h"
#include "runtime/device.h"

// What a run will do, and whether choose_plan chose it (auto) or the configuration asked for it.
struct PlannedChoice {
    std::string key, value;  // configuration key, or "merge_workers"
    bool automatic;
    std::string remark = {};  // what the value comes to here, if that is not what it says
};

struct MemoryPlan {
    std::vector<std::pair<std::string, int64_t>> lines;  // family or fixed cost, bytes
    int64_t scratch = 0;
    int64_t total = 0;
    int workers = 0;               // threads that share the work of merges (runtime/workers.h), and the scratch of each
    int64_t worker_scratch = 0;
    std::vector<PlannedChoice> choices;  // by choose_plan

    int64_t bytes(const std::string& line) const;  // 0 if there is none of that name
};

// Bytes a device of this kind takes before any tensor: CUDA context and library handles (an estimate) and cuBLAS' workspace; 0 on a CPU.
int64_t library_bytes(DeviceKind kind);

// Bytes a run may take: run.memory_budget, else what is free on its open device now; 0 (no limit) without either.
int64_t memory_budget(const Config& config, const Device* device);

// For resolved train.micro_batch, train.recompute and train.effective_weights.
MemoryPlan plan_memory(const Config& config, DeviceKind kind, int workers = 0);

// Chooses train.micro_batch, train.recompute and train.effective_weights where they are auto, and how many workers merges have, so that cost_per_token
// (flops.h) is least within `budget` bytes (0 = no limit), and writes the first three into the configuration. Throws UserError if not even the smallest
// fits, saying what would make it fit; resumed: of what --resume may change.
MemoryPlan choose_plan(Config& config, DeviceKind kind, int64_t budget, bool resumed = false);

// The plan as a table for people, and as JSON (docs/formats.md).
std::string describe_plan(const Config& config, const MemoryPlan& plan, DeviceKind kind, int64_t budget);
std::string plan_to_json(const Config& config, const MemoryPlan& plan, DeviceKind kind, int64_t budget);

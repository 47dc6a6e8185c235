// What the plan may choose from, and what it may advise: shared by plan.cpp, plan_hints.cpp and plan_report.cpp.
#pragma once
#include <string>
#include <vector>

#include "plan.h"

// The values that a setting may take: the one asked for, or where that is auto those worth trying.
std::vector<int64_t> micro_batch_sizes(const Config& config, DeviceKind kind);  // largest first
std::vector<std::string> recomputations(const Config& config, DeviceKind kind);
std::vector<std::string> effective_weights(const Config& config);

// For a configuration that does not fit: "it fits with --…", the least harmful change that is enough. resumed: of those that a checkpoint allows.
std::string what_would_fit(const Config& config, DeviceKind kind, int64_t budget, bool resumed);

// 1.50 GiB, 250.00 MiB.
double gib(int64_t bytes);
std::string amount(int64_t bytes);

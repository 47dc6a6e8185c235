#include "method.h"

#include <map>

#include "merge_schedule.h"
#include "runtime/error.h"

MethodPolicy method_policy(const Config& config) {
    static const std::map<std::string, MethodPolicy> policies = {
        //           trains_w quantized adapters trains_p projects
        {"full",    {true,    false,    false,   false,   false}},
        {"galore",  {true,    false,    false,   false,   true}},
        {"loqt",    {false,   true,     true,    false,   true}},
        {"loqt-nq", {false,   false,    true,    false,   true}},
        {"lora",    {false,   false,    true,    true,    false}},
        {"relora",  {false,   false,    true,    true,    false}},
        {"qlora",   {false,   true,     true,    true,    false}},
        {"loftq",   {false,   true,     true,    true,    false}}};
    auto found = policies.find(config.method.name);
    CHECK_INTERNAL(found != policies.end(), "no method %s", config.method.name.c_str());
    MethodPolicy policy = found->second;
    policy.quantized_p = policy.quantized && policy.projects && config.method.quantize_projection;
    return policy;
}

double adapter_scale(const Config& config) {
    return method_policy(config).trains_p ? config.method.lora_alpha / double(config.method.rank) : config.method.scale;
}

bool makes_anew(const Config& config) { return method_policy(config).projects || config.method.name == "relora"; }

std::vector<int64_t> merge_steps(const Config& config) {
    const MethodConfig& m = config.method;
    if (method_policy(config).projects) return merge_schedule(m.merge_gap, m.merge_growth, m.max_gap, config.train.steps);
    std::vector<int64_t> steps;
    if (m.name == "relora")
        for (int64_t step = m.relora_gap; step + m.relora_gap < config.train.steps; step += m.relora_gap) steps.push_back(step);
    return steps;
}

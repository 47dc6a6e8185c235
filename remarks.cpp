#include "remarks.h"

#include "method.h"
#include "runtime/error.h"

namespace {

bool is_loqt(const std::string& method) { return method == "loqt" || method == "loqt-nq"; }
bool trains_factors(const Config& config) { return method_policy(config).trains_p; }

// The rate and scale of a configuration file are for its method: another method trained with them would look worse than it is.
std::string borrowed_rate(const std::string& file_name, const Config& file, const Config& config, const std::function<bool(const char*)>& asked) {
    const std::string &method = config.method.name, &of = file.method.name;
    const bool galore = method == "galore", factors = trains_factors(config);
    if (method == of || (is_loqt(method) && is_loqt(of)) || (factors && trains_factors(file))) return "";
    const bool rate_asked = asked("optimizer.lr"), scale_asked = galore ? asked("method.scale") : !factors || asked("method.lora_alpha");
    if (scale_asked && (rate_asked || galore)) return "";  // galore with a scale of its own: then loqt's rate is about right
    std::string best = method == "full" ? "--lr 0.002" : "--lr 0.005 to 0.01", here = format("--lr %g", config.optimizer.lr);
    if (galore) best = "--lr 0.01 --scale 0.25", here += format(" --scale %g", config.method.scale);
    if (factors) best = format("--lr 0.001 --lora_alpha %lld, four times the rank,", 4LL * (long long)config.method.rank), here += format(" --lora_alpha %g", config.method.lora_alpha);
    if (method == "relora" || method == "loftq") best += " of two settings tried,";
    return format("%s has %s; %s did best with %s at 60m (docs/experiments.md), what %s has is for %s", config.run.dir.c_str(), here.c_str(), method.c_str(), best.c_str(), file_name.c_str(), of.c_str());
}

// Restarts that never come, or not when they were asked for.
std::string relora_restarts(const Config& config, const std::function<bool(const char*)>& asked) {
    if (config.method.name != "relora") return "";
    const long long gap = config.method.relora_gap;
    if (merge_steps(config).empty()) return format("relora without a restart, which is lora: one needs method.relora_gap, %lld, steps before it and more after it, the run has %lld", gap, (long long)config.train.steps);
    if (!asked("method.merge_gap") || asked("method.relora_gap")) return "";
    return format("relora restarts every %lld steps, by method.relora_gap; method.merge_gap is for loqt, loqt-nq and galore", gap);
}

}  // namespace

std::string method_remarks(const std::string& file_name, const Config& file, const Config& config, const std::function<bool(const char*)>& asked) {
    const std::string rate = borrowed_rate(file_name, file, config, asked), restarts = relora_restarts(config, asked);
    return rate + (rate.empty() || restarts.empty() ? "" : "\n") + restarts;
}

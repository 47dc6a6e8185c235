#include "remarks.h"

#include <vector>

#include "method.h"
#include "runtime/error.h"

namespace {

bool is_loqt(const std::string& method) { return method == "loqt" || method == "loqt-nq"; }
bool trains_factors(const Config& config) { return method_policy(config).trains_p; }

// A file's learning rate is for its method: another method trained with it would look worse than it is.
std::string borrowed_rate(const std::string& file_name, const Config& file, const Config& config) {
    const std::string &method = config.method.name, &of = file.method.name;
    if (method == of || (is_loqt(method) && is_loqt(of)) || (trains_factors(config) && trains_factors(file))) return "";
    const char* best = is_loqt(method) ? "0.005 to 0.01" : method == "full" ? "0.002" : method == "galore" ? "0.01 with --scale 0.25" : "0.001 with --lora_alpha four times --rank";
    return format("optimizer.lr %g is what %s has for %s; %s did best with %s at 60m (docs/experiments.md): give --lr", config.optimizer.lr, file_name.c_str(), of.c_str(), method.c_str(), best);
}

std::string seldom_restarts(const Config& config, bool merge_gap_asked) {
    if (config.method.name != "relora") return "";
    if (merge_steps(config).empty()) return format("relora without a restart, which is lora: method.relora_gap is %lld, the run has %lld steps", (long long)config.method.relora_gap, (long long)config.train.steps);
    return merge_gap_asked ? format("relora restarts every %lld steps, by method.relora_gap; method.merge_gap is for loqt, loqt-nq and galore", (long long)config.method.relora_gap) : "";
}

}  // namespace

std::string method_remarks(const std::string& file_name, const Config& file, const Config& config, const std::function<bool(const char*)>& asked) {
    std::vector<std::string> remarks;
    const bool own_scale = config.method.name == "galore" && asked("method.scale");  // then the file's rate is about right
    if (!asked("optimizer.lr") && !own_scale) remarks.push_back(borrowed_rate(file_name, file, config));
    else if (trains_factors(config) && !trains_factors(file) && !asked("method.lora_alpha"))
        remarks.push_back(format("method.lora_alpha is %g, a scale of %g; %s did better with four times --rank at 60m (docs/experiments.md)", config.method.lora_alpha, adapter_scale(config), config.method.name.c_str()));
    remarks.push_back(seldom_restarts(config, asked("method.merge_gap") && !asked("method.relora_gap")));
    std::string text;
    for (const std::string& remark : remarks)
        if (!remark.empty()) text += (text.empty() ? "" : "\n") + remark;
    return text;
}

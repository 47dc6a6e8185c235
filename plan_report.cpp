// A memory plan as text for people and as JSON for scripts. See plan.h.
#include <nlohmann/json.hpp>

#include "flops.h"
#include "plan_options.h"

double gib(int64_t bytes) { return double(bytes) / double(int64_t(1) << 30); }
std::string amount(int64_t bytes) { return gib(bytes) < 1 ? format("%.2f MiB", 1024 * gib(bytes)) : format("%.2f GiB", gib(bytes)); }

namespace {

int64_t weights_of(const MemoryPlan& plan) { return plan.bytes("frozen weights") + plan.bytes("trained weights"); }
int64_t moments_of(const MemoryPlan& plan) { return plan.bytes("optimizer moments"); }
int64_t tokens_of(const Config& config) { return config.train.micro_batch * config.train.seq_len; }
double activations_of(const Config& config, const MemoryPlan& plan) { return double(plan.bytes("activations")) / double(tokens_of(config)); }

}  // namespace

std::string describe_plan(const Config& config, const MemoryPlan& plan, DeviceKind kind, int64_t budget) {
    std::string text = format("%s, %.2f M parameters, method %s", config.run.dir.c_str(), double(parameter_count(config)) / 1e6, config.method.name.c_str());
    if (config.method.name != "full") text += format(", rank %lld", (long long)config.method.rank);
    const std::string ranks = config.world_size > 1 ? format("%lld × ", (long long)config.world_size) : "";
    text += format("\nplanned for %s, sequence %lld, batch %lld = %s%lld × micro-batch %lld (%lld tokens)\n\n", (config.world_size > 1 ? "each of " + std::to_string(config.world_size) + (kind == DeviceKind::cuda ? " GPUs" : " processes") : std::string(kind == DeviceKind::cuda ? "a GPU" : "the CPU")).c_str(),
                   (long long)config.train.seq_len, (long long)config.train.batch, ranks.c_str(), (long long)config.micro_batches(), (long long)config.train.micro_batch,
                   (long long)tokens_of(config));
    for (auto& [name, bytes] : plan.lines) text += format("  %-40s %10.4f GiB\n", name.c_str(), gib(bytes));
    text += format("  %-40s %10.4f GiB", "total", gib(plan.total));
    if (budget) text += format("   of %s allowed", amount(budget).c_str());
    text += format("\n\n  weights + optimizer %.4f GiB: weights %.4f, moments %.4f; gradients %.4f\n  activations %s a token\n\n", gib(weights_of(plan) + moments_of(plan)),
                   gib(weights_of(plan)), gib(moments_of(plan)), gib(plan.bytes("gradients")), amount(int64_t(activations_of(config, plan))).c_str());
    for (const PlannedChoice& choice : plan.choices)
        text += format("  %-30s %10s%s\n", choice.key.c_str(), choice.value.c_str(), choice.automatic ? "   (auto)" : choice.remark.empty() ? "" : ("   (" + choice.remark + ")").c_str());
    return text;
}

std::string plan_to_json(const Config& config, const MemoryPlan& plan, DeviceKind kind, int64_t budget) {
    using json = nlohmann::ordered_json;
    const ModelConfig& m = config.model;
    json lines = json::array(), choices = json::object();
    for (auto& [name, bytes] : plan.lines) lines.push_back({{"name", name}, {"bytes", bytes}});
    for (const PlannedChoice& choice : plan.choices) {
        bool number = choice.value.find_first_not_of("0123456789") == std::string::npos;
        choices[choice.key] = {{"value", number ? json(std::stoll(choice.value)) : json(choice.value)}, {"auto", choice.automatic}};
    }
    json plan_json = {{"run_dir", config.run.dir}, {"device", kind == DeviceKind::cuda ? "cuda" : "cpu"}, {"method", config.method.name},
                      {"rank", config.method.name != "full" ? json(config.method.rank) : json()}, {"parameters", parameter_count(config)},
                      {"model", {{"hidden", m.hidden}, {"intermediate", m.intermediate}, {"heads", m.heads}, {"kv_heads", config.kv_heads()}, {"layers", m.layers}, {"vocab", m.vocab}}},
                      {"seq_len", config.train.seq_len}, {"batch", config.train.batch}, {"gpus", config.world_size}, {"micro_batches", config.micro_batches()}, {"tokens_per_micro_batch", tokens_of(config)},
                      {"lines", lines}, {"total", plan.total}, {"budget", budget ? json(budget) : json()},
                      {"weights_bytes", weights_of(plan)}, {"moments_bytes", moments_of(plan)}, {"gradients_bytes", plan.bytes("gradients")},
                      {"weights_and_optimizer_bytes", weights_of(plan) + moments_of(plan)}, {"activation_bytes_per_token", activations_of(config, plan)},
                      {"choices", choices}};
    return plan_json.dump(2) + "\n";
}

// See plan.h.
#include "plan.h"

#include <algorithm>
#include <map>

#include "flops.h"
#include "llama.h"
#include "runtime/workers.h"
#include "training_step.h"

namespace {

// The driver's context, loaded kernels and library handles: not ours to plan. On an H200 with CUDA 13.0 the measured peaks of five runs
// (60M by every method, 1B by loqt) lay 696 to 706 MiB above everything else in their plans.
constexpr int64_t kContextBytes = int64_t(700) << 20;
constexpr int64_t kWorkspaceBytes = int64_t(64) << 20;
// Larger micro-batches than this gain nothing: GPUs are saturated, CPU caches overflow.
constexpr int64_t kMostTokensCuda = 131072, kMostTokensCpu = 2048;
// Matrices whose factorizations are under way at once. More gain little: factors of a large matrix fill a GPU two or three at a time.
constexpr int kMergeWorkers = 4;

double gib(int64_t bytes) { return double(bytes) / double(int64_t(1) << 30); }
std::string amount(int64_t bytes) { return gib(bytes) < 1 ? format("%.2f MiB", 1024 * gib(bytes)) : format("%.2f GiB", gib(bytes)); }

}  // namespace

int64_t library_bytes(DeviceKind kind) { return kind == DeviceKind::cuda ? kWorkspaceBytes + kContextBytes : 0; }

MemoryPlan plan_memory(const Config& config, DeviceKind kind, int workers) {
    auto device = Device::open_dry(kind);
    std::unique_ptr<Workers> dry_workers;
    if (workers) dry_workers = std::make_unique<Workers>(*device, workers, 0);
    Llama model(config, *device, true);
    model.allocate();
    model.initialize(WeightSource{});
    Batch batch;
    batch.rows = config.train.micro_batch, batch.seq = config.train.seq_len;
    model.evaluate(batch, nullptr, 0);
    StepSums sums(*device, model, config);
    StepPlan step;
    step.merges = config.low_rank();
    accumulate_gradients(*device, model, config, sums, {batch}, step);
    apply_gradients(*device, model, config, step, 0);
    if (step.merges) model.merge(0, nullptr);

    MemoryPlan plan;
    for (auto& [family, bytes] : model.table().families())
        if (bytes) plan.lines.push_back({family_name(family), bytes});
    plan.scratch = device->scratch_high_water();
    plan.lines.push_back({"scratch", plan.scratch});
    if (workers) {
        plan.workers = workers, plan.worker_scratch = dry_workers->scratch_high_water();
        plan.lines.push_back({"merge workers", workers * (plan.worker_scratch + Device::fork_bytes(kind))});
    }
    if (kind == DeviceKind::cuda) plan.lines.push_back({"cuBLAS workspace", kWorkspaceBytes}), plan.lines.push_back({"CUDA context and libraries (estimate)", kContextBytes});
    for (auto& line : plan.lines) plan.total += line.second;
    return plan;
}

namespace {

// The ways to do without a kept W_eff, the one with fewer FLOPs at this micro-batch first (factored below about a thousand tokens).
std::vector<std::string> without_cache(Config config) {
    auto flops = [&](const char* name) {
        config.train.effective_weights = name;
        return training_flops_per_token(config);
    };
    if (!config.low_rank()) return {"rebuilt"};
    return flops("factored") < flops("rebuilt") ? std::vector<std::string>{"factored", "rebuilt"} : std::vector<std::string>{"rebuilt", "factored"};
}

// Options that save memory, the least harmful first, each tried alone and then all together in turn; the first that fits.
std::string what_would_fit(Config config, DeviceKind kind, int64_t budget) {
    std::vector<Override> changes;
    auto offer = [&](bool applies, const char* key, const std::string& value) {
        if (applies) changes.push_back({key, value});
    };
    bool low_rank = config.low_rank();
    if (config.train.micro_batch == 0) config.train.micro_batch = 1;
    offer(config.train.micro_batch > 1, "train.micro_batch", "1");
    offer(low_rank && config.train.effective_weights == "cached", "train.effective_weights", "auto");
    offer(low_rank && config.method.projection_gradient == "full", "method.projection_gradient", "last");
    offer(kind == DeviceKind::cuda && config.train.gradients == "fp32", "train.gradients", "bf16");
    offer(config.optimizer.moments == "fp32", "optimizer.moments", "int8");
    for (int64_t rank = config.method.rank / 2; low_rank && rank >= 16; rank /= 2) offer(true, "method.rank", std::to_string(rank));
    for (int64_t length = config.train.seq_len / 2; length >= 64; length /= 2) offer(true, "train.seq_len", std::to_string(length));

    auto total = [&](const Config& c) { return plan_memory(c, kind).total; };
    auto text = [](const Override& o) { return "--" + short_name(o.key) + " " + (o.key == "train.micro_batch" ? "auto" : o.value); };
    for (const Override& change : changes) {
        Config alone = config;
        apply_override(alone, change);
        if (total(alone) <= budget) return "it fits with " + text(change);
    }
    std::map<std::string, std::string> applied;
    for (const Override& change : changes) {
        apply_override(config, change);
        applied[change.key] = text(change);
        if (total(config) > budget) continue;
        std::string list;
        for (auto& entry : applied) list += " " + entry.second;
        return "it fits with" + list;
    }
    return "no setting of rank, sequence length, moments or gradients makes it fit; choose a smaller model";
}

}  // namespace

MemoryPlan choose_plan(Config& config, DeviceKind kind, int64_t budget) {
    auto fits = [&](const MemoryPlan& plan) { return budget == 0 || plan.total <= budget; };
    int64_t most_tokens = kind == DeviceKind::cuda ? kMostTokensCuda : kMostTokensCpu;
    std::vector<int64_t> candidates;
    if (config.train.micro_batch) {
        candidates.push_back(config.train.micro_batch);
    } else {
        for (int64_t m = config.train.batch; m >= 1; --m)
            if (config.train.batch % m == 0 && (m * config.train.seq_len <= most_tokens || m == 1)) candidates.push_back(m);
    }
    MemoryPlan smallest;
    for (int64_t candidate : candidates) {
        Config trial = config;
        trial.train.micro_batch = candidate;
        std::vector<std::string> ways{config.train.effective_weights};
        bool choose_way = ways[0] == "auto";
        if (choose_way) ways = without_cache(trial);
        // W_eff made anew is cheap next to a larger micro-batch, so size comes first and the cache takes what is left.
        for (const std::string& way : ways) {
            trial.train.effective_weights = way;
            MemoryPlan plan = smallest = plan_memory(trial, kind);
            if (!fits(plan)) continue;
            config = trial;
            if (!config.low_rank()) return plan;
            if (choose_way) {
                trial.train.effective_weights = "cached";
                MemoryPlan cached = plan_memory(trial, kind);
                if (fits(cached)) plan = cached, config = trial;
            }
            // Workers come last, since they only shorten merges. A CPU has no idle cores to give them.
            if (kind != DeviceKind::cuda) return plan;
            for (int workers : {kMergeWorkers, kMergeWorkers / 2}) {
                MemoryPlan with_workers = plan_memory(config, kind, workers);
                if (fits(with_workers)) return with_workers;
            }
            return plan;
        }
    }
    throw UserError(format("does not fit: %s planned at a micro-batch of %lld sequences, %s allowed; %s", amount(smallest.total).c_str(),
                           (long long)candidates.back(), amount(budget).c_str(), what_would_fit(config, kind, budget).c_str()));
}

int64_t memory_budget(const Config& config, const Device* device) {
    if (!config.run.memory_budget.empty()) return parse_bytes(config.run.memory_budget);
    if (!device) return 0;
    // What is free now, with a margin for what libraries allocate later, and what the open device has taken already: the plan counts it.
    return int64_t(0.95 * double(device->free_bytes())) + library_bytes(device->kind());
}

std::string describe_plan(const Config& config, const MemoryPlan& plan, DeviceKind kind, int64_t budget) {
    std::string text = format("%s, %.2f M parameters, method %s", config.run.dir.c_str(), double(parameter_count(config)) / 1e6, config.method.name.c_str());
    if (config.low_rank()) text += format(", rank %lld", (long long)config.method.rank);
    text += format("\ndevice kind %s, sequence %lld, batch %lld sequences = %lld micro-batches of %lld, effective weights %s\n\n",
                   kind == DeviceKind::cuda ? "cuda" : "cpu", (long long)config.train.seq_len, (long long)config.train.batch,
                   (long long)config.micro_batches(), (long long)config.train.micro_batch, config.train.effective_weights.c_str());
    for (auto& [name, bytes] : plan.lines) text += format("  %-40s %10.4f GiB\n", name.c_str(), gib(bytes));
    text += format("  %-40s %10.4f GiB", "total", gib(plan.total));
    if (budget) text += format("   of %s allowed", amount(budget).c_str());
    return text + "\n";
}

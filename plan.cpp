// See plan.h.
#include "plan.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

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

// Adam's moments of embedding and LM head, auto resolved (parameter.cpp).
std::string embedding_moments(const Config& config) {
    const OptimizerConfig& o = config.optimizer;
    return o.embedding_moments != "auto" ? o.embedding_moments : o.moments == "int8" ? "fp32" : o.moments;
}

}  // namespace

int64_t MemoryPlan::bytes(const std::string& line) const {
    for (auto& [name, bytes] : lines)
        if (name == line) return bytes;
    return 0;
}

int64_t library_bytes(DeviceKind kind) { return kind == DeviceKind::cuda ? kWorkspaceBytes + kContextBytes : 0; }

MemoryPlan plan_memory(const Config& config, DeviceKind kind, int workers) {
    auto device = Device::open_dry(kind);
    std::unique_ptr<Workers> dry_workers;
    if (workers) dry_workers = std::make_unique<Workers>(*device, workers, 0);
    Llama model(config, *device, true);
    const int64_t before = device->allocated_bytes();
    model.allocate();
    model.initialize(WeightSource{});
    Batch batch;
    batch.rows = config.train.micro_batch, batch.seq = config.train.seq_len;
    model.evaluate(batch, nullptr, 0);
    StepSums sums(*device, model, config);
    const int64_t blocks = device->allocated_bytes() - before;
    StepPlan step;
    step.merges = config.low_rank();
    accumulate_gradients(*device, model, config, sums, {batch}, step);
    apply_gradients(*device, model, config, step, 0);
    if (step.merges) model.merge(0, nullptr);

    MemoryPlan plan;
    for (auto& [family, bytes] : model.table().families())
        if (bytes) plan.lines.push_back({family_name(family), bytes});
    int64_t families = 0;
    for (auto& line : plan.lines) families += line.second;
    plan.scratch = device->scratch_high_water();
    plan.lines.push_back({"scratch", plan.scratch});
    plan.lines.push_back({"step sums and rounding to pages", blocks - families + device->block_bytes(plan.scratch) - plan.scratch});
    if (workers) {
        plan.workers = workers, plan.worker_scratch = dry_workers->scratch_high_water();
        plan.lines.push_back({"merge workers", workers * (device->block_bytes(plan.worker_scratch) + Device::fork_bytes(kind))});
    }
    if (kind == DeviceKind::cuda) plan.lines.push_back({"cuBLAS workspace", kWorkspaceBytes}), plan.lines.push_back({"CUDA context and libraries (estimate)", kContextBytes});
    for (auto& line : plan.lines) plan.total += line.second;
    return plan;
}

namespace {

// The sizes that micro-batches can have, largest first.
std::vector<int64_t> micro_batch_sizes(const Config& config, DeviceKind kind) {
    if (config.train.micro_batch) return {config.train.micro_batch};
    int64_t most_tokens = kind == DeviceKind::cuda ? kMostTokensCuda : kMostTokensCpu;
    std::vector<int64_t> sizes;
    for (int64_t m = config.train.batch; m >= 1; --m)
        if (config.train.batch % m == 0 && (m * config.train.seq_len <= most_tokens || m == 1)) sizes.push_back(m);
    return sizes;
}

std::vector<std::string> recomputations(const Config& config, DeviceKind kind) {
    if (config.train.recompute != "auto") return {config.train.recompute};
    if (kind == DeviceKind::cpu) return {"light", "block"};  // what is kept only pushes more out of the caches
    return {"light", "none", "block"};
}

std::vector<std::string> effective_weights(const Config& config) {
    if (config.train.effective_weights != "auto") return {config.train.effective_weights};
    if (!config.low_rank()) return {"rebuilt"};
    return {"cached", "rebuilt", "factored"};
}

// The largest micro-batch that fits, with its plan. Memory rises with the micro-batch, except that a whole batch in one needs no place to sum gradients in.
class LargestThatFits {
  public:
    LargestThatFits(DeviceKind kind, int64_t budget) : kind_(kind), budget_(budget) {}

    std::optional<MemoryPlan> find(Config& config, const std::vector<int64_t>& sizes) {
        if (auto plan = fitting(config, sizes.front())) return plan;
        auto best = fitting(config, sizes.back());
        size_t low = 1, high = sizes.size() - 1;  // sizes[high] fits; before sizes[low] none does
        while (best && low < high) {
            size_t middle = (low + high) / 2;
            if (auto plan = fitting(config, sizes[middle])) best = plan, high = middle;
            else low = middle + 1;
        }
        if (best) config.train.micro_batch = sizes[high];
        return best;
    }
    // Of all plans that did not fit.
    int64_t least_total() const { return least_total_; }
    int64_t least_size() const { return least_size_; }

  private:
    std::optional<MemoryPlan> fitting(Config& config, int64_t size) {
        config.train.micro_batch = size;
        MemoryPlan plan = plan_memory(config, kind_);
        if (budget_ == 0 || plan.total <= budget_) return plan;
        if (plan.total < least_total_) least_total_ = plan.total, least_size_ = size;
        return {};
    }

    DeviceKind kind_;
    int64_t budget_, least_total_ = std::numeric_limits<int64_t>::max(), least_size_ = 0;
};

std::vector<PlannedChoice> choices_of(const Config& asked, const Config& config, int workers) {
    const TrainConfig& t = config.train;
    std::vector<PlannedChoice> all{{"train.micro_batch", std::to_string(t.micro_batch), asked.train.micro_batch == 0},
                                   {"train.recompute", t.recompute, asked.train.recompute == "auto"}};
    if (config.low_rank()) all.push_back({"train.effective_weights", t.effective_weights, asked.train.effective_weights == "auto"});
    all.push_back({"train.updates", t.updates, false});
    all.push_back({"train.gradients", t.gradients, false});
    all.push_back({"optimizer.moments", config.optimizer.moments, false});
    all.push_back({"optimizer.embedding_moments", embedding_moments(config), config.optimizer.embedding_moments == "auto"});
    all.push_back({"merge_workers", std::to_string(workers), true});
    return all;
}

}  // namespace

namespace {

// Settings changed together, as on the command line.
using Change = std::vector<Override>;

std::string option_text(const std::vector<Change>& changes) {
    std::string text;
    for (const Change& change : changes)
        for (const Override& o : change) text += " --" + short_name(o.key) + " " + o.value;
    return text;
}

Config with(Config config, const std::vector<Change>& changes) {
    for (const Change& change : changes)
        for (const Override& o : change) apply_override(config, o);
    validate_config(config);
    return config;
}

// Whether choose_plan would find something: tries the least that auto allows.
bool can_fit(Config config, DeviceKind kind, int64_t budget) {
    std::vector<int64_t> sizes = micro_batch_sizes(config, kind);
    std::vector<std::string> weights = effective_weights(config);
    if (weights.size() > 1) weights.erase(weights.begin());  // kept ones never take less
    if (sizes.size() > 1) sizes = {sizes.back(), sizes.front()};
    config.train.recompute = recomputations(config, kind).back();
    for (int64_t size : sizes)
        for (const std::string& way : weights) {
            config.train.micro_batch = size, config.train.effective_weights = way;
            if (plan_memory(config, kind).total <= budget) return true;
        }
    return false;
}

// What saves memory, the least harmful first. Later changes of a key take the place of earlier ones.
std::vector<Change> memory_savers(const Config& config, DeviceKind kind) {
    std::vector<Change> changes;
    auto offer = [&](bool applies, const Change& change) {
        if (applies) changes.push_back(change);
    };
    bool low_rank = config.low_rank(), cuda = kind == DeviceKind::cuda, per_layer = config.train.updates == "per_layer";
    const std::string embedding = embedding_moments(config);
    offer(config.train.micro_batch > 1 && !per_layer, {{"train.micro_batch", "auto"}});
    offer(config.train.recompute != "auto" && config.train.recompute != "block", {{"train.recompute", "auto"}});
    offer(low_rank && config.train.effective_weights != "auto", {{"train.effective_weights", "auto"}});
    offer(low_rank && config.method.projection_gradient == "full", {{"method.projection_gradient", "last"}});
    offer(cuda && config.train.gradients == "fp32", {{"train.gradients", "bf16"}});
    offer(config.optimizer.moments != "int8", {{"optimizer.moments", "int8"}});
    offer(cuda && low_rank && config.train.gradients != "int8" && !per_layer, {{"train.gradients", "int8"}});
    offer(embedding == "fp32", {{"optimizer.embedding_moments", "bf16"}});
    offer(embedding != "int8", {{"optimizer.embedding_moments", "int8"}});
    for (int64_t batch = config.train.batch; !per_layer && batch >= 1; batch /= 2) {
        Change change{{"train.updates", "per_layer"}, {"train.batch", std::to_string(batch)}};
        if (config.train.micro_batch) change.insert(change.begin(), {"train.micro_batch", "auto"});
        if (config.optimizer.clip > 0) change.push_back({"optimizer.clip", "0"});
        changes.push_back(change);
    }
    for (int64_t batch = config.train.batch / 2; per_layer && batch >= 1; batch /= 2)
        changes.push_back({{"train.micro_batch", "auto"}, {"train.batch", std::to_string(batch)}});
    for (int64_t rank = config.method.rank / 2; low_rank && rank >= 16; rank /= 2) offer(true, {{"method.rank", std::to_string(rank)}});
    for (int64_t length = config.train.seq_len / 2; length >= 64; length /= 2) offer(true, {{"train.seq_len", std::to_string(length)}});
    return changes;
}

// The changes with the i-th left out, or the mildest of its kind in its place, if that fits too: beside those after it, it may be more than is needed.
template <class Fits> std::vector<Change> milder(const std::vector<Change>& changes, size_t i, const std::vector<Change>& savers, Fits&& fits) {
    std::vector<Change> fewer = changes;
    fewer.erase(fewer.begin() + int64_t(i));
    if (fits(fewer)) return fewer;
    for (const Change& saver : savers) {
        if (saver.front().key != changes[i].front().key) continue;
        std::vector<Change> other = changes;
        other[i] = saver;
        if (fits(other)) return other;
    }
    return changes;
}

// One change that is enough, else the shortest list of them in the order of harm.
std::string what_would_fit(const Config& config, DeviceKind kind, int64_t budget) {
    auto fits = [&](const std::vector<Change>& changes) { return can_fit(with(config, changes), kind, budget); };
    std::vector<Change> savers = memory_savers(config, kind), applied;
    for (const Change& change : savers)
        if (fits({change})) return "it fits with" + option_text({change});
    for (const Change& change : savers) {
        auto alike = [&](const Change& other) { return other.front().key == change.front().key; };
        applied.erase(std::remove_if(applied.begin(), applied.end(), alike), applied.end());
        applied.push_back(change);
        if (!fits(applied)) continue;
        for (size_t i = applied.size(); i-- > 0;) applied = milder(applied, i, savers, fits);
        return "it fits with" + option_text(applied);
    }
    return "no setting of rank, sequence length, updates, moments or gradients makes it fit; choose a smaller model";
}

}  // namespace

MemoryPlan choose_plan(Config& config, DeviceKind kind, int64_t budget) {
    const Config asked = config;
    std::vector<int64_t> sizes = micro_batch_sizes(asked, kind);
    LargestThatFits largest(kind, budget);
    std::optional<MemoryPlan> plan;
    double least = std::numeric_limits<double>::infinity();
    for (const std::string& recompute : recomputations(asked, kind))
        for (const std::string& weights : effective_weights(asked)) {
            Config trial = asked;
            trial.train.recompute = recompute, trial.train.effective_weights = weights, trial.train.micro_batch = sizes.front();
            if (cost_per_token(trial, kind) >= least) continue;  // however much would fit
            auto found = largest.find(trial, sizes);
            double cost = found ? cost_per_token(trial, kind) : least;
            if (cost < least) least = cost, plan = found, config = trial;
        }
    if (!plan)
        throw UserError(format("does not fit: %s planned at a micro-batch of %lld sequences, %s allowed; %s", amount(largest.least_total()).c_str(),
                               (long long)largest.least_size(), amount(budget).c_str(), what_would_fit(asked, kind, budget).c_str()));
    // Workers come last, since they only shorten merges. A CPU has no idle cores to give them.
    for (int workers : {kMergeWorkers, kMergeWorkers / 2}) {
        if (kind != DeviceKind::cuda || !config.low_rank()) break;
        MemoryPlan with_workers = plan_memory(config, kind, workers);
        if (budget && with_workers.total > budget) continue;
        plan = with_workers;
        break;
    }
    plan->choices = choices_of(asked, config, plan->workers);
    return *plan;
}

int64_t memory_budget(const Config& config, const Device* device) {
    if (!config.run.memory_budget.empty()) return parse_bytes(config.run.memory_budget);
    if (!device) return 0;
    // What is free now, with a margin for what libraries allocate later, and what the open device has taken already: the plan counts it.
    return int64_t(0.95 * double(device->free_bytes())) + library_bytes(device->kind());
}

namespace {

int64_t weights_of(const MemoryPlan& plan) { return plan.bytes("frozen weights") + plan.bytes("trained weights"); }
int64_t moments_of(const MemoryPlan& plan) { return plan.bytes("optimizer moments"); }
int64_t tokens_of(const Config& config) { return config.train.micro_batch * config.train.seq_len; }
double activations_of(const Config& config, const MemoryPlan& plan) { return double(plan.bytes("activations")) / double(tokens_of(config)); }

}  // namespace

std::string describe_plan(const Config& config, const MemoryPlan& plan, DeviceKind kind, int64_t budget) {
    std::string text = format("%s, %.2f M parameters, method %s", config.run.dir.c_str(), double(parameter_count(config)) / 1e6, config.method.name.c_str());
    if (config.low_rank()) text += format(", rank %lld", (long long)config.method.rank);
    text += format("\ndevice kind %s, sequence %lld, batch %lld sequences = %lld micro-batches of %lld (%lld tokens)\n\n", kind == DeviceKind::cuda ? "cuda" : "cpu",
                   (long long)config.train.seq_len, (long long)config.train.batch, (long long)config.micro_batches(), (long long)config.train.micro_batch,
                   (long long)tokens_of(config));
    for (auto& [name, bytes] : plan.lines) text += format("  %-40s %10.4f GiB\n", name.c_str(), gib(bytes));
    text += format("  %-40s %10.4f GiB", "total", gib(plan.total));
    if (budget) text += format("   of %s allowed", amount(budget).c_str());
    text += format("\n\n  weights + optimizer %.4f GiB: weights %.4f, moments %.4f; gradients %.4f\n  activations %s a token\n\n", gib(weights_of(plan) + moments_of(plan)),
                   gib(weights_of(plan)), gib(moments_of(plan)), gib(plan.bytes("gradients")), amount(int64_t(activations_of(config, plan))).c_str());
    for (const PlannedChoice& choice : plan.choices)
        text += format("  %-30s %10s%s\n", choice.key.c_str(), choice.value.c_str(), choice.automatic ? "   (auto)" : "");
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
                      {"rank", config.low_rank() ? json(config.method.rank) : json()}, {"parameters", parameter_count(config)},
                      {"model", {{"hidden", m.hidden}, {"intermediate", m.intermediate}, {"heads", m.heads}, {"kv_heads", config.kv_heads()}, {"layers", m.layers}, {"vocab", m.vocab}}},
                      {"seq_len", config.train.seq_len}, {"batch", config.train.batch}, {"micro_batches", config.micro_batches()}, {"tokens_per_micro_batch", tokens_of(config)},
                      {"lines", lines}, {"total", plan.total}, {"budget", budget ? json(budget) : json()},
                      {"weights_bytes", weights_of(plan)}, {"moments_bytes", moments_of(plan)}, {"gradients_bytes", plan.bytes("gradients")},
                      {"weights_and_optimizer_bytes", weights_of(plan) + moments_of(plan)}, {"activation_bytes_per_token", activations_of(config, plan)},
                      {"choices", choices}};
    return plan_json.dump(2) + "\n";
}

// See plan.h.
#include "plan.h"

#include <algorithm>
#include <limits>
#include <optional>

#include "comm/communicator.h"
#include "flops.h"
#include "llama.h"
#include "plan_options.h"
#include "replica_check.h"
#include "runtime/workers.h"
#include "training_step.h"

namespace {

// The driver's context, loaded kernels and library handles: not ours to plan. On an H200 with CUDA 13.0 the measured peaks of five runs
// (60M by every method, 1B by loqt) lay 696 to 706 MiB above everything else in their plans.
constexpr int64_t kContextBytes = int64_t(700) << 20;
// Matrices whose factorizations are under way at once. More gain little: factors of a large matrix fill a GPU two or three at a time.
constexpr int kMergeWorkers = 4;

}  // namespace

int64_t MemoryPlan::bytes(const std::string& line) const {
    for (auto& [name, bytes] : lines)
        if (name == line) return bytes;
    return 0;
}

int64_t library_bytes(DeviceKind kind) { return kind == DeviceKind::cuda ? Device::kBlasWorkspaceBytes + kContextBytes : 0; }

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
    std::unique_ptr<ReplicaCheck> replicas;
    if (config.world_size > 1) replicas = std::make_unique<ReplicaCheck>(*device, model);
    const int64_t blocks = device->allocated_bytes() - before;
    StepPlan step;
    step.merges = makes_anew(config);
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
    if (config.world_size > 1 && Communicator::library_bytes(kind)) plan.lines.push_back({"NCCL (estimate)", Communicator::library_bytes(kind)});
    if (kind == DeviceKind::cuda) plan.lines.push_back({"cuBLAS workspace", Device::kBlasWorkspaceBytes}), plan.lines.push_back({"CUDA context and libraries (estimate)", kContextBytes});
    for (auto& line : plan.lines) plan.total += line.second;
    return plan;
}

namespace {

// How many threads may share the work of merges, most first. A CPU has no idle cores to give them.
std::vector<int> worker_counts(const Config& config, DeviceKind kind) {
    const MethodPolicy policy = method_policy(config);
    if (kind != DeviceKind::cuda || !policy.adapters || !policy.projects) return {0};
    return {kMergeWorkers, kMergeWorkers / 2, 0};
}

// The largest micro-batch that fits, with its plan. Memory rises with the micro-batch, except that a whole batch in one needs no place to sum gradients in.
class LargestThatFits {
  public:
    LargestThatFits(DeviceKind kind, int64_t budget) : kind_(kind), budget_(budget) {}

    std::optional<MemoryPlan> find(Config& config, const std::vector<int64_t>& sizes, int workers) {
        if (auto plan = fitting(config, sizes.front(), workers)) return plan;
        if (sizes.size() == 1) return {};
        auto best = fitting(config, sizes.back(), workers);
        size_t low = 1, high = sizes.size() - 1;  // sizes[high] fits; before sizes[low] none does
        while (best && low < high) {
            size_t middle = (low + high) / 2;
            if (auto plan = fitting(config, sizes[middle], workers)) best = plan, high = middle;
            else low = middle + 1;
        }
        if (best) config.train.micro_batch = sizes[high];
        return best;
    }
    // Of all plans that did not fit.
    int64_t least_total() const { return least_total_; }
    int64_t least_size() const { return least_size_; }

  private:
    std::optional<MemoryPlan> fitting(Config& config, int64_t size, int workers) {
        config.train.micro_batch = size;
        MemoryPlan plan = plan_memory(config, kind_, workers);
        if (budget_ == 0 || plan.total <= budget_) return plan;
        if (plan.total < least_total_) least_total_ = plan.total, least_size_ = size;
        return {};
    }

    DeviceKind kind_;
    int64_t budget_, least_total_ = std::numeric_limits<int64_t>::max(), least_size_ = 0;
};

// How gradients are really kept (parameter.cpp), where that is not as train.gradients has it.
std::string gradients_remark(const Config& config, DeviceKind kind) {
    const bool cuda = kind == DeviceKind::cuda;
    const std::string& asked = config.train.gradients;
    if (asked == "bf16") return cuda ? "" : "fp32, as all on a CPU";
    if (asked != "int8" || (config.low_rank() && config.micro_batches() > 1)) return "";
    return format("%s: %s", cuda ? "bf16" : "fp32", config.low_rank() ? "one micro-batch a step, so nothing is summed" : "8 bits are for adapters only");
}

std::vector<PlannedChoice> choices_of(const Config& asked, const Config& config, DeviceKind kind, int workers) {
    const TrainConfig& t = config.train;
    std::vector<PlannedChoice> all{{"train.micro_batch", std::to_string(t.micro_batch), asked.train.micro_batch == 0},
                                   {"train.recompute", t.recompute, asked.train.recompute == "auto"}};
    if (config.low_rank()) all.push_back({"train.effective_weights", t.effective_weights, asked.train.effective_weights == "auto"});
    all.push_back({"train.updates", t.updates, false});
    all.push_back({"train.gradients", t.gradients, false, gradients_remark(config, kind)});
    all.push_back({"optimizer.moments", config.optimizer.moments, false});
    all.push_back({"optimizer.embedding_moments", embedding_moments(config), config.optimizer.embedding_moments == "auto"});
    all.push_back({"merge_workers", std::to_string(workers), true});
    return all;
}

}  // namespace

MemoryPlan choose_plan(Config& config, DeviceKind kind, int64_t budget, bool resumed) {
    const Config asked = config;
    std::vector<int64_t> sizes = micro_batch_sizes(asked, kind);
    LargestThatFits largest(kind, budget);
    std::optional<MemoryPlan> plan;
    double least = std::numeric_limits<double>::infinity();
    for (int workers : worker_counts(asked, kind))
        for (const std::string& recompute : recomputations(asked, kind))
            for (const std::string& weights : effective_weights(asked)) {
                Config trial = asked;
                trial.train.recompute = recompute, trial.train.effective_weights = weights, trial.train.micro_batch = sizes.front();
                if (cost_per_token(trial, kind, workers) >= least) continue;  // however much would fit
                auto found = largest.find(trial, sizes, workers);
                double cost = found ? cost_per_token(trial, kind, workers) : least;
                if (cost < least) least = cost, plan = found, config = trial;
            }
    if (!plan)
        throw UserError(format("does not fit: %s planned for %s at a micro-batch of %lld, %s allowed; %s", amount(largest.least_total()).c_str(), kind == DeviceKind::cuda ? "a GPU" : "the CPU",
                               (long long)largest.least_size(), amount(budget).c_str(), what_would_fit(asked, kind, budget, resumed).c_str()));
    plan->choices = choices_of(asked, config, kind, plan->workers);
    return *plan;
}

int64_t memory_budget(const Config& config, const Device* device) {
    if (!config.run.memory_budget.empty()) return parse_bytes(config.run.memory_budget);
    if (!device) return 0;
    // What is free now, with a margin for what libraries allocate later, and what the open device has taken already: the plan counts it.
    const int64_t taken = library_bytes(device->kind()) + (device->communicator() ? Communicator::library_bytes(device->kind()) : 0);
    // The processes of a run on CPUs are taken to share one machine.
    const int64_t sharers = device->is_cuda() ? 1 : config.world_size;
    return int64_t(0.95 * double(device->free_bytes()) / double(sharers)) + taken;
}

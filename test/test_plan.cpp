// The memory plan: its books against the tensor table's definition, and advice that is true.
#include "plan.h"

#include <sstream>

#include "flops.h"
#include "llama.h"
#include "ops/embedding.h"
#include "runtime/workers.h"
#include "test/support.h"
#include "training_step.h"
#include "weight_source.h"

namespace {

Config preset(const std::string& name) {
    Config c;
    read_config_file(c, "configs/" + name + ".json");
    validate_config(c);
    return c;
}

double gib_of(const MemoryPlan& plan, const std::string& line) {
    for (auto& [name, bytes] : plan.lines)
        if (name == line) return double(bytes) / double(int64_t(1) << 30);
    return 0;
}

}  // namespace

TEST_CASE("plan: weights and moments of the 7B preset agree with the sums in docs/algorithm", "[plan]") {
    // lin, P, B and E of a LLaMA 7B at rank 1024; q = 0.515869 bytes per NF4 weight with double quantization.
    const double lin = 6476005376.0, p = 939524096.0, b = 1619001344.0, e = 262410240.0, q = 0.515869, gib = double(int64_t(1) << 30);
    Config c = preset("7b");
    c.train.micro_batch = 1;
    MemoryPlan plan = plan_memory(c, DeviceKind::cuda);
    CHECK(gib_of(plan, "frozen weights") == Approx(q * (lin + p) / gib).epsilon(1e-3));
    CHECK(gib_of(plan, "trained weights") == Approx(2 * (b + e) / gib).epsilon(1e-3));
    CHECK(gib_of(plan, "gradients") == Approx(2 * (b + e) / gib).epsilon(1e-3));
    CHECK(gib_of(plan, "optimizer moments") == Approx((2.03125 * b + 8 * e) / gib).epsilon(1e-3));
    int64_t total = 0;
    for (auto& line : plan.lines) total += line.second;
    CHECK(total == plan.total);
}

TEST_CASE("plan: auto takes the largest micro-batch that fits", "[plan]") {
    for (const char* name : {"60m", "350m", "1b"})
        for (int64_t budget : {int64_t(16) << 30, int64_t(24) << 30, int64_t(80) << 30}) {
            Config c = preset(name);
            MemoryPlan plan = choose_plan(c, DeviceKind::cuda, budget);
            INFO(name << " budget " << budget << " micro-batch " << c.train.micro_batch);
            CHECK(plan.total <= budget);
            CHECK(c.train.batch % c.train.micro_batch == 0);
            Config larger = preset(name);
            larger.train.micro_batch = 2 * c.train.micro_batch;
            if (larger.train.micro_batch <= larger.train.batch) CHECK(plan_memory(larger, DeviceKind::cuda).total > budget);
        }
}

TEST_CASE("plan: what it says would fit does fit", "[plan]") {
    int advised = 0;
    for (const char* name : {"60m", "130m", "1b", "7b", "13b"})
        for (double gib : {0.9, 1.5, 4.0, 8.0, 24.0}) {
            Config c = preset(name);
            int64_t budget = int64_t(gib * double(int64_t(1) << 30));
            try {
                choose_plan(c, DeviceKind::cuda, budget);
            } catch (const UserError& error) {
                std::string message = error.what();
                size_t at = message.find("it fits with ");
                if (at == std::string::npos) continue;
                std::istringstream words(message.substr(at + 13));
                Config changed = preset(name);
                for (std::string option, value; words >> option >> value;) apply_override(changed, {option.substr(2), value});
                INFO(message);
                CHECK_NOTHROW(choose_plan(changed, DeviceKind::cuda, budget));
                ++advised;
            }
        }
    CHECK(advised >= 4);
}

TEST_CASE("plan: effective weights are kept where they fit, else in the form that needs fewer FLOPs", "[plan]") {
    auto way = [](const char* name, int64_t micro_batch, double gib) {
        Config c = preset(name);
        c.train.micro_batch = micro_batch;
        choose_plan(c, DeviceKind::cuda, int64_t(gib * double(int64_t(1) << 30)));
        return c.train.effective_weights;
    };
    CHECK(way("60m", 64, 40) == "cached");
    // 7B in 24 GiB has no room for 12 GiB of effective weights; 2,048 tokens are below m·n/(m+n) of its MLP, 2,985 (docs/algorithm.md).
    CHECK(way("7b", 8, 24) == "factored");
    CHECK(way("1b", 1, 13) == "factored");
    CHECK(way("1b", 16, 17) == "rebuilt");
    Config full = preset("60m");
    full.method.name = "full", full.train.micro_batch = 64;
    choose_plan(full, DeviceKind::cuda, 0);
    CHECK(full.train.effective_weights == "rebuilt");
}

TEST_CASE("plan: merges have four workers where they fit, else two, else none", "[plan]") {
    auto workers = [](DeviceKind kind, int64_t budget) {
        Config c = preset("1b");
        c.train.micro_batch = 8, c.train.effective_weights = "rebuilt";
        return choose_plan(c, kind, budget).workers;
    };
    Config c = preset("1b");
    c.train.micro_batch = 8, c.train.effective_weights = "rebuilt";
    int64_t alone = plan_memory(c, DeviceKind::cuda).total, two = plan_memory(c, DeviceKind::cuda, 2).total, four = plan_memory(c, DeviceKind::cuda, 4).total;
    CHECK(alone < two);
    CHECK(two - alone < four - alone);
    CHECK(workers(DeviceKind::cuda, 0) == 4);
    CHECK(workers(DeviceKind::cuda, four) == 4);
    CHECK(workers(DeviceKind::cuda, four - 1) == 2);
    CHECK(workers(DeviceKind::cuda, two - 1) == 0);
    CHECK(workers(DeviceKind::cpu, 0) == 0);
}

TEST_CASE("plan: a merge by workers stays within the scratch planned for them", "[plan]") {
    Config c = preset("tiny");
    c.train.batch = c.train.micro_batch = 2, c.train.seq_len = 32;
    for (const char* projection : {"gram", "subspace"}) {
        INFO(projection);
        c.method.projection = projection;
        MemoryPlan plan = plan_memory(c, DeviceKind::cpu, 2);
        auto device = Device::open("cpu");
        Llama model(c, *device, true);
        model.allocate();
        device->reserve_scratch(plan.scratch);
        Workers workers(*device, plan.workers, plan.worker_scratch);  // exactly what was planned: one byte more is an error
        WeightSource source = random_weights(c);
        model.initialize(source);
        StepSums sums(*device, model, c);
        std::mt19937_64 rng(3);
        for (int64_t step = 0; step < 3; ++step) {
            Batch batch;
            batch.rows = 2, batch.seq = 32, batch.valid_targets = 64;
            for (int i = 0; i < 64; ++i) batch.tokens.push_back(int32_t(rng() % uint64_t(c.model.vocab))), batch.targets.push_back(int32_t(rng() % uint64_t(c.model.vocab)));
            batch.groups = group_tokens(batch.tokens.data(), 64, c.model.vocab);
            StepPlan step_plan;
            step_plan.step = step, step_plan.merges = true, step_plan.source = step ? nullptr : &source;
            accumulate_gradients(*device, model, c, sums, {batch}, step_plan);
            MergeStatistics merged = model.merge(step, step_plan.source);
            CHECK(merged.failed == 0);
        }
        CHECK(workers.scratch_high_water() <= plan.worker_scratch);
        CHECK(workers.scratch_high_water() > 0);
    }
}

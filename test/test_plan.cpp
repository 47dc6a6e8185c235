// The memory plan: its books against the tensor table's definition, and advice that is true.
#include "plan.h"

#include <algorithm>
#include <nlohmann/json.hpp>
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

const double kGiB = double(int64_t(1) << 30);
int64_t gibibytes(double amount) { return int64_t(amount * kGiB); }
double gib_of(const MemoryPlan& plan, const std::string& line) { return double(plan.bytes(line)) / kGiB; }

// What "it fits with --a x --b y" advises, as overrides; none if the message gives no advice.
std::vector<Override> advice(const std::string& message) {
    std::vector<Override> list;
    size_t at = message.find("it fits with ");
    if (at == std::string::npos) return list;
    std::istringstream words(message.substr(at + 13));
    for (std::string option, value; words >> option >> value;) list.push_back({option.substr(2), value});
    return list;
}

Config changed(Config c, const std::vector<Override>& list) {
    for (const Override& o : list) apply_override(c, o);
    validate_config(c);
    return c;
}

// "" if a plan is found, else why not.
std::string refusal(Config c, DeviceKind kind, int64_t budget) {
    try {
        MemoryPlan plan = choose_plan(c, kind, budget);
        CHECK(plan.total <= budget);
        return "";
    } catch (const UserError& error) {
        return error.what();
    }
}

}  // namespace

TEST_CASE("plan: weights, gradients and moments of 7B and 13B agree with the sums in docs/algorithm", "[plan]") {
    // lin, P, B and E of LLaMA at rank 1024; q = 0.515869 bytes per NF4 weight with double quantization.
    struct Sums {
        const char* name;
        double lin, p, b, e;
    };
    const double q = 0.515869;
    for (const Sums& m : {Sums{"7b", 6476005376.0, 939524096.0, 1619001344.0, 262410240.0}, Sums{"13b", 12687769600.0, 1468006400.0, 2537553920.0, 328094720.0}}) {
        INFO(m.name);
        const Config paper = changed(preset(m.name), {{"micro_batch", "1"}, {"gradients", "bf16"}, {"moments", "int8"}, {"embedding_moments", "auto"}});
        Config c = paper;
        MemoryPlan plan = plan_memory(c, DeviceKind::cuda);
        CHECK(gib_of(plan, "frozen weights") == Approx(q * (m.lin + m.p) / kGiB).epsilon(1e-3));
        CHECK(gib_of(plan, "trained weights") == Approx(2 * (m.b + m.e) / kGiB).epsilon(1e-3));
        CHECK(gib_of(plan, "gradients") == Approx(2 * (m.b + m.e) / kGiB).epsilon(1e-3));
        CHECK(gib_of(plan, "optimizer moments") == Approx((2.03125 * m.b + 8 * m.e) / kGiB).epsilon(1e-3));
        CHECK(plan.bytes("no such line") == 0);
        int64_t total = 0;
        for (auto& line : plan.lines) total += line.second;
        CHECK(total == plan.total);
        for (auto [moments, bytes] : {std::pair<const char*, double>{"bf16", 4}, {"int8", 2.03125}}) {
            c.optimizer.embedding_moments = moments;
            CHECK(gib_of(plan_memory(c, DeviceKind::cuda), "optimizer moments") == Approx((2.03125 * m.b + bytes * m.e) / kGiB).epsilon(1e-3));
        }
        c = paper;
        c.train.gradients = "int8";  // an 8-bit code and 1/64 of a scale per element of B
        CHECK(gib_of(plan_memory(c, DeviceKind::cuda), "gradients") == Approx((1.0 * m.b + 2 * m.e) / kGiB).epsilon(3e-2));
        c = changed(paper, {{"updates", "per_layer"}, {"clip", "0"}, {"batch", "1"}});
        CHECK(gib_of(plan_memory(c, DeviceKind::cuda), "gradients") < 0.6);  // the largest tensor: the embedding
    }
}

TEST_CASE("plan: weights and optimizer states of 60M to 1B are those of the paper's Table 1", "[plan]") {
    // Two bf16 moments, no gradients, in units of 1000 MiB: how the published figures come about.
    const std::pair<const char*, std::pair<double, double>> published[] = {{"60m", {0.238, 0.279}}, {"130m", {0.493, 0.637}}, {"350m", {0.978, 1.469}}, {"1b", {3.159, 5.118}}};
    for (auto& [name, figures] : published)
        for (bool quantized : {true, false}) {
            INFO(name << (quantized ? " loqt" : " loqt-nq"));
            Config c = preset(name);
            c.train.micro_batch = 1, c.optimizer.moments = "bf16", c.method.name = quantized ? "loqt" : "loqt-nq";
            auto json = nlohmann::json::parse(plan_to_json(c, plan_memory(c, DeviceKind::cuda), DeviceKind::cuda, 0));
            CHECK(json["weights_and_optimizer_bytes"].get<double>() / 1048576e3 == Approx(quantized ? figures.first : figures.second).epsilon(0.01));
        }
}

TEST_CASE("plan: no other choice that fits is cheaper", "[plan]") {
    for (auto [name, gib] : {std::pair<const char*, double>{"60m", 3}, {"60m", 24}, {"350m", 9}, {"1b", 16}, {"1b", 24}, {"7b", 22}}) {
        const int64_t budget = gibibytes(gib);
        Config chosen = preset(name);
        MemoryPlan plan = choose_plan(chosen, DeviceKind::cuda, budget);
        INFO(name << " in " << gib << " GiB: micro-batch " << chosen.train.micro_batch << ", " << chosen.train.recompute << ", " << chosen.train.effective_weights);
        CHECK(plan.total <= budget);
        CHECK(chosen.train.batch % chosen.train.micro_batch == 0);
        double least = cost_per_token(chosen, DeviceKind::cuda, plan.workers);
        int fitting = 0;
        for (int workers : {0, 2, 4})
            for (const char* recompute : {"none", "light", "block"})
                for (const char* weights : {"cached", "rebuilt", "factored"})
                    for (int64_t m = 1; m <= 512; m *= 2) {
                        Config other = preset(name);
                        other.train.recompute = recompute, other.train.effective_weights = weights, other.train.micro_batch = m;
                        if (plan_memory(other, DeviceKind::cuda, workers).total > budget) continue;
                        ++fitting;
                        CHECK(cost_per_token(other, DeviceKind::cuda, workers) >= least);
                    }
        CHECK(fitting > 3);
    }
}

TEST_CASE("plan: more memory never makes a slower plan", "[plan]") {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (DeviceKind kind : {DeviceKind::cuda, DeviceKind::cpu})
        for (const char* name : {"60m", "1b"}) {
            double slowest = INFINITY;
            double gib = name == std::string("60m") ? 1.2 : 8;
            for (int i = 0; i < 12; ++i, gib *= 1.15 + 0.2 * double(rng() % 1000) / 1000) {
                Config c = preset(name);
                c.method.projection_gradient = "last";
                MemoryPlan plan;
                try {
                    plan = choose_plan(c, kind, gibibytes(gib));
                } catch (const UserError&) {
                    CHECK(slowest == INFINITY);  // what fits goes on fitting
                    continue;
                }
                double cost = cost_per_token(c, kind, plan.workers);
                INFO(name << " in " << gib << " GiB: micro-batch " << c.train.micro_batch << ", " << c.train.recompute << ", " << c.train.effective_weights);
                CHECK(plan.total <= gibibytes(gib));
                CHECK(cost <= slowest);
                slowest = cost;
            }
            CHECK(slowest < INFINITY);
        }
}

TEST_CASE("plan: 60M on a large GPU runs its whole batch at once with kept effective weights", "[plan]") {
    for (double gib : {24, 40, 140}) {
        Config c = preset("60m");
        choose_plan(c, DeviceKind::cuda, gibibytes(gib));
        CHECK(c.train.micro_batch == 512);
        CHECK(c.train.effective_weights == "cached");
        CHECK(c.train.recompute != "block");
    }
}

TEST_CASE("plan: block recompute takes less than light, light less than none", "[plan]") {
    for (const char* name : {"60m", "1b", "7b", "13b"})
        for (const char* weights : {"rebuilt", "factored"}) {
            INFO(name << " " << weights);
            Config c = preset(name);
            c.train.micro_batch = 8, c.train.effective_weights = weights;
            auto total = [&](const char* recompute) {
                c.train.recompute = recompute;
                return plan_memory(c, DeviceKind::cuda).total;
            };
            CHECK(total("block") < total("light"));
            CHECK(total("light") < total("none"));
            CHECK(total("auto") == total("light"));  // a model that nobody planned
        }
}

TEST_CASE("plan: what it says would fit does fit, and nothing less does", "[plan]") {
    int advised = 0;
    auto try_advice = [&](const Config& c, DeviceKind kind, double gib) {
        std::string message = refusal(c, kind, gibibytes(gib));
        std::vector<Override> list = advice(message);
        if (list.empty()) return;
        INFO(gib << " GiB: " << message);
        ++advised;
        CHECK(refusal(changed(c, list), kind, gibibytes(gib)) == "");
        const std::string together = " micro_batch updates batch clip ";  // one change
        auto one = [&](const Override& a, const Override& b) {
            return a.key == b.key || (together.find(' ' + a.key + ' ') != std::string::npos && together.find(' ' + b.key + ' ') != std::string::npos);
        };
        for (const Override& left_out : list) {
            std::vector<Override> fewer = list;
            fewer.erase(std::remove_if(fewer.begin(), fewer.end(), [&](const Override& o) { return one(o, left_out); }), fewer.end());
            CHECK(refusal(changed(c, fewer), kind, gibibytes(gib)) != "");
        }
    };
    for (const char* name : {"60m", "130m", "1b"})
        for (double gib : {0.9, 1.5, 3.0, 4.0, 5.0, 8.0}) try_advice(preset(name), DeviceKind::cuda, gib);
    for (const char* name : {"7b", "13b"})
        for (double gib : {12, 16, 20, 24, 40}) try_advice(preset(name), DeviceKind::cuda, gib);
    try_advice(changed(preset("7b"), {{"clip", "1"}, {"micro_batch", "64"}, {"effective_weights", "cached"}, {"recompute", "none"}}), DeviceKind::cuda, 15);
    try_advice(changed(preset("13b"), {{"updates", "per_layer"}}), DeviceKind::cuda, 20);
    try_advice(changed(preset("1b"), {{"gradients", "fp32"}}), DeviceKind::cpu, 9);
    CHECK(advised >= 6);
}

TEST_CASE("plan: the least harmful change comes first", "[plan]") {
    auto first = [](const Config& c, double gib) {
        auto list = advice(refusal(c, DeviceKind::cuda, gibibytes(gib)));
        return list.empty() ? "" : list[0].key + " " + list[0].value;
    };
    CHECK(first(changed(preset("60m"), {{"micro_batch", "512"}}), 4) == "micro_batch auto");
    CHECK(first(changed(preset("7b"), {{"effective_weights", "cached"}, {"recompute", "block"}}), 20) == "effective_weights auto");
    // How numbers are kept comes before projections from the last micro-batch, all of both before what is trained.
    CHECK(first(preset("1b"), 11) == "moments int8");
    CHECK(first(preset("1b"), 8) == "projection_gradient last");
    auto all = [](const Config& c, double gib) {
        std::string text;
        for (const Override& o : advice(refusal(c, DeviceKind::cuda, gibibytes(gib)))) text += " " + o.key + " " + o.value;
        return text;
    };
    CHECK(all(preset("1b"), 10) == " gradients bf16 moments int8");
    CHECK(all(preset("7b"), 12) == " gradients int8 rank 512");  // not a quarter of the rank alone
    CHECK(all(changed(preset("7b"), {{"method", "lora"}}), 24) == " method qlora");
    CHECK(first(changed(preset("1b"), {{"projection_gradient", "last"}}), 7.2) == "gradients bf16");
    CHECK(first(changed(preset("7b"), {{"method", "full"}}), 24) == "method loqt");
    CHECK(first(preset("13b"), 22) == "rank 512");  // it does not clip
    CHECK(first(changed(preset("7b"), {{"gradients", "int8"}, {"embedding_moments", "bf16"}}), 14.6) == "clip 0");
    // galore has a rank of its own to lower before it becomes another method.
    const Config galore = changed(preset("1b"), {{"method", "galore"}, {"gradients", "bf16"}, {"moments", "int8"}, {"embedding_moments", "bf16"}});
    CHECK(first(galore, 7) == "rank 256");
    CHECK(first(galore, 6) == "method loqt");
}

TEST_CASE("plan: advice for a run to be resumed is what --resume may change", "[plan]") {
    int advised = 0;
    for (double gib : {12, 10, 8, 7, 6, 5, 1}) {
        Config c = changed(preset("1b"), {{"micro_batch", "32"}, {"recompute", "light"}, {"effective_weights", "cached"}});
        const Config asked = c;
        std::string message;
        try {
            choose_plan(c, DeviceKind::cuda, gibibytes(gib), true);
        } catch (const UserError& error) {
            message = error.what();
        }
        INFO(gib << " GiB: " << message);
        std::vector<Override> list = advice(message);
        if (list.empty()) CHECK(message.find("nothing that --resume may change") != std::string::npos);
        else ++advised;
        for (const std::string& difference : config_differences(asked, changed(asked, list))) CHECK_FALSE(fixed_for_resume(difference.substr(0, difference.find(':'))));
        if (!list.empty()) CHECK(refusal(changed(asked, list), DeviceKind::cuda, gibibytes(gib)) == "");
    }
    CHECK(advised > 0);
    CHECK(advised < 7);
}

TEST_CASE("plan: says what was chosen and by whom", "[plan]") {
    Config c = changed(preset("7b"), {{"recompute", "light"}, {"run.dir", "runs/x"}});
    MemoryPlan plan = choose_plan(c, DeviceKind::cuda, gibibytes(24));
    auto json = nlohmann::json::parse(plan_to_json(c, plan, DeviceKind::cuda, gibibytes(24)));
    auto choice = [&](const char* key) { return json["choices"][key]["value"].dump() + (json["choices"][key]["auto"].get<bool>() ? " auto" : ""); };
    CHECK(choice("train.micro_batch") == std::to_string(c.train.micro_batch) + " auto");
    CHECK(choice("train.recompute") == "\"light\"");
    CHECK(choice("train.effective_weights") == '"' + c.train.effective_weights + "\" auto");
    CHECK(choice("train.updates") == "\"ordinary\"");
    CHECK(choice("train.gradients") == "\"bf16\"");
    CHECK(choice("optimizer.moments") == "\"int8\"");
    CHECK(choice("optimizer.embedding_moments") == "\"fp32\" auto");
    CHECK(choice("merge_workers") == std::to_string(plan.workers) + " auto");
    int64_t sum = 0;
    for (auto& line : json["lines"]) sum += line["bytes"].get<int64_t>();
    CHECK(sum == json["total"].get<int64_t>());
    CHECK(json["total"].get<int64_t>() == plan.total);
    CHECK(json["budget"].get<int64_t>() == gibibytes(24));
    CHECK(json["tokens_per_micro_batch"].get<int64_t>() == 256 * c.train.micro_batch);
    CHECK(json["activation_bytes_per_token"].get<double>() == Approx(2.85e6).epsilon(0.06));  // docs/algorithm: minimal without recomputed products
    CHECK(json["weights_bytes"].get<int64_t>() + json["moments_bytes"].get<int64_t>() == json["weights_and_optimizer_bytes"].get<int64_t>());
    std::string text = describe_plan(c, plan, DeviceKind::cuda, gibibytes(24));
    for (auto& line : plan.lines) CHECK(text.find(line.first) != std::string::npos);
    for (const PlannedChoice& each : plan.choices) CHECK(text.find(each.key) != std::string::npos);
    CHECK(nlohmann::json::parse(plan_to_json(c, plan, DeviceKind::cuda, 0))["budget"].is_null());
    for (const char* method : {"full", "galore", "lora"}) {
        c.method.name = method;
        const bool ranked = method != std::string("full");
        CHECK(nlohmann::json::parse(plan_to_json(c, plan, DeviceKind::cuda, 0))["rank"] == (ranked ? nlohmann::json(c.method.rank) : nlohmann::json()));
        CHECK((describe_plan(c, plan, DeviceKind::cuda, 0).find(", rank ") != std::string::npos) == ranked);
    }
}

TEST_CASE("a device holds to its limit, forks and their libraries included", "[plan]") {
    for (bool dry : {true, false}) {
        auto device = dry ? Device::open_dry(DeviceKind::cuda) : Device::open("cpu");
        const int64_t fork_bytes = Device::fork_bytes(device->kind()), block = device->block_bytes(1);
        CHECK(block == (dry ? 2 << 20 : 256));
        CHECK(device->block_bytes(0) == block);
        CHECK(device->block_bytes(3 * block) == 3 * block);
        CHECK(device->block_bytes(3 * block + 1) == 4 * block);
        device->limit_memory(fork_bytes + 20 * block);
        CHECK(device->allowed_bytes() <= fork_bytes + 20 * block);
        void* first = device->allocate(4 * block - 1, "first");
        CHECK(device->allocated_bytes() == 4 * block);
        {
            auto fork = device->fork();
            CHECK(device->allocated_bytes() == 4 * block + fork_bytes);
            fork->reserve_scratch(8 * block);
            CHECK_THROWS_WITH(fork->allocate(8 * block + 1, "the last straw"), ContainsSubstring("the last straw") && ContainsSubstring("allowed"));
            CHECK_THROWS_AS(device->allocate(8 * block + 1, "the last straw"), UserError);
            CHECK(device->allocated_bytes() == 12 * block + fork_bytes);
            if (fork_bytes) CHECK_THROWS_AS(device->fork(), UserError);
        }
        CHECK(device->allocated_bytes() == (dry ? 12 : 4) * block);  // a dry device gives only its libraries back
        if (dry) continue;
        device->release(first);
        CHECK(device->allocated_bytes() == 0);
        first = device->allocate(20 * block, "all of it");
        CHECK_THROWS_AS(device->allocate(1, "one more"), UserError);
        device->release(first);
    }
}

TEST_CASE("plan: a run needs no byte more than planned", "[plan]") {
    for (const char* weights : {"cached", "factored"})
        for (const char* recompute : {"none", "light", "block"}) {
            INFO(weights << " " << recompute);
            Config c = preset("tiny");
            c.train.batch = 4, c.train.micro_batch = 2, c.train.seq_len = 32, c.train.effective_weights = weights, c.train.recompute = recompute;
            MemoryPlan plan = choose_plan(c, DeviceKind::cpu, 0);
            auto device = Device::open("cpu");
            device->limit_memory(plan.total);
            Llama model(c, *device, true);
            model.allocate();
            device->reserve_scratch(plan.scratch);
            StepSums sums(*device, model, c);
            CHECK(device->allocated_bytes() == plan.total);
        }
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
        c.train.micro_batch = 8, c.train.effective_weights = "rebuilt", c.train.recompute = "light";
        return choose_plan(c, kind, budget).workers;
    };
    Config c = preset("1b");
    c.train.micro_batch = 8, c.train.effective_weights = "rebuilt", c.train.recompute = "light";
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

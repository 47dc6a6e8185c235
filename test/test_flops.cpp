// FLOP counts against the books of a profiler and a model's own tensors; peaks of GPUs by name and by measurement.
#include "flops.h"

#include <tuple>

#include "runtime/profile.h"
#include "test/model_fixture.h"
#include "training_step.h"

namespace {

// Products of one optimizer step of a model that has merged once, attention aside: in units of one token.
double booked_flops_per_token(const Config& config) {
    auto device = test_device("cpu");
    SmallModel small(*device, config, random_weights(config));
    std::vector<Batch> batches(config.micro_batches());
    for (Batch& b : batches) {
        b.rows = config.train.micro_batch, b.seq = config.train.seq_len;
        b.tokens.assign(b.rows * b.seq, 3), b.targets.assign(b.rows * b.seq, 5);
        b.tokens[1] = 7, b.targets[0] = 7;
        b.valid_targets = b.rows * b.seq;
        b.groups = group_tokens(b.tokens.data(), b.rows * b.seq, config.model.vocab);
    }
    auto step = [&](int64_t number, bool merges) {
        StepPlan plan;
        plan.step = number, plan.lr = 1e-3, plan.merges = merges;
        StepGradients gradients = accumulate_gradients(*device, small.model, config, small.sums, batches, plan);
        apply_gradients(*device, small.model, config, plan, gradients.norm);
        if (merges) small.model.merge(number, nullptr);
    };
    step(0, makes_anew(config));
    Profiler profiler(*device);
    step(1, false);
    double flops = 0;
    for (const OperationProfile& p : profiler.take())
        if (p.name.rfind("attention", 0) != 0) flops += p.flops;
    return flops / double(config.train.batch * config.train.seq_len);
}

Config tiny_config(const std::string& method, const std::string& effective, int64_t micro_batch, int64_t kv_heads) {
    Config c;
    read_config_file(c, "configs/tiny.json");
    c.method.name = method, c.method.compensation_rounds = 1;
    c.model.kv_heads = kv_heads;
    c.train.effective_weights = effective, c.train.seq_len = 64, c.train.batch = 4, c.train.micro_batch = micro_batch;
    validate_config(c);
    return c;
}

}  // namespace

TEST_CASE("FLOPs per token are those of a real step's products", "[flops]") {
    for (const char* recompute : {"none", "light", "block"})
        for (auto [method, effective] : {std::pair<const char*, const char*>{"full", "cached"}, {"loqt", "cached"}, {"loqt", "rebuilt"}, {"loqt", "factored"}, {"loqt-nq", "rebuilt"}, {"lora", "cached"}, {"qlora", "factored"}, {"galore", "cached"}})
            for (auto [kv_heads, micro_batch] : {std::pair<int64_t, int64_t>{1, 2}, {2, 4}}) {
                if (kv_heads == 2 && recompute != std::string("light")) continue;
                INFO(method << ", effective weights " << effective << ", micro-batch " << micro_batch << ", kv heads " << kv_heads << ", recompute " << recompute);
                Config c = tiny_config(method, effective, micro_batch, kv_heads);
                c.train.recompute = recompute, c.model.layers = 2;
                // Causal attention in the convention of the FlashAttention papers: half of 4·S·h forward, 2.5 times that backward.
                double forward = double(c.model.layers) * 2.0 * double(c.train.seq_len * c.model.hidden);
                double attention = (recompute == std::string("block") ? 4.0 : 3.5) * forward;  // again in the first of two blocks
                CHECK(booked_flops_per_token(c) == Approx(machine_flops_per_token(c) - attention).epsilon(1e-12));
            }
}

TEST_CASE("what is made again is no work that MFU credits", "[flops]") {
    for (const char* effective : {"cached", "rebuilt", "factored"}) {
        INFO(effective);
        Config none = tiny_config("loqt", effective, 2, 2), light = none, block = none;
        none.train.recompute = "none", light.train.recompute = "light", block.train.recompute = "block";
        CHECK(training_flops_per_token(none) == training_flops_per_token(light));
        CHECK(training_flops_per_token(none) == training_flops_per_token(block));
        CHECK(machine_flops_per_token(none) == training_flops_per_token(none));
        CHECK((machine_flops_per_token(light) > machine_flops_per_token(none)) == (effective == std::string("factored")));
        CHECK(machine_flops_per_token(block) > machine_flops_per_token(light));
    }
}

TEST_CASE("cost per token: known orders of the ways to train", "[flops]") {
    auto cost = [](const char* name, const char* recompute, const char* weights, int64_t micro_batch, DeviceKind kind = DeviceKind::cuda) {
        Config c;
        read_config_file(c, std::string("configs/") + name + ".json");
        c.train.recompute = recompute, c.train.effective_weights = weights, c.train.micro_batch = micro_batch;
        validate_config(c);
        return cost_per_token(c, kind);
    };
    for (DeviceKind kind : {DeviceKind::cuda, DeviceKind::cpu})
        for (const char* name : {"60m", "1b", "7b", "13b"})
            for (int64_t m = 1; m <= 512; m *= 2) {
                INFO(name << " micro-batch " << m);
                for (const char* weights : {"cached", "rebuilt", "factored"}) {
                    INFO(weights);
                    CHECK(cost(name, "none", weights, m, kind) < cost(name, "light", weights, m, kind));
                    CHECK(cost(name, "light", weights, m, kind) < cost(name, "block", weights, m, kind));
                    if (m > 1) CHECK(cost(name, "light", weights, m, kind) <= cost(name, "light", weights, m / 2, kind));
                }
                CHECK(cost(name, "light", "cached", m, kind) < cost(name, "light", "rebuilt", m, kind));
            }
    // Steps measured on an H200 (bench/README.md), where large products run at 690 TFLOP/s.
    for (auto [name, m, rate] : {std::tuple<const char*, int64_t, double>{"60m", 512, 1872019}, {"130m", 512, 799479}, {"350m", 256, 288332}, {"1b", 256, 90404}}) {
        INFO(name);
        CHECK(690e12 / cost(name, "light", "cached", m) == Approx(rate).epsilon(0.1));
    }
    Config c = tiny_config("loqt", "rebuilt", 2, 2);
    CHECK(cost_per_token(c, DeviceKind::cuda, 4) < cost_per_token(c, DeviceKind::cuda, 2));
    CHECK(cost_per_token(c, DeviceKind::cuda, 2) < cost_per_token(c, DeviceKind::cuda));
    // Merges count as often as they are scheduled: gaps that grow make them rarer, the longer the run.
    auto merging = [&](double growth, int64_t steps) {
        Config m = c;
        m.method.merge_gap = 25, m.method.merge_growth = growth, m.train.steps = steps;
        return cost_per_token(m, DeviceKind::cuda) - cost_per_token(c, DeviceKind::cuda);
    };
    c.method.merge_gap = 1 << 20, c.train.steps = 1 << 30;  // one in a million steps
    CHECK(merging(0, 25 * 40) / merging(0, 25 * 4) == Approx(39.0 / 40 / (3.0 / 4)).epsilon(1e-3));
    CHECK(merging(1.5, 10000) < 0.1 * merging(0, 10000));
    // T* = b·m·n/(d_small + 2·d_large), 2,730 to 3,450 tokens for 7B: below it factors, far above it the product.
    CHECK(cost("7b", "light", "factored", 4) < cost("7b", "light", "rebuilt", 4));
    CHECK(cost("7b", "light", "rebuilt", 32) < cost("7b", "light", "factored", 32));
    // Blocks made again cost a third of the products; ten times the tokens per micro-batch are worth more where those are few.
    CHECK(cost("13b", "block", "rebuilt", 64) < cost("13b", "light", "factored", 1));
    CHECK(cost("60m", "light", "cached", 256) < cost("60m", "block", "cached", 512));
}

TEST_CASE("cost per token: gradients of a trained P cost as those of B do", "[flops]") {
    // Of bf16 sums, read and written by way of fp32, 12 bytes an element and micro-batch; of fp32 sums 8. 180 FLOPs a byte.
    auto traffic = [](const char* method) {
        Config c;
        read_config_file(c, "configs/60m.json");
        c.method.name = method, c.train.effective_weights = "rebuilt", c.train.recompute = "light", c.train.micro_batch = 64;
        validate_config(c);
        Config narrow = c;
        narrow.train.gradients = "bf16";
        const double tokens = 64.0 * 256.0;
        return (cost_per_token(narrow, DeviceKind::cuda) - cost_per_token(c, DeviceKind::cuda)) * tokens / (180.0 * 4.0);
    };
    const double h = 512, f = 1376, layers = 8, rank = 128, b = layers * (4 * h + 3 * f) * rank, p = layers * 7 * h * rank;
    for (const char* method : {"loqt", "loqt-nq"}) CHECK(traffic(method) == Approx(b).epsilon(1e-6));
    for (const char* method : {"lora", "relora", "qlora", "loftq"}) CHECK(traffic(method) == Approx(b + p).epsilon(1e-6));
}

TEST_CASE("loqt needs fewer FLOPs than full rank, and the two figures are kept apart", "[flops]") {
    Config c = tiny_config("loqt", "cached", 4, 2);
    double loqt = training_flops_per_token(c);
    c.method.name = "full";
    CHECK(loqt < training_flops_per_token(c));
    // 6·N counts the embedding table, which no product reads, and leaves attention out.
    double attention = double(c.model.layers) * 7.0 * double(c.train.seq_len * c.model.hidden);
    double unused = 6.0 * double(c.model.vocab * c.model.hidden + (2 * c.model.layers + 1) * c.model.hidden);
    CHECK(full_rank_flops_per_token(c) == Approx(training_flops_per_token(c) - attention + unused).epsilon(1e-12));
}

TEST_CASE("the parameter count is that of the tensors", "[flops]") {
    for (const char* preset : {"tiny", "60m", "130m", "350m", "1b", "7b", "13b"}) {
        INFO(preset);
        Config c;
        read_config_file(c, std::string("configs/") + preset + ".json");
        c.method.name = "full", c.train.micro_batch = 1;
        validate_config(c);
        auto device = Device::open_dry(DeviceKind::cuda);
        Llama model(c, *device, false);
        int64_t count = 0;
        for (Parameter* p : model.parameters()) count += p->rows * p->cols;
        CHECK(parameter_count(c) == count);
    }
}

TEST_CASE("peaks of GPUs are found by whole words of their names", "[flops]") {
    const std::pair<const char*, double> known[] = {
        {"NVIDIA H200", 989}, {"NVIDIA H200 NVL", 835}, {"NVIDIA H100 80GB HBM3", 989}, {"NVIDIA H100 PCIe", 756}, {"NVIDIA GH200 480GB", 989},
        {"NVIDIA H20", 148}, {"NVIDIA B200", 2250}, {"NVIDIA GB200", 2500}, {"NVIDIA A100-SXM4-80GB", 312}, {"NVIDIA A10G", 70}, {"NVIDIA A10", 125},
        {"NVIDIA A40", 150}, {"NVIDIA RTX A6000", 155}, {"NVIDIA L40S", 362}, {"NVIDIA L40", 181}, {"NVIDIA L4", 121},
        {"NVIDIA GeForce RTX 4090", 165}, {"NVIDIA GeForce RTX 4070", 58}, {"NVIDIA GeForce RTX 4070 Ti", 80}, {"NVIDIA GeForce RTX 4070 Ti SUPER", 88},
        {"NVIDIA GeForce RTX 3090", 71}, {"NVIDIA GeForce RTX 3080 Ti", 68},
        // Not what the shorter name says: to be measured.
        {"NVIDIA RTX A4000", 0}, {"NVIDIA RTX A1000", 0}, {"NVIDIA GeForce RTX 4090 Laptop GPU", 0}, {"NVIDIA GeForce RTX 4090 D", 0},
        {"NVIDIA A100-SXM4-40GB MIG 1g.5gb", 0}, {"NVIDIA A100X", 0}, {"Some GPU of tomorrow", 0}};
    for (auto [name, teraflops] : known) {
        INFO(name);
        CHECK(data_sheet_flops(name) == teraflops * 1e12);
    }
}

TEST_CASE("a CPU has no peak, but its products can be measured", "[flops]") {
    auto device = test_device("cpu");
    CHECK(peak_flops(*device).flops == 0);
    double measured = measure_product_flops(*device, 128);
    CHECK(measured > 1e7);
    CHECK(measured < 1e15);
}

TEST_CASE("the measured peak of a GPU lies below its data sheet's, and not far", "[flops][gpu]") {
    auto device = test_device("cuda");
    double known = data_sheet_flops(device->name()), measured = measure_product_flops(*device, 4096);
    INFO(device->name() << ": " << measured * 1e-12 << " TFLOP/s measured, " << known * 1e-12 << " on the data sheet");
    CHECK(measured > 1e12);
    if (known > 0) {
        CHECK(measured < 1.05 * known);
        CHECK(measured > 0.4 * known);
    }
    PeakFlops peak = peak_flops(*device);
    CHECK(std::string(peak.source) == (known > 0 ? "data sheet" : "measured"));
    CHECK(peak.flops > 1e12);
}

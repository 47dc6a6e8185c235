// Where a step's work is done must not matter: updates and merges inside the backward pass or after it, activations kept or made again.
#include <set>

#include "runtime/workers.h"
#include "test/model_fixture.h"
#include "training_step.h"

namespace {

constexpr int64_t kSteps = 5;
bool merges_at(int64_t step) { return step == 0 || step == 3; }

std::string directory_for(const Device& device) { return device.is_cuda() ? "test/fixtures/llama_gpu" : "test/fixtures/llama_tiny"; }

struct Outcome {
    std::vector<double> losses, norms;
    std::map<std::string, std::vector<char>> state;  // every tensor of a checkpoint
};

// A few steps of real training with two merges.
Outcome train(Device& device, const Config& c, int worker_count = 0) {
    ReferenceModel reference(directory_for(device), c.model.vocab);
    WeightSource source = random_weights(c);
    SmallModel small(device, c, source);
    std::unique_ptr<Workers> workers;
    if (worker_count) workers = std::make_unique<Workers>(device, worker_count, int64_t(64) << 20);
    std::vector<Batch> batches{reference.batch};
    if (c.micro_batches() > 1) batches = {reference.row(0, c.model.vocab), reference.row(1, c.model.vocab), reference.row(2, c.model.vocab)};
    Outcome outcome;
    for (int64_t step = 0; step < kSteps; ++step) {
        StepPlan plan;
        plan.step = step, plan.lr = 1e-3, plan.merges = makes_anew(c) && merges_at(step), plan.source = step ? nullptr : &source;
        StepGradients gradients = accumulate_gradients(device, small.model, c, small.sums, batches, plan);
        CHECK(gradients.updated == (updates_per_layer(c) || (plan.merges && merges_inside_backward(c))));
        apply_gradients(device, small.model, c, plan, gradients.norm);
        if (plan.merges) {
            MergeStatistics merged = small.model.merge(step, plan.source);
            CHECK(merged.failed == 0);
            CHECK(merged.matrices == small.model.matrices());
        }
        outcome.losses.push_back(gradients.loss), outcome.norms.push_back(gradients.norm);
    }
    for (const TensorEntry& e : small.model.table().entries()) {
        if (!e.saved) continue;
        std::vector<char>& bytes = outcome.state[e.name];
        bytes.resize(e.holder->bytes());
        device.download(bytes.data(), e.holder->data, int64_t(bytes.size()));
    }
    return outcome;
}

void check_same(const Outcome& a, const Outcome& b) {
    CHECK(a.losses == b.losses);
    CHECK(a.norms == b.norms);
    REQUIRE(a.state.size() == b.state.size());
    for (auto& [name, bytes] : a.state) {
        INFO(name);
        CHECK(b.state.at(name) == bytes);
    }
}

Config base_config(const Device& device, const std::string& method, int64_t micro_batch = 3) {
    Config c = fixture_config(directory_for(device), method, micro_batch);
    c.optimizer.clip = 0;
    c.train.seed = int64_t(fresh_seed());
    return c;
}

void check_per_layer(Device& device) {
    for (auto [method, moments] : {std::pair<const char*, const char*>{"full", "int8"}, {"loqt", "fp32"}, {"loqt", "int8"}, {"loqt-nq", "bf16"}, {"galore", "int8"}, {"relora", "fp32"}}) {
        Config c = base_config(device, method);
        c.train.gradients = "bf16", c.optimizer.moments = moments, c.method.moments_at_merge = "project";
        INFO(method << " " << moments << " seed " << c.train.seed);
        Outcome ordinary = train(device, c);
        c.train.updates = "per_layer";
        check_same(ordinary, train(device, c, c.low_rank() ? 2 : 0));
    }
}

void check_merges_inside(Device& device) {
    struct Case {
        const char *method, *gradients, *projection, *projection_gradient;
    };
    for (const Case& k : {Case{"loqt", "fp32", "gram", "full"}, {"loqt", "int8", "subspace", "last"}, {"loqt-nq", "bf16", "gram", "last"}}) {
        Config c = base_config(device, k.method, 1);
        c.train.gradients = k.gradients, c.method.projection = k.projection, c.method.projection_gradient = k.projection_gradient;
        INFO(k.method << " " << k.gradients << " " << k.projection << " seed " << c.train.seed);
        Outcome inside = train(device, c);
        check_same(inside, train(device, c, 3));
        c.optimizer.clip = 1e9;
        check_same(inside, train(device, c));
    }
}

void check_recompute(Device& device) {
    struct Case {
        const char *method, *effective_weights;
        int64_t micro_batch;
    };
    for (const Case& k : {Case{"full", "cached", 3}, {"loqt", "cached", 1}, {"loqt", "rebuilt", 3}, {"loqt", "factored", 1}}) {
        Config c = base_config(device, k.method, k.micro_batch);
        c.train.effective_weights = k.effective_weights, c.train.recompute = "light";
        INFO(k.method << " " << k.effective_weights << " micro-batch " << k.micro_batch << " seed " << c.train.seed);
        Outcome light = train(device, c);
        for (const char* recompute : {"none", "block"}) {
            INFO(recompute);
            c.train.recompute = recompute;
            check_same(light, train(device, c));
        }
    }
}

// Gradients summed in few bits are those in fp32 with small unbiased errors, and training with them goes the same way.
void check_narrow_sums(Device& device) {
    for (const char* method : {"full", "loqt"}) {
        Config c = base_config(device, method, 1);
        INFO(method << " seed " << c.train.seed);
        Outcome exact = train(device, c);
        for (auto [name, limit] : {std::pair<const char*, double>{"bf16", 0.01}, {"int8", 0.03}}) {
            INFO(name);
            c.train.gradients = name;
            Outcome narrow = train(device, c);
            CHECK(narrow.losses[0] == exact.losses[0]);
            for (int64_t i = 1; i < kSteps; ++i) {
                CHECK(narrow.losses[i] == Approx(exact.losses[i]).margin(0.02));
                CHECK(narrow.norms[i] == Approx(exact.norms[i]).epsilon(limit + 0.05));
            }
            check_same(narrow, train(device, c));
        }
    }
}

// Without a finite loss nothing may change, though updates would have come inside the backward pass.
void check_nonfinite(Device& device) {
    Config c = base_config(device, "loqt");
    c.train.updates = "per_layer";
    ReferenceModel reference(directory_for(device), c.model.vocab);
    WeightSource source = random_weights(c);
    SmallModel small(device, c, source);
    StepPlan plan;
    plan.merges = true, plan.source = &source, plan.lr = 1e-3;
    accumulate_gradients(device, small.model, c, small.sums, {reference.batch}, plan);
    apply_gradients(device, small.model, c, plan, 1);
    small.model.merge(0, &source);
    Parameter& norm = small.parameter("model.norm.weight");
    std::vector<float> poison(norm.value.numel(), std::nanf(""));
    device.upload(norm.value.data, poison.data(), norm.value.bytes());
    auto state = [&] {
        std::vector<std::vector<float>> all;
        for (Parameter* p : small.model.parameters())
            if (p != &norm) all.push_back(small.read(p->logical(p->value))), all.push_back({float(p->updates)});
        return all;
    };
    auto before = state();
    plan.step = 1;
    StepGradients gradients = accumulate_gradients(device, small.model, c, small.sums, {reference.batch}, plan);
    CHECK_FALSE(std::isfinite(gradients.loss));
    CHECK_FALSE(gradients.updated);
    CHECK(state() == before);
}

// A step whose gradient turns out not to be finite ends after the backward pass. What was updated inside that counts from then on all the same.
void check_kept_effective_weights(Device& device) {
    for (const char* updates : {"per_layer", "ordinary"}) {
        Config c = base_config(device, "loqt");
        c.train.updates = updates, c.train.effective_weights = "cached";
        INFO(updates << " seed " << c.train.seed);
        ReferenceModel reference(directory_for(device), c.model.vocab);
        WeightSource source = random_weights(c);
        SmallModel small(device, c, source);
        StepPlan plan;
        plan.merges = true, plan.source = &source, plan.lr = 1e-2;
        accumulate_gradients(device, small.model, c, small.sums, {reference.batch}, plan);
        apply_gradients(device, small.model, c, plan, 1);
        small.model.merge(0, &source);
        plan.step = 1, plan.merges = c.train.updates != "per_layer";
        CHECK(accumulate_gradients(device, small.model, c, small.sums, {reference.batch}, plan).updated);
        auto loss = [&] {
            small.model.evaluate(reference.batch, small.sums.losses(), 0);
            return small.sums.read_losses(1);
        };
        double kept = loss();
        small.model.invalidate();
        CHECK(kept == loss());
    }
}

}  // namespace

TEST_CASE("every product that a sum of gradients gets is rounded by draws of its own", "[updates]") {
    Config c;
    c.train.batch = 4, c.train.micro_batch = 1;
    std::set<uint32_t> numbers;
    for (int64_t step = 0; step < 5; ++step)
        for (int64_t i = 0; i < 4; ++i)
            for (int64_t chunk = 0; chunk < 3; ++chunk) {
                BackwardPass pass;
                pass.step = step, pass.micro_batch = i, pass.first = i == 0;
                GradientPart part = pass.part(c, chunk, 3);
                CHECK(part.first == (i == 0 && chunk == 0));
                CHECK_FALSE(part.only);
                numbers.insert(part.number);
            }
    CHECK(numbers.size() == 5 * 4 * 3);
}
TEST_CASE("updates layer by layer are the ordinary updates, bit for bit", "[updates]") { check_per_layer(*test_device("cpu")); }
TEST_CASE("merges inside the backward pass are those after it, bit for bit", "[updates]") { check_merges_inside(*test_device("cpu")); }
TEST_CASE("what is recomputed changes no bit", "[updates]") { check_recompute(*test_device("cpu")); }
TEST_CASE("gradients summed in 16 and 8 bits", "[updates]") { check_narrow_sums(*test_device("cpu")); }
TEST_CASE("a loss that is not finite stops updates inside the backward pass", "[updates]") { check_nonfinite(*test_device("cpu")); }
TEST_CASE("no effective weights from before an update inside the backward pass are used", "[updates]") { check_kept_effective_weights(*test_device("cpu")); }

TEST_CASE("updates layer by layer on the GPU", "[updates][gpu]") { check_per_layer(*test_device("cuda", int64_t(256) << 20)); }
TEST_CASE("merges inside the backward pass on the GPU", "[updates][gpu]") { check_merges_inside(*test_device("cuda", int64_t(256) << 20)); }
TEST_CASE("what is recomputed changes no bit on the GPU", "[updates][gpu]") { check_recompute(*test_device("cuda", int64_t(256) << 20)); }
TEST_CASE("gradients summed in 16 and 8 bits on the GPU", "[updates][gpu]") { check_narrow_sums(*test_device("cuda", int64_t(256) << 20)); }
TEST_CASE("a loss that is not finite stops updates on the GPU", "[updates][gpu]") { check_nonfinite(*test_device("cuda", int64_t(256) << 20)); }
TEST_CASE("no effective weights from before an update on the GPU", "[updates][gpu]") { check_kept_effective_weights(*test_device("cuda", int64_t(256) << 20)); }

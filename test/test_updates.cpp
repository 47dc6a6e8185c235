// Where a step's work is done must not matter: updates and merges inside the backward pass or after it, activations kept or made again.
#include <set>

#include "runtime/workers.h"
#include "test/model_fixture.h"

namespace {

constexpr int64_t kSteps = 5;
bool merges_at(int64_t step) { return step == 0 || step == 3; }

struct Outcome {
    std::vector<double> losses, norms;
    std::map<std::string, std::vector<char>> state;  // every tensor of a checkpoint
};

// A few steps of real training with two merges.
Outcome train(Device& device, const Config& c, int worker_count = 0) {
    TrainingRun run(device, c);
    std::unique_ptr<Workers> workers;
    if (worker_count) workers = std::make_unique<Workers>(device, worker_count, int64_t(64) << 20);
    Outcome outcome;
    for (int64_t step = 0; step < kSteps; ++step) {
        const bool merges = makes_anew(c) && merges_at(step);
        StepGradients gradients = run.step(step, 1e-3, merges);
        CHECK(gradients.updated == (updates_per_layer(c) || (merges && merges_inside_backward(c))));
        outcome.losses.push_back(gradients.loss), outcome.norms.push_back(gradients.norm);
    }
    for (const TensorEntry& e : run.small.model.table().entries()) {
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
    Config c = fixture_config(fixture_for(device), method, micro_batch);
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

// The gradients of a second step from the same weights, three micro-batches summed, by parameter.
std::map<std::string, std::vector<float>> second_gradients(Device& device, const Config& c) {
    TrainingRun run(device, c);
    run.step(0, 0.0, c.low_rank());  // without a step: only P and B come into being
    run.backward(1, 0.0, false);
    std::map<std::string, std::vector<float>> all;
    for (Parameter* p : run.small.model.parameters()) {
        ScratchScope scope(device);
        all[p->name] = run.small.read(load_gradient(device, scope, *p));
    }
    return all;
}

// Gradients summed in few bits are those in fp32 up to their rounding: three additions of 0.17 % (bf16) or, where one element of a block is far
// larger than the rest, a few times 0.7 % (8 bits; 1.7 to 3.4 % here). What is not summed in few bits is the same to the bit.
void check_narrow_sums(Device& device) {
    for (const char* method : {"full", "loqt"}) {
        Config c = base_config(device, method, 1);
        INFO(method << " seed " << c.train.seed);
        auto exact = second_gradients(device, c);
        for (const char* name : {"bf16", "int8"}) {
            INFO(name);
            c.train.gradients = name;
            auto narrow = second_gradients(device, c);
            for (auto& [parameter, gradient] : exact) {
                INFO(parameter);
                const bool norm = parameter.find("norm") != std::string::npos;
                const bool codes = parameter.find(".B") != std::string::npos && name == std::string("int8");
                if (norm || (!codes && !device.is_cuda())) {
                    CHECK(narrow.at(parameter) == gradient);
                } else {
                    double error = relative_error(narrow.at(parameter), std::vector<double>(gradient.begin(), gradient.end()));
                    CHECK(error > 0);
                    CHECK(error < (codes ? 0.05 : 0.006));
                }
            }
            check_same(train(device, c), train(device, c));
        }
    }
}

// Without a finite loss nothing may change, though updates would have come inside the backward pass.
void check_nonfinite(Device& device) {
    Config c = base_config(device, "loqt");
    c.train.updates = "per_layer";
    TrainingRun run(device, c);
    run.step(0, 1e-3, true);
    SmallModel& small = run.small;
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
    StepGradients gradients = run.backward(1, 1e-3, true);
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
        TrainingRun run(device, c);
        run.step(0, 1e-2, true);
        CHECK(run.backward(1, 1e-2, c.train.updates != "per_layer").updated);
        auto loss = [&] {
            run.small.model.evaluate(run.reference.batch, run.small.sums.losses(), 0);
            return run.small.sums.read_losses(1);
        };
        double kept = loss();
        run.small.model.invalidate();
        CHECK(kept == loss());
    }
}

}  // namespace

TEST_CASE("every product that a sum of gradients gets is rounded by draws of its own", "[updates]") {
    Config c;
    c.train.batch = 4, c.train.micro_batch = 1;
    for (int64_t ranks : {1, 2}) {
        c.world_size = ranks;
        std::set<uint32_t> numbers;
        for (int64_t step = 0; step < 5; ++step)
            for (int64_t i = 0; i < c.micro_batches(); ++i)
                for (int rank = 0; rank < ranks; ++rank)
                    for (int64_t chunk = 0; chunk < 3; ++chunk) {
                        BackwardPass pass;
                        pass.step = step, pass.rank = rank, pass.micro_batch = i, pass.first = i == 0;
                        GradientPart part = pass.part(c, chunk, 3);
                        CHECK(part.first == (i == 0 && chunk == 0));
                        CHECK_FALSE(part.only);
                        numbers.insert(part.number);
                    }
        CHECK(numbers.size() == 5 * 4 * 3);
    }
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

// One optimizer step: micro-batches add up to the whole batch, and clipping limits what the optimizer sees.
#include "test/model_fixture.h"
#include "training_step.h"

namespace {
const char* kDirectory = "test/fixtures/llama_tiny";
}

TEST_CASE("gradients over micro-batches are those of the whole batch", "[training_step]") {
    auto device = test_device("cpu");
    Config whole_config = fixture_config(kDirectory, "full"), parts_config = fixture_config(kDirectory, "full", 1);
    ReferenceModel reference(kDirectory, whole_config.model.vocab);
    WeightSource source = huggingface_weights(whole_config, kDirectory);
    SmallModel whole(*device, whole_config, source), parts(*device, parts_config, source);

    StepGradients once = accumulate_gradients(*device, whole.model, whole_config, whole.sums, {reference.batch}, StepPlan{});
    std::vector<Batch> rows;
    for (int64_t r = 0; r < 3; ++r) rows.push_back(reference.row(r, whole_config.model.vocab));
    StepGradients summed = accumulate_gradients(*device, parts.model, parts_config, parts.sums, rows, StepPlan{});
    CHECK(once.loss == Approx(reference.loss).epsilon(1e-5));
    CHECK(summed.loss == Approx(reference.loss).epsilon(1e-5));
    double squares = 0;
    for (Parameter* p : whole.model.parameters()) {
        std::vector<float> expected = whole.read(p->logical(p->grad));
        CHECK(relative_error(parts.gradient(p->name), expected) < 1e-5);
        for (float g : expected) squares += double(g) * double(g);
    }
    CHECK(once.norm == Approx(std::sqrt(squares)).epsilon(1e-6));
    CHECK(summed.norm == Approx(once.norm).epsilon(1e-5));
}

TEST_CASE("a clipped step is the step of gradients scaled down", "[training_step]") {
    // Adam's first moment after one step is (1 - beta1)·gradient.
    auto device = test_device("cpu");
    auto first_moment = [&](double clip) {
        Config c = fixture_config(kDirectory, "full");
        c.optimizer.clip = clip, c.optimizer.moments = "fp32";
        ReferenceModel reference(kDirectory, c.model.vocab);
        SmallModel small(*device, c, huggingface_weights(c, kDirectory));
        StepPlan plan;
        plan.lr = 1e-3;
        StepGradients gradients = accumulate_gradients(*device, small.model, c, small.sums, {reference.batch}, plan);
        apply_gradients(*device, small.model, c, plan, gradients.norm);
        return std::pair<double, std::vector<float>>{gradients.norm, small.read(small.parameter("lm_head.weight").moments.m)};
    };
    auto [norm, free] = first_moment(0);
    REQUIRE(norm > 0);
    CHECK(first_moment(2 * norm).second == free);  // below the limit: untouched
    std::vector<float> clipped = first_moment(0.25 * norm).second, expected = free;
    for (float& x : expected) x *= 0.25f;
    CHECK(relative_error(clipped, expected) < 1e-5);
}

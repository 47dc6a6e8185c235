#include <algorithm>

#include "ops/cross_entropy.h"
#include "test/padding.h"

namespace {

struct Shape {
    int64_t rows, vocab, pad;
    float sigma, shift;
};
const Shape kShapes[] = {{1, 1, 0, 1, 0}, {2, 3, 4, 1, 0}, {3, 7, 0, 4, 0}, {9, 259, 0, 2, 0}, {20, 64, 8, 3, 80}, {4, 1000, 5, 30, -300}, {6, 4111, 0, 2, 0}, {5, 8000, 0, 2, 0}, {4, 16000, 8, 2, 0}, {5, 32000, 0, 2, 0}, {4, 40000, 0, 2, 0}, {2, 50257, 0, 1, 0}};

void check_cross_entropy(Device& device) {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (const Shape& s : kShapes) {
        INFO("rows " << s.rows << " V " << s.vocab << " pad " << s.pad);
        auto z = random_normal(rng, s.rows * s.vocab, s.sigma);
        for (float& v : z) v += s.shift;
        z = as_activation(device, z);
        std::vector<float> targets(s.rows);
        for (int64_t t = 0; t < s.rows; ++t) targets[t] = t % 4 == 3 ? -1.0f : t == 0 ? float(s.vocab - 1) : t == 1 ? 0.0f : float(rng() % s.vocab);
        const float scale = 1.0f / 37;
        std::vector<double> losses, gradient;
        for (int64_t t = 0; t < s.rows; ++t) {
            const float* row = z.data() + t * s.vocab;
            const double maximum = *std::max_element(row, row + s.vocab);
            double sum = 0;
            for (int64_t c = 0; c < s.vocab; ++c) sum += std::exp(row[c] - maximum);
            const int64_t target = int64_t(targets[t]);
            losses.push_back(target < 0 ? 0 : maximum + std::log(sum) - row[target]);
            for (int64_t c = 0; c < s.vocab; ++c) gradient.push_back(target < 0 ? 0 : (std::exp(row[c] - maximum) / sum - (c == target)) * scale);
        }
        OnDevice logits(device, device.activation_dtype(), s.rows, s.vocab, z, s.vocab + s.pad), losses_(device, DType::f32, 1, s.rows);
        OnDevice targets_(device, DType::i32, 1, s.rows, targets);
        for (bool backward : {false, true}) {
            losses_.write(std::vector<float>(s.rows, NAN));
            cross_entropy(device, losses_, logits, static_cast<const int32_t*>(targets_.t.data), scale, backward);
            auto got = losses_.read();
            for (int64_t t = 0; t < s.rows; ++t) CHECK(std::fabs(got[t] - losses[t]) <= 1e-5 * std::max(1.0, losses[t]));
            if (!backward) CHECK(logits.read() == z);
        }
        auto got = logits.read();
        double norm = 0;
        for (double g : gradient) norm += g * g;
        if (norm > 0) CHECK(relative_error(got, gradient) < (device.is_cuda() ? bf16_limit(2e-3, s.rows) : 3e-6));
        else CHECK(got[0] == Approx(0).margin(1e-8));
        // Every element, small probabilities too, not only the norm that the target dominates.
        int64_t wrong = 0;
        for (size_t i = 0; i < got.size(); ++i)
            wrong += !(std::fabs(got[i] - gradient[i]) <= (device.is_cuda() ? 5e-3 : 2e-5) * std::fabs(gradient[i]) + 1e-7 * scale);
        CHECK(wrong == 0);
        CHECK(padding_untouched(logits));
    }
}

// A NaN or +inf logit must reach the loss; −inf (a masked class) must not.
void check_special_values(Device& device) {
    for (float special : {NAN, INFINITY, -INFINITY}) {
        for (auto [at, vocab] : {std::pair(0, 37), std::pair(30, 37), std::pair(0, 40), std::pair(30, 40)}) {
            std::vector<float> z(vocab, 0.5f);
            z[at] = special;
            OnDevice logits(device, device.activation_dtype(), 1, vocab, z), losses(device, DType::f32, 1, 1), target(device, DType::i32, 1, 1, std::vector<float>{5.0f});
            cross_entropy(device, losses, logits, static_cast<const int32_t*>(target.t.data), 1.0f, true);
            if (special == -INFINITY) {
                CHECK(losses.read()[0] == Approx(std::log(vocab - 1.0)));
                CHECK(logits.read()[at] == 0);
            } else {
                CHECK_FALSE(std::isfinite(losses.read()[0]));
            }
        }
    }
}

}  // namespace

TEST_CASE("cross entropy and its gradient match fp64", "[cross_entropy]") {
    auto device = test_device("cpu");
    check_cross_entropy(*device);
    check_special_values(*device);
}
TEST_CASE("cross entropy on the GPU", "[cross_entropy][gpu]") {
    auto device = test_device("cuda");
    check_cross_entropy(*device);
    check_special_values(*device);
}

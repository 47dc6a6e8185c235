#include "ops/fast_exp.h"
#include "ops/swiglu.h"
#include "test/padding.h"

namespace {

double swiglu(double g, double u) { return g / (1 + std::exp(-g)) * u; }

struct Shape {
    int64_t rows, f, pad;
};
const Shape kShapes[] = {{1, 1, 0}, {3, 5, 2}, {4, 8, 0}, {5, 24, 8}, {70, 344, 0}, {9, 1376, 0}, {7, 1001, 3}, {2, 13824, 0}};

void check_swiglu(Device& device) {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    const DType type = device.activation_dtype();
    for (const Shape& s : kShapes) {
        INFO("rows " << s.rows << " f " << s.f << " pad " << s.pad);
        auto gate_up = as_activation(device, random_normal(rng, s.rows * 2 * s.f, 3.0f)), da = as_activation(device, random_normal(rng, s.rows * s.f));
        std::vector<double> a, dgate_up(gate_up.size());
        for (int64_t t = 0; t < s.rows; ++t)
            for (int64_t c = 0; c < s.f; ++c) {
                const double g = gate_up[t * 2 * s.f + c], u = gate_up[t * 2 * s.f + s.f + c], grad = da[t * s.f + c], step = 1e-5;
                a.push_back(swiglu(g, u));
                dgate_up[t * 2 * s.f + c] = grad * (swiglu(g + step, u) - swiglu(g - step, u)) / (2 * step);  // exact to 1e-10
                dgate_up[t * 2 * s.f + s.f + c] = grad * (swiglu(g, u + 1) - swiglu(g, u));                   // linear in u
            }
        OnDevice gate_up_(device, type, s.rows, 2 * s.f, gate_up, 2 * s.f + s.pad), a_(device, type, s.rows, s.f, s.f + s.pad);
        swiglu_forward(device, a_, gate_up_);
        CHECK(relative_error(a_.read(), a) < (device.is_cuda() ? bf16_limit(3e-3, s.rows * s.f) : 1e-6));
        CHECK(padding_untouched(a_));

        OnDevice da_(device, type, s.rows, s.f, da, s.f + s.pad), dgate_up_(device, type, s.rows, 2 * s.f, 2 * s.f + s.pad);
        swiglu_backward(device, dgate_up_, gate_up_, da_);
        CHECK(relative_error(dgate_up_.read(), dgate_up) < (device.is_cuda() ? bf16_limit(3e-3, s.rows * s.f) : 1e-6));
        CHECK(padding_untouched(dgate_up_));
        CHECK(gate_up_.read() == gate_up);

        // With the activation computed along the way, in da's place: the forward's bits, and the same gradients.
        OnDevice in_place(device, type, s.rows, s.f, da, s.f + s.pad), again(device, type, s.rows, 2 * s.f, 2 * s.f + s.pad);
        swiglu_backward(device, again, gate_up_, in_place, in_place);
        CHECK((in_place.raw<uint8_t>() == a_.raw<uint8_t>()));
        CHECK((again.raw<uint8_t>() == dgate_up_.raw<uint8_t>()));
        CHECK((da_.read() == da));
        swiglu_backward(device, gate_up_, gate_up_, da_);
        CHECK((gate_up_.raw<uint8_t>() == dgate_up_.raw<uint8_t>()));
    }
    // Saturation: no NaN from exp overflow.
    const std::vector<float> g = {-200, -95, -88, 0, 88, 95, 200, 1e4f};
    std::vector<float> gate_up = g;
    for (size_t i = 0; i < g.size(); ++i) gate_up.push_back(1);
    OnDevice gate_up_(device, type, 1, 16, gate_up), a_(device, type, 1, 8), da_(device, type, 1, 8, std::vector<float>(8, 1.0f));
    swiglu_forward(device, a_, gate_up_);
    auto a = a_.read();
    const auto stored = gate_up_.read();
    for (int i = 0; i < 8; ++i) CHECK(a[i] == Approx(stored[i] > 0 ? stored[i] : 0.0f).margin(1e-30));
    swiglu_backward(device, gate_up_, gate_up_, da_);
    auto d = gate_up_.read();
    for (int i = 0; i < 8; ++i) CHECK(d[i] == Approx(g[i] > 0 ? 1 : g[i] == 0 ? 0.5 : 0).margin(1e-30));
}

}  // namespace

TEST_CASE("fast_exp is exp to two units in the last place", "[swiglu]") {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    std::vector<float> x(1 << 20), y(x.size());
    std::uniform_real_distribution<float> wide(-87.3f, 88.7f), narrow(-1.0f, 1.0f);
    for (size_t i = 0; i < x.size(); ++i) x[i] = i % 2 ? wide(rng) : narrow(rng);
    for (size_t i = 0; i < 2000; ++i) x[i] = float(i) * 0.0434f;  // across the reduction's boundaries
    for (size_t i = 0; i < x.size(); ++i) y[i] = fast_exp(x[i]);
    double worst = 0;
    for (size_t i = 0; i < x.size(); ++i) {
        const double exact = std::exp(double(x[i])), ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
        worst = std::max(worst, std::fabs(y[i] - exact) / ulp);
    }
    INFO("worst error in ulp " << worst);
    CHECK(worst <= 2);
    CHECK(fast_exp(0.0f) == 1.0f);
    CHECK(fast_exp(-INFINITY) == 0.0f);
    CHECK(fast_exp(-1e30f) == 0.0f);
    CHECK(fast_exp(-100.0f) == Approx(std::exp(-100.0)).margin(1.5e-45));  // subnormal
    CHECK(fast_exp(88.72f) == Approx(std::exp(double(88.72f))));
    CHECK(fast_exp(88.73f) == INFINITY);
    CHECK(fast_exp(INFINITY) == INFINITY);
    CHECK(std::isnan(fast_exp(NAN)));
}

TEST_CASE("swiglu forward and backward match fp64", "[swiglu]") { check_swiglu(*test_device("cpu")); }
TEST_CASE("swiglu on the GPU", "[swiglu][gpu]") { check_swiglu(*test_device("cuda")); }

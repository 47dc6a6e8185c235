#include <omp.h>

#include "ops/rmsnorm.h"
#include "test/padding.h"

namespace {

// Σ dy∘y of one row in fp64.
double loss(const std::vector<double>& x, const std::vector<double>& w, const std::vector<double>& dy, double eps) {
    double mean = 0, sum = 0;
    for (double v : x) mean += v * v / double(x.size());
    for (size_t c = 0; c < x.size(); ++c) sum += dy[c] * w[c] * x[c] / std::sqrt(mean + eps);
    return sum;
}

struct Result {
    std::vector<double> y, rstd, dx, dw;
    double term_norm = 0;  // ‖ρ·g‖: dx is a difference of terms of this size, which cancel in very short rows
};

// fp64, gradients by the chain rule: ∂ρ/∂x_i = −ρ³x_i/h.
Result reference(int64_t rows, int64_t h, const std::vector<float>& x, const std::vector<float>& w, const std::vector<float>& dy, double eps) {
    Result out;
    out.dw.assign(h, 0);
    for (int64_t t = 0; t < rows; ++t) {
        double mean = 0, inner = 0;
        for (int64_t c = 0; c < h; ++c) mean += double(x[t * h + c]) * x[t * h + c] / h;
        const double rho = 1 / std::sqrt(mean + eps);
        out.rstd.push_back(rho);
        for (int64_t c = 0; c < h; ++c) inner += double(dy[t * h + c]) * w[c] * x[t * h + c];
        for (int64_t c = 0; c < h; ++c) {
            const double v = x[t * h + c], d = dy[t * h + c];
            out.y.push_back(w[c] * v * rho);
            out.dx.push_back(d * w[c] * rho - v * rho * rho * rho / h * inner);
            out.dw[c] += d * v * rho;
            out.term_norm += std::pow(d * w[c] * rho, 2);
        }
    }
    out.term_norm = std::sqrt(out.term_norm);
    return out;
}

struct Shape {
    int64_t rows, h, pad;
};
const Shape kShapes[] = {{1, 1, 0}, {3, 7, 0}, {4, 8, 8}, {5, 64, 0}, {17, 100, 4}, {33, 768, 3}, {2200, 512, 0}, {40, 1032, 8}, {70, 2048, 0}, {9, 4096, 0}, {530, 5120, 0}, {3, 7168, 16}, {2, 8200, 0}};

void check_rmsnorm(Device& device) {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    const DType type = device.activation_dtype();
    const float eps = 1e-6f;
    for (const Shape& s : kShapes) {
        const int64_t n = s.rows * s.h, ld = s.h + s.pad;
        INFO("rows " << s.rows << " h " << s.h << " ld " << ld);
        auto x = as_activation(device, random_normal(rng, n, 2.0f)), dy = as_activation(device, random_normal(rng, n));
        auto dx0 = as_activation(device, random_normal(rng, n)), w = random_normal(rng, s.h), dw0 = random_normal(rng, s.h);
        Result expected = reference(s.rows, s.h, x, w, dy, eps);
        OnDevice x_(device, type, s.rows, s.h, x, ld), dy_(device, type, s.rows, s.h, dy, ld), w_(device, DType::f32, 1, s.h, w);
        OnDevice y(device, type, s.rows, s.h, ld), rstd(device, DType::f32, 1, s.rows);
        rmsnorm_forward(device, y, rstd, x_, w_, eps);
        CHECK(relative_error(y.read(), expected.y) < (device.is_cuda() ? bf16_limit(3e-3, n) : 1e-6));
        CHECK(relative_error(rstd.read(), expected.rstd) < 1e-6);
        CHECK(padding_untouched(y));

        for (int64_t i = 0; i < n; ++i) expected.dx[i] += dx0[i];
        for (int64_t c = 0; c < s.h; ++c) expected.dw[c] += dw0[c];
        OnDevice dx(device, type, s.rows, s.h, dx0, ld), dw(device, DType::f32, 1, s.h, dw0);
        rmsnorm_backward(device, dx, dw, dy_, x_, w_, rstd);
        double dx_norm = 0;
        for (double v : expected.dx) dx_norm += v * v;
        dx_norm = std::sqrt(dx_norm);
        const double rounding = device.is_cuda() ? bf16_limit(3e-3, n) : 1e-6;
        CHECK(relative_error(dx.read(), expected.dx) * dx_norm < rounding * dx_norm + 1e-6 * expected.term_norm);
        double dw_norm = 0;
        for (double v : expected.dw) dw_norm += v * v;
        dw_norm = std::sqrt(dw_norm);
        CHECK(relative_error(dw.read(), expected.dw) * dw_norm < 1e-5 * dw_norm + 1e-6);
        CHECK(padding_untouched(dx));
        OnDevice dx2(device, type, s.rows, s.h, dx0, ld), dw2(device, DType::f32, 1, s.h, dw0);
        rmsnorm_backward(device, dx2, dw2, dy_, x_, w_, rstd);
        CHECK(dx.raw<uint8_t>() == dx2.raw<uint8_t>());
        CHECK(dw.raw<uint8_t>() == dw2.raw<uint8_t>());

        // The normalized rows again, in dy's place; with nothing to add to, dx as if it had been 0 (it holds NaN).
        OnDevice dx3(device, type, s.rows, s.h, dx0, ld), dw3(device, DType::f32, 1, s.h, dw0), normed(device, type, s.rows, s.h, ld);
        rmsnorm_backward(device, dx3, dw3, dy_, x_, w_, rstd, normed);
        CHECK((normed.raw<uint8_t>() == y.raw<uint8_t>()));
        CHECK((dx3.raw<uint8_t>() == dx.raw<uint8_t>()));
        CHECK((dw3.raw<uint8_t>() == dw.raw<uint8_t>()));
        OnDevice from_zero(device, type, s.rows, s.h, std::vector<float>(n, 0.0f), ld), overwritten(device, type, s.rows, s.h, ld);
        rmsnorm_backward(device, from_zero, dw2, dy_, x_, w_, rstd);
        rmsnorm_backward(device, overwritten, dw3, dy_, x_, w_, rstd, dy_, false);
        CHECK((overwritten.read() == from_zero.read()));
        CHECK(padding_untouched(overwritten));
        CHECK((dw3.raw<uint8_t>() == dw2.raw<uint8_t>()));
        CHECK((dy_.raw<uint8_t>() == y.raw<uint8_t>()));
    }
}

}  // namespace

TEST_CASE("rmsnorm forward and backward match fp64", "[rmsnorm]") { check_rmsnorm(*test_device("cpu")); }
TEST_CASE("rmsnorm on the GPU", "[rmsnorm][gpu]") { check_rmsnorm(*test_device("cuda")); }

TEST_CASE("rmsnorm gradients match central differences of an fp64 forward", "[rmsnorm]") {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    auto device = test_device("cpu");
    const int64_t h = 23;
    const float eps = 0.05f;  // large, so that a misplaced eps shows
    auto x = random_normal(rng, h, 0.3f), w = random_normal(rng, h), dy = random_normal(rng, h);
    OnDevice x_(*device, DType::f32, 1, h, x), w_(*device, DType::f32, 1, h, w), dy_(*device, DType::f32, 1, h, dy);
    OnDevice y(*device, DType::f32, 1, h), rstd(*device, DType::f32, 1, 1), dx(*device, DType::f32, 1, h, std::vector<float>(h, 0)),
        dw(*device, DType::f32, 1, h, std::vector<float>(h, 0));
    rmsnorm_forward(*device, y, rstd, x_, w_, eps);
    rmsnorm_backward(*device, dx, dw, dy_, x_, w_, rstd);
    std::vector<double> xd(x.begin(), x.end()), wd(w.begin(), w.end()), dyd(dy.begin(), dy.end()), dx_numeric, dw_numeric;
    for (auto [values, out] : {std::pair(&xd, &dx_numeric), std::pair(&wd, &dw_numeric)})
        for (double& v : *values) {
            const double old = v, step = 1e-5;
            v = old + step;
            const double plus = loss(xd, wd, dyd, eps);
            v = old - step;
            out->push_back((plus - loss(xd, wd, dyd, eps)) / (2 * step));
            v = old;
        }
    CHECK(relative_error(dx.read(), dx_numeric) < 2e-6);
    CHECK(relative_error(dw.read(), dw_numeric) < 2e-6);
}

TEST_CASE("rmsnorm results do not depend on the thread count", "[rmsnorm]") {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    auto device = test_device("cpu");
    const int64_t rows = 101, h = 96;
    OnDevice x(*device, DType::f32, rows, h, random_normal(rng, rows * h)), dy(*device, DType::f32, rows, h, random_normal(rng, rows * h));
    OnDevice w(*device, DType::f32, 1, h, random_normal(rng, h)), y(*device, DType::f32, rows, h), rstd(*device, DType::f32, 1, rows);
    rmsnorm_forward(*device, y, rstd, x, w, 1e-6f);
    std::vector<std::vector<float>> results;
    const int threads = omp_get_max_threads();
    for (int n : {1, 3}) {
        omp_set_num_threads(n);
        OnDevice dx(*device, DType::f32, rows, h, std::vector<float>(rows * h, 1.0f)), dw(*device, DType::f32, 1, h, std::vector<float>(h, 1.0f));
        rmsnorm_backward(*device, dx, dw, dy, x, w, rstd);
        results.push_back(dw.read());
    }
    omp_set_num_threads(threads);
    CHECK(results[0] == results[1]);
}

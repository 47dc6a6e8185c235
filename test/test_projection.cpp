// Leading singular vectors on gradients of known spectrum (numerics: judge by captured energy; angles only across a gap).
#include "ops/linalg.h"
#include "projection.h"
#include "test/jacobi.h"
#include "test/support.h"

namespace {

struct Gradient {
    std::vector<float> g;     // (out, in)
    int64_t out, in, h;
    bool right;
    Matrix64 u;               // (h, h): singular vectors of the h side, as rows
    std::vector<double> sigma;
};

// Σ σ_i · (random vector of the long side) ⊗ (random vector of the h side).
Gradient make_gradient(std::mt19937_64& rng, const std::vector<double>& sigma, int64_t other, bool right) {
    int64_t h = int64_t(sigma.size());
    Gradient result{{}, right ? h : other, right ? other : h, h, right, random_orthonormal(rng, h, h), sigma};
    Matrix64 other_side = transposed(random_orthonormal(rng, h, other), h, other), h_side = transposed(result.u, h, h);
    for (int64_t i = 0; i < other; ++i)
        for (int64_t j = 0; j < h; ++j) other_side[i * h + j] *= sigma[j];
    Matrix64 g = right ? times_transposed(h_side, other_side, h, other, h) : times_transposed(other_side, h_side, other, h, h);
    result.g.assign(g.begin(), g.end());
    return result;
}

std::vector<double> spectrum(int64_t h, double (*sigma)(int64_t i, int64_t h)) {
    std::vector<double> s(h);
    for (int64_t i = 0; i < h; ++i) s[i] = sigma(i, h);
    return s;
}

struct Outcome {
    ProjectionResult result;
    std::vector<float> p;
};

Outcome project(Device& device, const Gradient& g, int64_t r, ProjectionMethod method, const std::vector<float>& previous = {}, uint64_t seed = 1) {
    OnDevice dg(device, DType::f32, g.out, g.in, g.g, g.in + 3), dp(device, DType::f32, r, g.h);
    OnDevice dprevious(device, DType::f32, r, g.h);
    if (!previous.empty()) dprevious.write(previous);
    ProjectionResult result = leading_singular_vectors(device, dp, dg, g.right, method, previous.empty() ? Tensor{} : dprevious.t, seed, 7);
    return {result, dp.read()};
}

// ‖P·Gᵀ‖² per row of p, in fp64.
std::vector<double> row_energies(const Gradient& g, const std::vector<float>& p, int64_t r) {
    std::vector<float> rows = g.right ? transposed(g.g, g.out, g.in) : g.g;  // (other, h)
    int64_t other = g.right ? g.in : g.out;
    Matrix64 image = times_transposed(p, rows, r, other, g.h);
    std::vector<double> energies(r, 0.0);
    for (int64_t i = 0; i < r; ++i)
        for (int64_t j = 0; j < other; ++j) energies[i] += image[i * other + j] * image[i * other + j];
    return energies;
}

// sin of the largest angle between the span of p and the span of the true leading r vectors.
double largest_sine(const Gradient& g, const std::vector<float>& p, int64_t r) {
    std::vector<double> leading(g.u.begin(), g.u.begin() + r * g.h);
    Matrix64 cosines = times_transposed(leading, p, r, r, g.h);  // (true, found)
    Matrix64 residual = leading, back = times_transposed(cosines, transposed(p, r, g.h), r, g.h, r);
    for (size_t i = 0; i < residual.size(); ++i) residual[i] -= back[i];
    return std::sqrt(std::max(0.0, jacobi_eigen(times_transposed(residual, residual, r, r, g.h), r).values[0]));
}

void check_projection(const Gradient& g, int64_t r, const Outcome& o, double energy_at_least, double oracle_energy) {
    REQUIRE(o.result.ok);
    CHECK(orthonormality_error(o.p, r, g.h) < 1e-5);
    std::vector<double> energies = row_energies(g, o.p, r);
    double captured = 0, total = squared_norm64(g.g);
    for (int64_t i = 0; i < r; ++i) {
        captured += energies[i];
        if (i > 0) CHECK(energies[i] <= energies[i - 1] + 1e-5 * energies[0]);
        float largest = 0;
        for (int64_t j = 0; j < g.h; ++j)
            if (std::fabs(o.p[i * g.h + j]) > std::fabs(largest)) largest = o.p[i * g.h + j];
        CHECK(largest > 0);
    }
    CHECK(captured / oracle_energy >= energy_at_least);
    CHECK(captured / oracle_energy <= 1 + 1e-5);
    CHECK(double(o.result.captured_energy) == Approx(captured / total).epsilon(1e-5));
}

double energy_of_first(const std::vector<double>& sigma, int64_t r) {
    double sum = 0;
    for (int64_t i = 0; i < r; ++i) sum += sigma[i] * sigma[i];
    return sum;
}

void check_spectra(Device& device, int64_t h, int64_t other, int64_t r) {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed << " h " << h << " r " << r);
    std::mt19937_64 rng(seed);
    static int64_t rank;
    rank = r;
    auto gap = [](int64_t i, int64_t) { return i < rank ? 2.0 + double(rank - i) / double(rank) : 1.0 - 0.5 * double(i) / 1000.0; };
    auto harmonic = [](int64_t i, int64_t) { return 1.0 / double(i + 1); };
    auto slow = [](int64_t i, int64_t) { return 1.0 / std::sqrt(double(i + 1)); };
    auto decay = [](int64_t i, int64_t h) { return std::exp(-20.0 * double(i) / double(h)) + 0.01; };
    for (bool right : {false, true}) {
        INFO((right ? "right" : "left"));
        Gradient g = make_gradient(rng, spectrum(h, gap), other, right);
        for (ProjectionMethod method : {ProjectionMethod::gram, ProjectionMethod::subspace}) {
            INFO("gap, method " << int(method));
            Outcome o = project(device, g, r, method);
            bool exact = method == ProjectionMethod::gram;
            check_projection(g, r, o, exact ? 1 - 1e-6 : 0.999, energy_of_first(g.sigma, r));
            if (exact) CHECK(largest_sine(g, o.p, r) < 1e-3);
        }
    }
    double (*shapes[])(int64_t, int64_t) = {harmonic, slow, decay};
    for (int shape = 0; shape < 3; ++shape) {
        INFO("shape " << shape);
        Gradient g = make_gradient(rng, spectrum(h, shapes[shape]), other, shape == 1);
        double oracle = energy_of_first(g.sigma, r);
        check_projection(g, r, project(device, g, r, ProjectionMethod::gram), 1 - 1e-6, oracle);
        Outcome cold = project(device, g, r, ProjectionMethod::subspace);
        check_projection(g, r, cold, 0.999, oracle);
        // Warm: the projection of a noisy gradient is a start that four iterations finish.
        Gradient noisy = g;
        std::vector<float> noise = random_normal(rng, int64_t(g.g.size()), 0.5f * float(std::sqrt(squared_norm64(g.g) / double(g.g.size()))));
        for (size_t i = 0; i < noise.size(); ++i) noisy.g[i] += noise[i];
        check_projection(g, r, project(device, g, r, ProjectionMethod::subspace, project(device, noisy, r, ProjectionMethod::gram).p), 0.999, oracle);
    }
}

void check_gaussian(Device& device) {  // no gap anywhere: the worst case
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    int64_t h = 128, other = 344, r = 32;
    Gradient g{random_normal(rng, h * other, 1e-4f), other, h, h, false, {}, {}};
    std::vector<float> gt = transposed(g.g, other, h);
    std::vector<double> lambda = jacobi_eigen(times_transposed(gt, gt, h, h, other), h).values;
    double oracle = std::accumulate(lambda.begin(), lambda.begin() + r, 0.0);
    check_projection(g, r, project(device, g, r, ProjectionMethod::gram), 1 - 1e-6, oracle);
    check_projection(g, r, project(device, g, r, ProjectionMethod::subspace), 0.99, oracle);
}

void check_odd_ends(Device& device) {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    int64_t h = 150, other = 201, r = 37;
    Gradient g{random_normal(rng, h * other), other, h, h, false, {}, {}};
    for (ProjectionMethod method : {ProjectionMethod::gram, ProjectionMethod::subspace}) {
        INFO("method " << int(method));
        Outcome first = project(device, g, r, method), again = project(device, g, r, method);
        CHECK(first.p == again.p);
        CHECK(first.result.captured_energy == again.result.captured_energy);
        CHECK((project(device, g, r, method, {}, 2).p == first.p) == (method == ProjectionMethod::gram));

        for (float bad : {NAN, INFINITY}) {
            Gradient broken = g;
            broken.g[1234] = bad;
            CHECK_FALSE(project(device, broken, r, method).result.ok);
        }
        Gradient zero = g;
        std::fill(zero.g.begin(), zero.g.end(), 0.0f);
        CHECK_FALSE(project(device, zero, r, method).result.ok);

        // Rank 3 < r, and only three input columns touched: the rest of P is arbitrary but orthonormal.
        for (int64_t i = 0; i < other; ++i)
            for (int64_t j = 0; j < 3; ++j) zero.g[i * h + 40 * j] = g.g[i * h + j];
        Outcome low = project(device, zero, r, method);
        REQUIRE(low.result.ok);
        CHECK(low.result.captured_energy == Approx(1.0).epsilon(1e-5));
        CHECK(orthonormality_error(low.p, r, h) < 1e-5);
    }
    // One direction far above everything else, as when training starts or diverges; warm and cold.
    int64_t wide = 640, rank = 256;
    Gradient steep{random_normal(rng, wide * 400, 1e-5f), 400, wide, wide, false, {}, {}};
    std::vector<float> u = random_normal(rng, 400), v = random_normal(rng, wide);
    for (int64_t i = 0; i < 400; ++i)
        for (int64_t j = 0; j < wide; ++j) steep.g[i * wide + j] += u[i] * v[j];
    Outcome cold = project(device, steep, rank, ProjectionMethod::subspace);
    REQUIRE(cold.result.ok);
    CHECK(orthonormality_error(cold.p, rank, wide) < 1e-5);
    Outcome warm = project(device, steep, rank, ProjectionMethod::subspace, cold.p);
    REQUIRE(warm.result.ok);
    CHECK(warm.result.captured_energy == Approx(1.0).epsilon(1e-5));

    // A previous P of zeros is no start, and no reason to fail.
    CHECK(project(device, g, r, ProjectionMethod::subspace, std::vector<float>(r * h, 0.0f)).result.ok);
    Gradient tiny{random_normal(rng, 3 * 2), 3, 2, 2, false, {}, {}};
    CHECK(project(device, tiny, 2, ProjectionMethod::gram).result.captured_energy == Approx(1.0).epsilon(1e-5));
    CHECK(project(device, tiny, 2, ProjectionMethod::subspace).result.captured_energy == Approx(1.0).epsilon(1e-5));
}

}  // namespace

TEST_CASE("subspace_size leaves room beyond r, in steps of 64, within h", "[projection]") {
    CHECK(subspace_size(1024, 4096) == 1152);
    CHECK(subspace_size(128, 512) == 192);
    CHECK(subspace_size(256, 768) == 320);
    CHECK(subspace_size(48, 64) == 64);
}

TEST_CASE("projections capture the leading singular vectors of known spectra", "[projection]") { check_spectra(*test_device("cpu"), 192, 272, 48); }
TEST_CASE("projections of Gaussian gradients", "[projection]") { check_gaussian(*test_device("cpu")); }
TEST_CASE("projections are deterministic and refuse zero and non-finite gradients", "[projection]") { check_odd_ends(*test_device("cpu")); }

TEST_CASE("projections on the GPU: known spectra", "[projection][gpu]") {
    auto device = test_device("cuda");
    check_spectra(*device, 192, 272, 48);
    check_spectra(*device, 512, 1376, 128);
}
TEST_CASE("projections on the GPU: Gaussian gradients", "[projection][gpu]") { check_gaussian(*test_device("cuda")); }
TEST_CASE("projections on the GPU: determinism, zero and non-finite gradients", "[projection][gpu]") { check_odd_ends(*test_device("cuda")); }

TEST_CASE("a dry projection counts the scratch that a real one uses", "[projection]") {
    for (ProjectionMethod method : {ProjectionMethod::gram, ProjectionMethod::subspace}) {
        auto dry = Device::open_dry(DeviceKind::cpu), real = test_device("cpu");
        std::mt19937_64 rng(1);
        std::vector<float> gradient = random_normal(rng, 300 * 200);
        for (Device* device : {dry.get(), real.get()}) {
            Tensor g{device->allocate(300 * 200 * 4, "g"), DType::f32, 300, 200, 200}, p{device->allocate(40 * 200 * 4, "p"), DType::f32, 40, 200, 200};
            device->upload(g.data, gradient.data(), g.bytes());
            CHECK(leading_singular_vectors(*device, p, g, false, method, Tensor{}, 1, 2).ok);
        }
        CHECK(dry->scratch_high_water() == real->scratch_high_water());
    }
}

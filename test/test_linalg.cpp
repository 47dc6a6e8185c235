// Cholesky solves, eigenvectors and orthonormalization against fp64 oracles.
#include <array>

#include "ops/linalg.h"
#include "test/jacobi.h"
#include "test/support.h"

namespace {

std::vector<float> to_floats(const Matrix64& a) { return std::vector<float>(a.begin(), a.end()); }

// A symmetric matrix with the given eigenvalues and random eigenvectors.
Matrix64 symmetric_with(std::mt19937_64& rng, const std::vector<double>& eigenvalues) {
    int64_t m = int64_t(eigenvalues.size());
    Matrix64 columns = transposed(random_orthonormal(rng, m, m), m, m), scaled = columns;
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < m; ++j) scaled[i * m + j] *= eigenvalues[j];
    return times_transposed(scaled, columns, m, m, m);
}

// p = Vᵀ·diag(singular values)·V·U with orthonormal V and rows of U, and what its inverse must be.
struct Invertible {
    std::vector<float> p, inverse;
};

Invertible with_singular_values(std::mt19937_64& rng, const std::vector<double>& values, int64_t h) {
    int64_t r = int64_t(values.size());
    Matrix64 v = random_orthonormal(rng, r, r), u = transposed(random_orthonormal(rng, r, h), r, h), columns = transposed(v, r, r);
    auto product = [&](bool inverted) {
        Matrix64 scaled = columns;
        for (int64_t i = 0; i < r; ++i)
            for (int64_t j = 0; j < r; ++j) scaled[i * r + j] *= inverted ? 1.0 / values[j] : values[j];
        return to_floats(times_transposed(times_transposed(scaled, columns, r, r, r), u, r, h, r));
    };
    return {product(false), product(true)};
}

void check_pseudo_inverse(Device& device) {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (auto [r, h, pad] : {std::array<int64_t, 3>{1, 1, 0}, {1, 9, 2}, {2, 5, 0}, {17, 17, 3}, {64, 200, 0}, {100, 333, 5}}) {
        INFO("r " << r << " h " << h << " pad " << pad);
        std::vector<double> values(r);
        for (int64_t i = 0; i < r; ++i) values[i] = 0.7 + 0.9 * double(i) / double(r);
        Invertible x = with_singular_values(rng, values, h);
        OnDevice p(device, DType::f32, r, h, x.p, h + pad), inverse(device, DType::f32, r, h, h + 2 * pad);
        REQUIRE(pseudo_inverse(device, inverse, p));
        CHECK(relative_error(inverse.read(), x.inverse) < 5e-6);
        CHECK(p.read() == x.p);
    }

    auto invertible = [&](const std::vector<float>& rows) {
        OnDevice p(device, DType::f32, 32, 40, rows), inverse(device, DType::f32, 32, 40);
        return pseudo_inverse(device, inverse, p);
    };
    std::vector<double> values(32, 1.0);
    CHECK(invertible(with_singular_values(rng, values, 40).p));
    // Singular to fp32's precision, whatever sign the rounding leaves.
    values[5] = 1e-4;
    CHECK_FALSE(invertible(with_singular_values(rng, values, 40).p));
    // Two rows that agree to the last bit but one: the factorization may succeed on a pivot of pure rounding noise.
    std::vector<float> twins(32 * 40, 0.0f);
    for (int i = 0; i < 32; ++i) twins[i * 41] = 1.0f;
    CHECK(invertible(twins));
    std::copy(twins.begin(), twins.begin() + 40, twins.begin() + 40);
    twins[41] = 1e-5f;
    CHECK_FALSE(invertible(twins));
    CHECK_FALSE(invertible(std::vector<float>(32 * 40, 0.0f)));
    CHECK_FALSE(invertible(std::vector<float>(32 * 40, NAN)));
}

// Every property that makes rows of v the top eigenvectors of c: C·v = λv, orthonormal, λ right, order, signs.
void check_eigenvectors(Device& device, const Matrix64& c, int64_t m, int64_t r, int64_t pad) {
    INFO("m " << m << " r " << r << " pad " << pad);
    std::vector<float> c32 = to_floats(c), values;
    SymmetricEigen oracle = jacobi_eigen(Matrix64(c32.begin(), c32.end()), m);
    double scale = std::max({std::fabs(oracle.values.front()), std::fabs(oracle.values.back()), 1e-30});
    OnDevice dc(device, DType::f32, m, m, c32, m + pad), dv(device, DType::f32, r, m, m + 2 * pad);
    REQUIRE(top_eigenvectors(device, dv, values, dc));
    std::vector<float> v = dv.read();
    CHECK(orthonormality_error(v, r, m) < 1e-5);
    Matrix64 image = times_transposed(v, c32, r, m, m);
    double worst_value = 0, worst_residual = 0;
    for (int64_t i = 0; i < r; ++i) {
        worst_value = std::max(worst_value, std::fabs(values[i] - oracle.values[i]) / scale);
        double residual = 0;
        float largest = 0;
        for (int64_t j = 0; j < m; ++j) {
            double e = image[i * m + j] - double(values[i]) * double(v[i * m + j]);
            residual += e * e;
            if (std::fabs(v[i * m + j]) > std::fabs(largest)) largest = v[i * m + j];
        }
        worst_residual = std::max(worst_residual, std::sqrt(residual) / scale);
        CHECK(largest > 0);
        if (i > 0) CHECK(values[i] <= values[i - 1]);
    }
    CHECK(worst_value < 5e-6);
    CHECK(worst_residual < 2e-5);
}

void check_all_eigenvectors(Device& device) {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (int64_t m : {1, 2, 5, 33, 64, 100})
        for (int64_t r : {int64_t(1), (m + 3) / 4, m}) {
            Matrix64 g(m * (m + 10));
            std::normal_distribution<double> normal;
            for (double& x : g) x = normal(rng);
            check_eigenvectors(device, times_transposed(g, g, m, m, m + 10), m, r, m == 33 ? 7 : 0);
        }
    check_eigenvectors(device, symmetric_with(rng, std::vector<double>(40, 3.0)), 40, 10, 0);  // one eigenvalue, forty times
    std::vector<double> rank_two(50, 0.0), mixed(50);
    rank_two[0] = 5, rank_two[1] = 0.01;
    for (int i = 0; i < 50; ++i) mixed[i] = i % 2 ? -1.0 - i : 0.1 * i;  // the largest in magnitude are negative: not the top ones
    check_eigenvectors(device, symmetric_with(rng, rank_two), 50, 8, 0);
    check_eigenvectors(device, symmetric_with(rng, mixed), 50, 30, 1);
}

// kind 0: Gaussian rows; 1: singular values from 1 to 1e-6; 2: rows of very different norms.
void check_orthonormalize(Device& device, std::mt19937_64& rng, int64_t k, int64_t m, int kind, int64_t pad) {
    INFO("k " << k << " m " << m << " kind " << kind << " pad " << pad);
    Matrix64 y(k * m);
    if (kind == 1) {
        Matrix64 left = random_orthonormal(rng, k, k), right = transposed(random_orthonormal(rng, k, m), k, m);
        for (int64_t i = 0; i < k; ++i)
            for (int64_t j = 0; j < k; ++j) left[i * k + j] *= std::pow(1e-6, double(j) / double(std::max<int64_t>(k - 1, 1)));
        y = times_transposed(left, right, k, m, k);
    } else {
        std::normal_distribution<double> normal;
        for (int64_t i = 0; i < k; ++i)
            for (int64_t j = 0; j < m; ++j) y[i * m + j] = normal(rng) * (kind == 2 ? std::pow(10.0, -8.0 * double(i) / double(k)) : 1.0);
    }
    std::vector<float> y32 = to_floats(y);
    OnDevice dy(device, DType::f32, k, m, y32, m + pad);
    REQUIRE(orthonormalize_rows(device, dy));
    std::vector<float> q = dy.read();
    CHECK(orthonormality_error(q, k, m) < 3e-6);
    // The span is unchanged: projecting y on q gives y back.
    Matrix64 coefficients = times_transposed(y32, q, k, k, m), projected = times_transposed(coefficients, transposed(q, k, m), k, m, k);
    CHECK(relative_error(projected, y32) < 2e-6);
}

void check_orthonormalization(Device& device) {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (int kind : {0, 1, 2}) {
        check_orthonormalize(device, rng, 1, 5, kind, 0);
        check_orthonormalize(device, rng, 20, 33, kind, 3);
        check_orthonormalize(device, rng, 96, 200, kind, 0);
        if (kind != 0) continue;
        check_orthonormalize(device, rng, 40, 40, kind, 0);
    }
    std::vector<float> y = random_normal(rng, 8 * 30);
    std::fill_n(&y[3 * 30], 30, 0.0f);
    OnDevice zero_row(device, DType::f32, 8, 30, y);
    CHECK_FALSE(orthonormalize_rows(device, zero_row));
    y[3 * 30] = NAN;
    zero_row.write(y);
    CHECK_FALSE(orthonormalize_rows(device, zero_row));
    CHECK_FALSE(orthonormalize_rows(device, zero_row, Degenerate::complete));

    // Rank 3 of 64 rows, some of them zero: completed to an orthonormal basis that holds the span.
    const int64_t k = 64, m = 150;
    std::vector<float> basis = random_normal(rng, 3 * m), mix = random_normal(rng, k * 3), low(k * m, 0.0f);
    for (int64_t i = 0; i < k; ++i)
        for (int64_t l = 0; l < 3 && i % 5; ++l)
            for (int64_t j = 0; j < m; ++j) low[i * m + j] += mix[i * 3 + l] * basis[l * m + j];
    OnDevice degenerate(device, DType::f32, k, m, low, m + 2);
    REQUIRE(orthonormalize_rows(device, degenerate, Degenerate::complete));
    std::vector<float> q = degenerate.read();
    CHECK(orthonormality_error(q, k, m) < 3e-6);
    Matrix64 coefficients = times_transposed(low, q, k, k, m);
    CHECK(relative_error(times_transposed(coefficients, transposed(q, k, m), k, m, k), low) < 5e-6);
}

void check_gather(Device& device) {
    std::vector<float> v = {1, -3, 2, 0, 0, 0, -2, 2, -1, 5, -4, 3};
    OnDevice src(device, DType::f32, 4, 3, v, 5), dst(device, DType::f32, 3, 3, 4);
    gather_rows(device, dst, src, {3, 0, 2});
    CHECK(dst.read() == std::vector<float>{5, -4, 3, -1, 3, -2, 2, -2, 1});
    gather_rows(device, dst, src, {1, 1, 0});
    CHECK(dst.read() == std::vector<float>{0, 0, 0, 0, 0, 0, -1, 3, -2});
    OnDevice square(device, DType::f32, 3, 3, std::vector<float>{1, 2, 3, 4, 5, 6, 7, 8, 9}, 7);
    CHECK(diagonal(device, square) == std::vector<float>{1, 5, 9});
}

// Chains of products and single passes, as an iteration makes them, end orthonormal in the span where the exact ones do; what cannot be
// factored is reported.
void check_unchecked(Device& device) {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    int64_t k = 40, m = 131;
    std::vector<float> rows = random_normal(rng, k * m);
    for (int64_t i = 0; i < k * m; ++i) rows[i] *= std::pow(10.0f, float(i / m) / 5 - 4);  // rows of very different norms
    OnDevice failed(device, DType::i32, 1, 1, std::vector<float>{0}), y(device, DType::f32, k, m, rows, m + 1);
    orthonormalize_unchecked(device, y, true, failed.t.as<int32_t>());
    CHECK(orthonormality_error(y.read(), k, m) < 0.1);
    orthonormalize_unchecked(device, y, false, failed.t.as<int32_t>());
    CHECK(failed.read()[0] == 0);
    std::vector<float> q = y.read();
    CHECK(orthonormality_error(q, k, m) < 3e-6);
    Matrix64 coefficients = times_transposed(rows, q, k, k, m);
    CHECK(relative_error(times_transposed(coefficients, transposed(q, k, m), k, m, k), rows) < 5e-6);

    for (float bad : {0.0f, NAN}) {
        std::fill(rows.begin() + 3 * m, rows.begin() + 4 * m, bad);
        y.write(rows);
        failed.write({0});
        orthonormalize_unchecked(device, y, true, failed.t.as<int32_t>());
        CHECK(failed.read()[0] == 1);
    }
    // A later success does not hide an earlier failure.
    y.write(random_normal(rng, k * m));
    orthonormalize_unchecked(device, y, false, failed.t.as<int32_t>());
    CHECK(failed.read()[0] == 1);
}

}  // namespace

TEST_CASE("the Jacobi oracle diagonalizes", "[linalg]") {
    std::mt19937_64 rng(fresh_seed());
    std::vector<double> spectrum = {7, 3, 3, 1, 0.5, 0, -2};
    SymmetricEigen eigen = jacobi_eigen(symmetric_with(rng, spectrum), 7);
    CHECK(relative_error(eigen.values, spectrum) < 1e-13);
    CHECK(orthonormality_error(eigen.vectors, 7, 7) < 1e-13);
}

TEST_CASE("pseudo_inverse inverts, and refuses what has no full row rank", "[linalg]") { check_pseudo_inverse(*test_device("cpu")); }
TEST_CASE("top_eigenvectors agrees with Jacobi", "[linalg]") { check_all_eigenvectors(*test_device("cpu")); }
TEST_CASE("orthonormalize_rows is orthonormal to 3e-6 at any conditioning and keeps the span", "[linalg]") { check_orthonormalization(*test_device("cpu")); }
TEST_CASE("gather_rows picks rows and makes their largest entry positive", "[linalg]") { check_gather(*test_device("cpu")); }
TEST_CASE("orthonormalize_unchecked: single passes in between, failures are kept", "[linalg]") { check_unchecked(*test_device("cpu")); }

TEST_CASE("pseudo_inverse on the GPU", "[linalg][gpu]") { check_pseudo_inverse(*test_device("cuda")); }
TEST_CASE("top_eigenvectors on the GPU", "[linalg][gpu]") { check_all_eigenvectors(*test_device("cuda")); }
TEST_CASE("orthonormalize_rows on the GPU", "[linalg][gpu]") { check_orthonormalization(*test_device("cuda")); }
TEST_CASE("gather_rows on the GPU", "[linalg][gpu]") { check_gather(*test_device("cuda")); }
TEST_CASE("orthonormalize_unchecked on the GPU", "[linalg][gpu]") { check_unchecked(*test_device("cuda")); }

TEST_CASE("solver workspaces fit what is planned without a GPU, up to the sizes of the presets", "[linalg][gpu]") {
    // The operations compare cuSOLVER's own answer with the planned bytes and throw if it is larger.
    auto device = test_device("cuda", int64_t(1) << 30);
    std::mt19937_64 rng(fresh_seed());
    std::vector<float> values;
    for (int64_t m : {3, 64, 500, 768, 1024, 2048, 4096, 5120}) {
        INFO("order " << m);
        OnDevice identity(*device, DType::f32, m, m), v(*device, DType::f32, (m + 3) / 4, m);
        std::vector<float> eye(m * m, 0.0f);
        for (int64_t i = 0; i < m; ++i) eye[i * m + i] = 1.0f + float(i % 7);
        identity.write(eye);
        CHECK(top_eigenvectors(*device, v, values, identity));
        CHECK(values[0] == Approx(m > 6 ? 7.0 : double(m)));
        identity.write(eye);
        OnDevice inverse(*device, DType::f32, m, m);
        CHECK(pseudo_inverse(*device, inverse, identity));
    }
}

TEST_CASE("a dry run of the solvers counts the scratch that a real one uses", "[linalg]") {
    std::vector<float> values;
    std::mt19937_64 rng(1);
    auto dry = Device::open_dry(DeviceKind::cpu), real = test_device("cpu");
    for (Device* device : {dry.get(), real.get()}) {
        Tensor c{device->allocate(64 * 64 * 4, "c"), DType::f32, 64, 64, 64}, v{device->allocate(16 * 64 * 4, "v"), DType::f32, 16, 64, 64};
        device->upload(c.data, to_floats(symmetric_with(rng, std::vector<double>(64, 1.0))).data(), c.bytes());
        CHECK(top_eigenvectors(*device, v, values, c));
        CHECK(orthonormalize_rows(*device, v));
    }
    CHECK(dry->scratch_high_water() == real->scratch_high_water());
    CHECK(dry->scratch_high_water() > 2 * 64 * 64 * 4);
}

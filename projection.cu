// Leading singular vectors of a gradient. See projection.h. Device-neutral: everything is a product or a factorization from ops/.
#include "projection.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "ops/elementwise.h"
#include "ops/linalg.h"
#include "ops/matmul.h"
#include "runtime/philox.h"

namespace {

constexpr int kWarmIterations = 4, kColdIterations = 8;
// Iterating on C + δI instead of C (trace C = 1) changes no eigenvector but keeps the iterates of full rank when G has fewer than k
// singular values worth the name.
constexpr float kDiagonalShift = 1.0f / 8388608.0f;  // 2^-23

// ‖g‖²_F, NaN or Inf if an element is or the sum overflows.
double squared_norm(Device& device, Tensor g) {
    ScratchScope scratch(device);
    Tensor sums = scratch.tensor("squared norm", DType::f64, 1, 1);
    sum_of_squares(device, sums.as<double>(), 0, g);
    double value = 1.0;  // what a dry device goes on with
    device.download(&value, sums.data, sizeof value);
    return value;
}

// The eigenvalues of C are the squared singular values over their sum.
float sum_of(const std::vector<float>& values) {
    double sum = 0;
    for (float v : values) sum += v;
    return float(sum);
}

// Rows `begin`… of q become standard normal numbers.
void fill_normal(Device& device, Tensor q, int64_t begin, uint64_t seed, uint32_t stream) {
    if (device.dry() || begin == q.rows) return;
    std::vector<float> values((q.rows - begin) * q.cols);
    int64_t offset = begin * q.cols;
#pragma omp parallel for
    for (int64_t i = 0; i < int64_t(values.size()); ++i) values[i] = normal_draw(seed, stream, uint64_t(offset + i));
    device.upload(q.at(begin, 0), values.data(), int64_t(values.size() * sizeof(float)));
}

bool gram_vectors(Device& device, Tensor p, Tensor c, float* energy) {
    std::vector<float> values;
    bool ok = top_eigenvectors(device, p, values, c);
    *energy = sum_of(values);
    return ok;
}

bool subspace_vectors(Device& device, Tensor p, Tensor c, Tensor previous, uint64_t seed, uint32_t stream, float* energy) {
    int64_t h = c.rows, k = subspace_size(p.rows, h);
    ScratchScope scratch(device);
    Tensor q = scratch.tensor("subspace", DType::f32, k, h), y = scratch.tensor("subspace image", DType::f32, k, h);

    bool warm = false;
    if (previous) {
        convert(device, q.row_slice(0, previous.rows), previous);
        fill_normal(device, q, previous.rows, seed, stream);
        warm = orthonormalize_rows(device, q);
    }
    if (!warm) {  // nothing to start from, or a degenerate P
        fill_normal(device, q, 0, seed, stream);
        if (!orthonormalize_rows(device, q)) return false;
    }
    for (int i = 0; i < (warm ? kWarmIterations : kColdIterations); ++i) {
        matmul(device, y, 1.0f, q, Op::none, c, Op::none, kDiagonalShift, q);
        if (!orthonormalize_rows(device, y, Degenerate::complete)) return false;  // a gradient may have a rank far below k
        std::swap(q, y);
    }

    // Rayleigh–Ritz: the best r directions within the span of q.
    Tensor t = scratch.tensor("projected Gram matrix", DType::f32, k, k), s = scratch.tensor("Ritz vectors", DType::f32, p.rows, k);
    matmul(device, y, 1.0f, q, Op::none, c, Op::none);
    matmul(device, t, 1.0f, y, Op::none, q, Op::transpose);
    std::vector<float> values;
    if (!top_eigenvectors(device, s, values, t)) return false;
    matmul(device, p, 1.0f, s, Op::none, q, Op::none);
    fix_row_signs(device, p);
    *energy = sum_of(values);
    return true;
}

}  // namespace

int64_t subspace_size(int64_t r, int64_t h) { return std::min(h, round_up(r + std::max<int64_t>(32, r / 8), 64)); }

ProjectionResult leading_singular_vectors(Device& device, Tensor p, Tensor g, bool right, ProjectionMethod method, Tensor previous, uint64_t seed,
                                          uint32_t stream) {
    int64_t h = right ? g.rows : g.cols;
    CHECK_INTERNAL(p.cols == h && p.rows <= h && p.dtype == DType::f32 && g.dtype == DType::f32, "p %lld×%lld for a %s gradient %lld×%lld",
                   (long long)p.rows, (long long)p.cols, right ? "right" : "left", (long long)g.rows, (long long)g.cols);
    CHECK_INTERNAL(!previous || (previous.cols == h && previous.rows <= p.rows), "previous is %lld×%lld, p %lld×%lld", (long long)previous.rows,
                   (long long)previous.cols, (long long)p.rows, (long long)p.cols);
    double norm = squared_norm(device, g);
    // Outside fp32's normal range the Gram matrix would be lost; such a gradient is as good as zero or infinite.
    if (!(norm >= FLT_MIN && norm <= FLT_MAX)) return {false, 0.0f};

    ScratchScope scratch(device);
    Tensor c = scratch.tensor("Gram matrix of the gradient", DType::f32, h, h);
    matmul(device, c, float(1.0 / norm), g, right ? Op::none : Op::transpose, g, right ? Op::transpose : Op::none);

    float energy = 0;
    bool ok = method == ProjectionMethod::gram ? gram_vectors(device, p, c, &energy)
                                               : subspace_vectors(device, p, c, previous, seed, stream, &energy);
    ok = ok && std::isfinite(energy);
    return {ok, ok ? energy : 0.0f};
}

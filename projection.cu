// Leading singular vectors of a gradient. See projection.h. Device-neutral: everything is a product or a factorization from ops/.
#include "projection.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <numeric>

#include "ops/elementwise.h"
#include "ops/linalg.h"
#include "ops/matmul.h"
#include "ops/random.h"

namespace {

constexpr int kWarmIterations = 6, kColdIterations = 12;
// Iterating on C + δI instead of C (trace C = 1) changes no eigenvector but keeps the iterates of full rank when G has fewer than k
// singular values worth the name.
constexpr float kDiagonalShift = 1.0f / 8388608.0f;  // 2^-23
// ‖G‖² below which the Gram matrix, made before its scale is known, would leave fp32's normal range. Such a gradient is as good as zero.
constexpr double kLeastTrace = 1e-26;

// The eigenvalues of C are the squared singular values over their sum.
float sum_of(const std::vector<float>& values) {
    double sum = 0;
    for (float v : values) sum += v;
    return float(sum);
}

bool gram_vectors(Device& device, Tensor p, Tensor c, float* energy) {
    std::vector<float> values;
    bool ok = top_eigenvectors(device, p, values, c);
    *energy = sum_of(values);
    return ok;
}

// Orthogonal iteration from the span of `previous`, filled up with random directions, or from random ones.
struct SubspaceIteration {
    Device& device;
    Tensor c, previous;
    uint64_t seed;
    uint32_t stream;
    Tensor q, y;      // (k, h): the subspace and its image
    int32_t* failed;  // device

    void start(bool warm) {
        int64_t kept = warm ? previous.rows : 0;
        if (kept) convert(device, q.row_slice(0, kept), previous);
        fill_normal(device, q.row_slice(kept, q.rows - kept), 1.0f, seed, stream, uint64_t(kept * q.cols));
    }

    void apply(Fp32Products products) { matmul(device, y, 1.0f, q, Op::none, c, Op::none, kDiagonalShift, q, products); }

    // Waits for nothing. Between iterations the rows need only be well conditioned, which takes one pass of CholeskyQR, and rounding
    // C and Q to TF32 moves no direction by more than the next iteration puts right; the last one is exact. False in *failed if a pass failed.
    void run_unchecked(bool warm) {
        start(warm);
        for (int i = warm ? kWarmIterations : kColdIterations; i-- > 0; std::swap(q, y)) {
            apply(i > 0 ? Fp32Products::tf32 : Fp32Products::exact);
            orthonormalize_unchecked(device, y, i > 0, failed);
        }
    }

    // For gradients of a rank far below k, or steep beyond what one pass can hold.
    bool run_checked() {
        bool warm = false;
        if (previous) {
            start(true);
            warm = orthonormalize_rows(device, q);
        }
        if (!warm) {  // nothing to start from, or a degenerate P
            start(false);
            if (!orthonormalize_rows(device, q)) return false;
        }
        for (int i = warm ? kWarmIterations : kColdIterations; i-- > 0; std::swap(q, y)) {
            apply(Fp32Products::exact);
            if (!orthonormalize_rows(device, y, Degenerate::complete)) return false;
        }
        return true;
    }

    // The best directions within the span of q to the rows of p, best first. Iterates are nested, the span of the first rows of q having
    // been iterated upon alone, so that those hold the leading directions already: only the last rows are worth Rayleigh–Ritz, which costs
    // more than all iterations together if done on all. t: (k, k).
    bool best_directions(Tensor p, Tensor t, std::vector<float>& values) {
        const int64_t k = q.rows, tail = ritz_size(p.rows, k), head = k - tail, chosen = p.rows - head;
        matmul(device, y, 1.0f, q, Op::none, c, Op::none);
        matmul(device, t, 1.0f, y, Op::none, q, Op::transpose);
        ScratchScope scratch(device);
        Tensor s = scratch.tensor("Ritz vectors", DType::f32, chosen, tail);
        std::vector<float> captured = diagonal(device, t.row_slice(0, head).col_slice(0, head));
        if (!top_eigenvectors(device, s, values, t.row_slice(head, tail).col_slice(head, tail))) return false;
        convert(device, y.row_slice(0, head), q.row_slice(0, head));
        matmul(device, y.row_slice(head, chosen), 1.0f, s, Op::none, q.row_slice(head, tail), Op::none);
        values.insert(values.begin(), captured.begin(), captured.end());
        std::vector<int32_t> order(p.rows);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return values[a] > values[b]; });
        gather_rows(device, p, y, order);
        return true;
    }

    // Rows that take part in Rayleigh–Ritz: twice those that are given up, and all where that is cheap.
    static int64_t ritz_size(int64_t r, int64_t k) { return std::min(k, std::max<int64_t>(128, 2 * (k - r))); }
};

bool subspace_vectors(Device& device, Tensor p, Tensor c, Tensor previous, uint64_t seed, uint32_t stream, float* energy) {
    int64_t h = c.rows, k = subspace_size(p.rows, h);
    ScratchScope scratch(device);
    Tensor q = scratch.tensor("subspace", DType::f32, k, h), y = scratch.tensor("subspace image", DType::f32, k, h);
    Tensor t = scratch.tensor("projected Gram matrix", DType::f32, k, k), failed = scratch.tensor("failure flag", DType::i32, 1, 1);
    SubspaceIteration iteration{device, c, previous, seed, stream, q, y, failed.as<int32_t>()};

    device.zero(failed);
    iteration.run_unchecked(bool(previous));
    int32_t bad = device.dry();  // a dry device counts both ways
    device.download(&bad, failed.data, sizeof bad);
    std::vector<float> values;
    bool ok = (!bad || iteration.run_checked()) && iteration.best_directions(p, t, values);
    *energy = sum_of(values);
    return ok;
}

}  // namespace

int64_t subspace_size(int64_t r, int64_t h) { return std::min(h, round_up(r + std::max<int64_t>(32, r / 8), 64)); }

void gradient_gram(Device& device, Tensor c, Tensor g, bool right, ProjectionMethod method) {
    int64_t h = right ? g.rows : g.cols;
    CHECK_INTERNAL(c.rows == h && c.cols == h && c.dtype == DType::f32 && g.dtype == DType::f32, "Gram matrix %lld×%lld of a %s gradient %lld×%lld",
                   (long long)c.rows, (long long)c.cols, right ? "right" : "left", (long long)g.rows, (long long)g.cols);
    matmul(device, c, 1.0f, g, right ? Op::none : Op::transpose, g, right ? Op::transpose : Op::none, 0.0f,
           method == ProjectionMethod::gram ? Fp32Products::exact : Fp32Products::tf32);
}

ProjectionResult leading_eigenvectors(Device& device, Tensor p, Tensor c, ProjectionMethod method, Tensor previous, uint64_t seed, uint32_t stream) {
    int64_t h = c.rows;
    CHECK_INTERNAL(p.cols == h && p.rows <= h && p.dtype == DType::f32 && c.cols == h && c.dtype == DType::f32, "p %lld×%lld of a Gram matrix %lld×%lld",
                   (long long)p.rows, (long long)p.cols, (long long)c.rows, (long long)c.cols);
    CHECK_INTERNAL(!previous || (previous.cols == h && previous.rows <= p.rows), "previous is %lld×%lld, p %lld×%lld", (long long)previous.rows,
                   (long long)previous.cols, (long long)p.rows, (long long)p.cols);
    // ‖G‖²_F. NaN or Inf if an element is or a square overflows.
    double trace = 0;
    for (float x : diagonal(device, c)) trace += x;
    if (!(trace >= kLeastTrace && trace <= FLT_MAX)) return {false, 0.0f};
    axpby(device, c, float(1.0 / trace), c, 0.0f);

    float energy = 0;
    bool ok = method == ProjectionMethod::gram ? gram_vectors(device, p, c, &energy)
                                               : subspace_vectors(device, p, c, previous, seed, stream, &energy);
    ok = ok && std::isfinite(energy);
    return {ok, ok ? energy : 0.0f};
}

ProjectionResult leading_singular_vectors(Device& device, Tensor p, Tensor g, bool right, ProjectionMethod method, Tensor previous, uint64_t seed,
                                          uint32_t stream) {
    ScratchScope scratch(device);
    int64_t h = right ? g.rows : g.cols;
    Tensor c = scratch.tensor("Gram matrix of the gradient", DType::f32, h, h);
    gradient_gram(device, c, g, right, method);
    return leading_eigenvectors(device, p, c, method, previous, seed, stream);
}

// Error-compensated quantization. See compensation.h. Device-neutral.
#include "compensation.h"

#include <algorithm>
#include <cmath>

#include "ops/elementwise.h"
#include "ops/linalg.h"
#include "ops/matmul.h"
#include "runtime/profile.h"

namespace {

// One alternation after the other, none of which waits for the GPU: squared errors stay on the device until all is done.
// The only full-size buffer is Ŵ; W − deq(Q) takes its place, in the type of B, from a quantization to the next fit.
struct Alternation {
    Device& device;
    const Nf4Tensor& q;
    Tensor b, w, p;
    bool right;
    float scale;
    Tensor target;        // (out, in) f32: Ŵ
    Tensor residual;      // the same memory in the type of B: W − deq(Q)
    Tensor fitted, b32;   // (n, r), with as many rows as target has columns if that is more: B in its type and in fp32
    Tensor inverse;       // (r, h), type of B: transpose of P⁺ = Pᵀ(P·Pᵀ)⁻¹
    double* squares;      // [0] ‖W‖²; of round i: [2i − 1] ‖W − deq(Q)‖², [2i] ‖W − deq(Q) − s·P·B‖²

    // q ← NF4(w), B ← 0
    void without_adapter() {
        nf4_quantize(device, q, w, nullptr);
        nf4_residual(device, Tensor{}, w, q, squares, 1);
        device.zero(fitted);
        store_b();
    }

    void store_b() { convert(device, b, fitted.row_slice(0, b.rows)); }

    // The rounds 1 … last. Leaves their squared errors.
    void run(int last) {
        for (int round = 1; round <= last; ++round) {
            nf4_quantize(device, q, round == 1 ? w : target, nullptr);
            nf4_residual(device, residual, w, q, squares, 2 * round - 1);
            // B ← (1/s)·(W − deq(Q))·P⁺, rounded as it will be stored: relative error 2⁻⁹, whatever the product's inputs lose is less.
            matmul(device, fitted, 1.0f / scale, wide(residual), right ? Op::transpose : Op::none, inverse, Op::transpose, 0.0f, Fp32Products::tf32);
            convert(device, b32, fitted);
            // Ŵ ← W − s·P·B. TF32 holds B exactly and P to 2⁻¹²: 2⁻¹² of s·P·B, which itself is a tenth of W.
            if (right) matmul(device, wide(target), -scale, p, Op::transpose, b32, Op::transpose, 1.0f, wide(w), Fp32Products::tf32);
            else matmul(device, target, -scale, b32, Op::none, p, Op::none, 1.0f, w, Fp32Products::tf32);
            nf4_residual(device, Tensor{}, target, q, squares, 2 * round);
        }
        store_b();
    }

    // A right matrix with its padding up to target's: products are faster where no width is odd. What the padding holds stays in the padding.
    Tensor wide(Tensor t) const {
        if (right) t.cols = fitted.rows;
        return t;
    }
};

}  // namespace

CompensationResult quantize_with_compensation(Device& device, const Nf4Tensor& q, Tensor b, Tensor w, Tensor p, bool right, float scale, int rounds) {
    int64_t n = right ? w.cols : w.rows, h = right ? w.rows : w.cols, r = p.rows;
    CHECK_INTERNAL(w.dtype == DType::f32 && p.dtype == DType::f32 && q.rows == w.rows && q.cols == w.cols && p.cols == h && b.rows == n && b.cols == r,
                   "%s layer: w %lld×%lld, q %lld×%lld, p %lld×%lld, b %lld×%lld", right ? "right" : "left", (long long)w.rows, (long long)w.cols,
                   (long long)q.rows, (long long)q.cols, (long long)p.rows, (long long)p.cols, (long long)b.rows, (long long)b.cols);
    CHECK_INTERNAL(scale != 0 && rounds >= 0, "scale %g, %d rounds", scale, rounds);
    ScratchScope scratch(device);
    Tensor target = scratch.tensor("compensation target", DType::f32, w.rows, w.cols, round_up(w.cols, 8));
    Tensor residual{target.data, b.dtype, w.rows, w.cols, target.ld};
    const int64_t wide_n = right && w.ld >= target.ld ? target.ld : n;
    Tensor fitted = scratch.tensor("B", b.dtype, wide_n, r), b32 = scratch.tensor("B in fp32", DType::f32, wide_n, r), inverse = scratch.tensor("P⁺", b.dtype, r, h);
    Tensor squares = scratch.tensor("squared errors", DType::f64, 1, 2 * std::max(rounds, 1) + 1);
    Alternation a{device, q, b, w, p, right, scale, target, residual, fitted, b32, inverse, squares.as<double>()};
    OperationTimer timer(device, "quantize_with_compensation", 4.0 * rounds * double(w.numel() * r), 26.0 * rounds * double(w.numel()));

    bool invertible = true;
    if (rounds > 0) {
        ScratchScope inverse_scope(device);
        Tensor inverse32 = inverse_scope.tensor("P⁺ in fp32", DType::f32, r, h);
        invertible = pseudo_inverse(device, inverse32, p);
        convert(device, inverse, inverse32);
    }
    if (!invertible) rounds = 0;
    sum_of_squares(device, a.squares, 0, w);
    if (rounds > 0) a.run(rounds);
    else a.without_adapter();

    std::vector<double> errors(2 * std::max(rounds, 1) + 1, 1.0);  // what a dry device goes on with
    device.download(errors.data(), squares.data, int64_t(errors.size() * sizeof(double)));
    const double w_norm = errors[0] > 0 ? std::sqrt(errors[0]) : 1.0;
    for (double& e : errors) e = std::sqrt(e) / w_norm;
    CompensationResult result{errors[1], errors[1], 0, invertible && std::isfinite(errors[1])};
    for (int round = 1; round <= rounds && result.ok; ++round)
        if (errors[2 * round] < result.error) result.error = errors[2 * round], result.best_round = round;

    // Errors nearly always fall to the last round. If they did not, the best round is made again: every step is deterministic, and
    // this costs no memory for copies.
    if (result.best_round == rounds) return result;
    if (result.best_round > 0) a.run(result.best_round);
    else a.without_adapter();
    return result;
}

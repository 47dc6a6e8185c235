// Error-compensated quantization. See compensation.h. Device-neutral.
#include "compensation.h"

#include <cmath>

#include "ops/elementwise.h"
#include "ops/linalg.h"
#include "ops/matmul.h"

namespace {

// One alternation after the other. The only full-size buffer is `work`, which is Ŵ, then W − deq(Q), then the error, in turn.
struct Alternation {
    Device& device;
    const Nf4Tensor& q;
    Tensor b, w, p;
    bool right;
    float scale;
    Tensor work;          // (out, in)
    Tensor b32;           // (n, r): B in fp32
    Tensor gram, factor;  // (r, r): P·Pᵀ, and what the solver makes of it
    Tensor sums;          // f64

    double norm(Tensor x) {
        sum_of_squares(device, sums.as<double>(), 0, x);
        double squared = 1.0;  // what a dry device goes on with
        device.download(&squared, sums.data, sizeof squared);
        return std::sqrt(squared);
    }

    // q ← NF4(x), work ← W − deq(q). x may be work.
    void quantize(Tensor x) {
        nf4_quantize(device, q, x, nullptr);
        nf4_dequantize(device, work, q);
        axpby(device, work, 1.0f, w, -1.0f);
    }

    // work ← start − s·P·B
    void subtract_adapter(Tensor start) {
        if (right) matmul(device, work, -scale, p, Op::transpose, b32, Op::transpose, 1.0f, start);
        else matmul(device, work, -scale, b32, Op::none, p, Op::none, 1.0f, start);
    }

    // b ← least squares fit of the residual in work, rounded as it will be stored. False if P·Pᵀ is singular.
    bool fit() {
        matmul(device, b32, 1.0f / scale, work, right ? Op::transpose : Op::none, p, Op::transpose);
        device.copy(factor.data, gram.data, gram.bytes());
        if (!solve_spd_right(device, b32, factor)) return false;
        convert(device, b, b32);
        convert(device, b32, b);
        return true;
    }

    // Plain NF4, B = 0. Leaves the residual in work.
    void without_adapter() {
        quantize(w);
        device.zero(b32);
        convert(device, b, b32);
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
    Alternation a{device, q, b, w, p, right, scale, scratch.tensor("compensation residual", DType::f32, w.rows, w.cols),
                  scratch.tensor("B in fp32", DType::f32, n, r), scratch.tensor("P·Pᵀ", DType::f32, r, r),
                  scratch.tensor("P·Pᵀ, factored", DType::f32, r, r), scratch.tensor("norm", DType::f64, 1, 1)};

    a.without_adapter();
    double w_norm = a.norm(w), quant_error = w_norm > 0 ? a.norm(a.work) / w_norm : a.norm(a.work);
    CompensationResult result{quant_error, quant_error, 0, std::isfinite(quant_error)};
    if (rounds == 0 || !result.ok) return result;

    matmul(device, a.gram, 1.0f, p, Op::none, p, Op::transpose);
    int last = 0;  // the round that q and b hold
    while (last < rounds && result.ok) {
        if (last > 0) a.subtract_adapter(w), a.quantize(a.work);
        result.ok = a.fit();
        if (!result.ok) break;
        ++last;
        a.subtract_adapter(a.work);
        double error = w_norm > 0 ? a.norm(a.work) / w_norm : a.norm(a.work);
        if (error < result.error) result.error = error, result.best_round = last;
    }
    if (!result.ok) result.error = quant_error, result.best_round = 0;

    // Errors nearly always fall to the last round. If they did not, the best round is made again: every step is deterministic, and
    // this costs no memory for copies.
    if (last != result.best_round || !result.ok) {
        a.without_adapter();
        for (int round = 1; round <= result.best_round; ++round) {
            if (round > 1) a.subtract_adapter(w), a.quantize(a.work);
            a.fit();
        }
    }
    return result;
}

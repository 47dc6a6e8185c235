// Error-compensated quantization, LoQT step 4 (docs: algorithm): W ≈ deq(Q) + s·P·B by alternating NF4 and least squares.
#pragma once
#include "nf4.h"

struct CompensationResult {
    double quant_error;  // ‖W − deq(NF4(W))‖_F / ‖W‖_F
    double error;        // ‖W − deq(Q) − s·P·B‖_F / ‖W‖_F of the Q and B that were kept
    int best_round;      // the round that was kept; 0: plain NF4, B = 0
    bool ok;             // false: P has no full row rank or W is not finite; then Q = NF4(W), B = 0
};

// q (out), b (out), n = the side of w without p:
//   left:  w (out = n, in = h) ≈ deq(q) + s·b·p          right:  w (out = h, in = n) ≈ deq(q) + s·pᵀ·bᵀ
// `rounds` times: Q ← NF4(Ŵ) (Ŵ = W first), B ← (1/s)·(W − deq(Q))·P⁺, Ŵ ← W − s·P·B; the round with the least error stays.
// P⁺ = Pᵀ(P·Pᵀ)⁻¹ by Cholesky: p is deq(P_q), whose rows are not orthonormal. B is rounded to its storage type before it is judged.
// rounds = 0: q = NF4(w), b = 0.
// w: (out, in) f32, ld free, only read; where its ld is at least `in` rounded up to 8, every row, the last too, must have that many columns in
// memory: products then take the padding along. p: (r, h) f32; b: (n, r) f32 or bf16, ld free; scale ≠ 0.
// On a GPU the products with B run on tensor cores (bf16 residuals, TF32), which B's own rounding hides. Synchronizes.
// Scratch: out·in + 2n·r + 2r·h fp32, and what nf4_quantize and pseudo_inverse take.
CompensationResult quantize_with_compensation(Device& device, const Nf4Tensor& q, Tensor b, Tensor w, Tensor p, bool right, float scale, int rounds);

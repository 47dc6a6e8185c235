// Causal scaled-dot-product attention with grouped queries: tiled, online softmax, never T×T in memory
// (Dao 2023, FlashAttention-2), deterministic backward (no atomics).
#pragma once
#include "runtime/device.h"

struct AttentionShape {
    int64_t batch, seq, heads, kv_heads, head_dim;  // heads % kv_heads == 0; on cuda head_dim is 64 or 128
    int64_t qkv_cols() const { return (heads + 2 * kv_heads) * head_dim; }
};

// o: (batch·seq, heads·head_dim); qkv: (batch·seq, qkv_cols), columns [q | k | v] heads-major, rope already applied;
// lse: (1, batch·heads·seq) f32, natural-log sum of exp of the scaled scores, index (b·heads + h)·seq + t. scale = 1/sqrt(head_dim).
void attention_forward(Device& device, Tensor o, Tensor lse, Tensor qkv, const AttentionShape& shape);

// dqkv: like qkv, written (=). d_o, o: like o. Scratch: batch·heads·seq fp32 (row sums of dO∘O), and on cuda partial sums of dQ: about
// 21 MB plus dQ of two key heads in fp32, times heads/kv_heads, however large the batch.
// rope: empty, or the f32 table of ops/rope.h (≥ seq, head_dim) that q and k were rotated by. With it dq and dk are rotated back on
// their way out: the same bits as rope_inplace(…, inverse = true) on dqkv afterwards, without its trip through memory.
void attention_backward(Device& device, Tensor dqkv, Tensor d_o, Tensor qkv, Tensor o, Tensor lse, const AttentionShape& shape, Tensor rope = {});

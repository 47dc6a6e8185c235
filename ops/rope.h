// Rotary position embedding, rotate-half convention of Hugging Face LLaMA (Su et al. 2021).
#pragma once
#include "runtime/device.h"

// Fills a host table of fp32 cos, sin pairs: table[pos * head_dim + j] = cos, table[pos * head_dim + head_dim/2 + j] = sin for
// j < head_dim/2, angle = pos·base^(−2j/head_dim) computed in fp64.
std::vector<float> rope_table(int64_t positions, int64_t head_dim, double base);

// Rotates the q and k parts of qkv in place. qkv: (batch·seq, ≥ (heads + 2·kv_heads)·head_dim) activation dtype, columns
// [q heads | k heads | v heads]; row t has position t % seq. table: device f32 (≥ seq, head_dim).
// inverse = true rotates by −angle (the backward).
void rope_inplace(Device& device, Tensor qkv, Tensor table, int64_t seq, int64_t heads, int64_t kv_heads, int64_t head_dim, bool inverse);

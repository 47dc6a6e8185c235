// Token embedding: a gather forward, a deterministic scatter-add backward (no atomics: positions are grouped by token on the host).
#pragma once
#include "runtime/device.h"
#include "runtime/philox.h"

// The positions of a micro-batch grouped by token id, cut into segments of at most kEmbeddingSegment positions.
// Built on the host while the data is prefetched; the arrays travel to the device with the tokens.
constexpr int kEmbeddingSegment = 64;
struct TokenGroups {
    std::vector<int32_t> order;          // [T] positions, sorted by token, stable
    std::vector<int32_t> segment_begin;  // [segments + 1] offsets into order
    std::vector<int32_t> group_begin;    // [groups + 1] offsets into segments: one group per distinct token
    std::vector<int32_t> group_token;    // [groups]
};
TokenGroups group_tokens(const int32_t* tokens, int64_t count, int64_t vocab);

// The same on the device; pointers into one upload of the four arrays.
struct DeviceTokenGroups {
    const int32_t *order, *segment_begin, *group_begin, *group_token;
    int64_t segments, groups;
};

// y[t] = table[tokens[t]].  y: (T, h) activation dtype; table: (V, h) same dtype as y; tokens: device int32 [T].
void embedding_forward(Device& device, Tensor y, Tensor table, const int32_t* tokens);

// dtable[tokens[t]] += dy[t], summed in fp32 in position order (two stages: segments, then segments of a token in order).
// dtable: (V, h) f32 or bf16, the latter rounded stochastically by `draws` (element number: row·h + column); dy: (T, h) activation dtype.
// Scratch: segments × h fp32.
void embedding_backward(Device& device, Tensor dtable, Tensor dy, const DeviceTokenGroups& groups, const RoundingDraws& draws);

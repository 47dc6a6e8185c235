// Random tensors: the same numbers on every device.
#pragma once
#include "runtime/device.h"

// x = deviation · N(0, 1), f32 (rows, cols), ld free: logical element i is number begin + i of Philox stream `stream` (normal_draw in philox.h).
void fill_normal(Device& device, Tensor x, float deviation, uint64_t seed, uint32_t stream, uint64_t begin = 0);
// x = bound · U(−1, 1), f32 (rows, cols), ld free: logical element i from Philox stream `stream`.
void fill_uniform(Device& device, Tensor x, float bound, uint64_t seed, uint32_t stream);
// x = value, f32 (rows, cols), ld free.
void fill(Device& device, Tensor x, float value);

// Small memory-bound helpers shared by the optimizer, merging and the loop.
#pragma once
#include "runtime/device.h"

// dst = src with a dtype change (f32 ↔ bf16, round to nearest even); rows × cols of both must agree, ld may differ.
void convert(Device& device, Tensor dst, Tensor src);
// dst = a·x + b·dst, elementwise, any of f32/bf16.
void axpby(Device& device, Tensor dst, float a, Tensor x, float b);
// dst = src∘src (f32).
void square(Device& device, Tensor dst, Tensor src);
// sums[slot] = Σ x² over the logical elements, fp64, fixed order. sums: device f64. NaN and Inf propagate.
void sum_of_squares(Device& device, double* sums, int64_t slot, Tensor x);
// sums[slot] = Σ x.
void sum(Device& device, double* sums, int64_t slot, Tensor x);

// Small memory-bound helpers shared by the optimizer, merging and the loop.
#pragma once
#include "runtime/device.h"

// dst = src with a dtype change (f32 ↔ bf16, round to nearest even); rows × cols of both must agree, ld may differ.
void convert(Device& device, Tensor dst, Tensor src);
// dst = a·x + b·dst, elementwise, any of f32/bf16.
void axpby(Device& device, Tensor dst, float a, Tensor x, float b);
// dst = src∘src (f32).
void square(Device& device, Tensor dst, Tensor src);
// sums[i] = Σ x² over the logical elements of tensors[i] (f32 or bf16, any mixture), fp64, fixed order. sums: device f64. NaN and Inf
// propagate. Many tensors in one call cost two kernel launches per 64 of them.
void sums_of_squares(Device& device, double* sums, const std::vector<Tensor>& tensors);
// The same of one tensor: sums[slot].
void sum_of_squares(Device& device, double* sums, int64_t slot, Tensor x);
// sums[slot] = Σ x.
void sum(Device& device, double* sums, int64_t slot, Tensor x);

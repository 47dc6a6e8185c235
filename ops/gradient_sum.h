// Sums of gradients over micro-batches in 16 or 8 bits. Rounding is stochastic: a small gradient added to a large sum counts on average,
// where rounding to nearest would lose it every time. The price is noise: the sum of N independent normal gradients has a relative error
// (Frobenius) of 0.0017·√N in bf16 (to nearest: 0.0012·√N) and 0.0070·√N in 8 bits.
#pragma once
#include "runtime/device.h"
#include "runtime/philox.h"

constexpr int64_t kGradientBlock = 256;  // elements per scale of an 8-bit sum

// The sum of a (rows, cols) gradient.
struct GradientSum {
    Tensor values;  // bf16: (rows, cols), ld free; 8 bits: u8 (1, rows·cols) signed codes of the logical elements, row-major
    Tensor scales;  // 8 bits only: f32 (1, ⌈rows·cols/256⌉), value = code·scale, scale = largest magnitude of the block / 127
};

// sum ← g if first (its old contents are not read), else sum + g; added in fp32, rounded stochastically by `draws` (element number: row-major
// logical index). g: (rows, cols) f32, ld free. bf16 keeps NaN and Inf, and a finite sum never becomes Inf. 8 bits: codes are within
// −127 .. 127; a block with a non-finite element gets a NaN scale, so it loads as NaN from then on; a scale below the normal fp32 numbers
// counts as 0. CPU and GPU give the same bits (but for the payload of a bf16 NaN). Every add needs draws of its own (another step or stream), else errors pile up.
void add_to_gradient_sum(Device& device, const GradientSum& sum, Tensor g, bool first, const RoundingDraws& draws);

// g ← sum. g: (rows, cols) f32, ld free.
void load_gradient_sum(Device& device, Tensor g, const GradientSum& sum);

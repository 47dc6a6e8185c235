// RMSNorm (Zhang & Sennrich 2019): y = w ∘ x·ρ, ρ = 1/sqrt(mean(x²) + eps) per row. All arithmetic in fp32, one rounding at the store.
#pragma once
#include "runtime/device.h"

// y, x: (T, h) activation dtype; w: (1, h) f32; rstd: (1, T) f32, written with ρ (needed by backward).
void rmsnorm_forward(Device& device, Tensor y, Tensor rstd, Tensor x, Tensor w, float eps);

// dx += ρ(g − x̂·mean(g∘x̂)), g = w∘dy, x̂ = x·ρ   (dx is the gradient of the residual stream; with accumulate = false: dx = …, its
//                                                  old contents are not read)
// dw += Σ_t dy∘x̂                                  (f32, fixed-order two-stage sum: bit-identical from run to run)
// normed, if given, ← w∘x̂: the forward's y once more, to the bit, for whoever needs it as the input of a product. It may be dy itself.
// dx, dy, x, normed: (T, h) activation dtype; w, dw: (1, h) f32; rstd: (1, T) f32. Scratch: about 4 MB.
void rmsnorm_backward(Device& device, Tensor dx, Tensor dw, Tensor dy, Tensor x, Tensor w, Tensor rstd, Tensor normed = {}, bool accumulate = true);

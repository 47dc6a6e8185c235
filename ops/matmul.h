// Matrix products through cuBLASLt (bf16 or fp32 in, fp32 accumulation) and OpenBLAS (fp32).
#pragma once
#include "runtime/device.h"

enum class Op { none, transpose };
// How fp32 inputs are multiplied on a GPU: exactly, or on tensor cores with inputs rounded to TF32 (11 significant bits, relative error
// 2e-4 of a random product, about eight times as fast). bf16 inputs are exact either way; the CPU always is.
enum class Fp32Products { exact, tf32 };

// D = alpha·op(A)·op(B) + beta·C, everything row-major. op(A): (m, k), op(B): (k, n), C and D: (m, n).
// A and B share a dtype (bf16 or f32); C and D share one (bf16 or f32). C may be D. C is not read when beta = 0.
void matmul(Device& device, Tensor d, float alpha, Tensor a, Op op_a, Tensor b, Op op_b, float beta, Tensor c, Fp32Products products = Fp32Products::exact);
inline void matmul(Device& device, Tensor d, float alpha, Tensor a, Op op_a, Tensor b, Op op_b, float beta = 0.0f, Fp32Products products = Fp32Products::exact) {
    matmul(device, d, alpha, a, op_a, b, op_b, beta, d, products);
}

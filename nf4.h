// NF4: 4-bit NormalFloat with block-wise absmax and double quantization (Dettmers et al., QLoRA 2023), bit-compatible with bitsandbytes.
// A matrix is flattened row-major over its *logical* rows × cols (padding in memory never shifts a block); blocks of 64
// consecutive elements share absmax = max|x|; code = number of thresholds below x/absmax (ties to the lower code); the even element
// sits in the high nibble. Double quantization stores absmax − mean(absmax) in the signed dynamic 8-bit map, blocks of 256.
#pragma once
#include "runtime/device.h"

constexpr int64_t kNf4Block = 64;      // weights per absmax
constexpr int64_t kNestedBlock = 256;  // absmax values per second-level scale

// A quantized rows × cols matrix. nested = double quantization: absmax is empty and codes8/scale2/offset are used, else the reverse.
struct Nf4Tensor {
    int64_t rows = 0, cols = 0;
    bool nested = true;
    Tensor codes;    // u8  (1, (N+1)/2)
    Tensor absmax;   // f32 (1, ⌈N/64⌉)              single level
    Tensor codes8;   // u8  (1, ⌈N/64⌉)              nested: code of absmax − offset
    Tensor scale2;   // f32 (1, ⌈⌈N/64⌉/256⌉)        nested: max|absmax − offset| per 256
    Tensor offset;   // f32 (1, 1)                   nested: mean of absmax

    int64_t numel() const { return rows * cols; }
    int64_t blocks() const { return ceil_div(rows * cols, kNf4Block); }
};
// All that an Nf4Tensor is stored in; what the layout has no use for is empty.
using Nf4Part = Tensor Nf4Tensor::*;
constexpr Nf4Part kNf4Parts[] = {&Nf4Tensor::codes, &Nf4Tensor::absmax, &Nf4Tensor::codes8, &Nf4Tensor::scale2, &Nf4Tensor::offset};

// The 16 code values, exact in fp32, ascending; and the 15 midpoints rounded to fp32.
extern const float kNf4Code[16];
float nf4_threshold(int i);
// The signed and unsigned 256-entry dynamic maps (ascending), generated in fp64 and rounded to fp32 (see numerics in docs).
const float* dynamic_map_signed();
const float* dynamic_map_unsigned();

// q ← NF4(w). w: (rows, cols) f32 or bf16, ld free. absmax 0 → code 7; a subnormal absmax counts as 0. Scratch: blocks fp32 + sums.
// Non-finite inputs are counted into *nonfinite (device int32, may be null); what is stored for them is unspecified but finite.
void nf4_quantize(Device& device, const Nf4Tensor& q, Tensor w, int32_t* nonfinite);

// w = deq(q), rounded to nearest in w's dtype (f32 or bf16). w: (rows, cols), ld free: columns ≥ cols of a padded w are left alone.
void nf4_dequantize(Device& device, Tensor w, const Nf4Tensor& q);

// residual = w − deq(q) in residual's dtype (f32 or bf16, to nearest), sums[slot] = Σ (w − deq(q))², fp64 (on a GPU of fp32 sums of eight),
// fixed order. w: (rows, cols) f32.
// residual: (rows, cols) or empty, if only the sum is wanted; not w. Padding is left alone. sums: device f64. Scratch: partial sums.
void nf4_residual(Device& device, Tensor residual, Tensor w, const Nf4Tensor& q, double* sums, int64_t slot);

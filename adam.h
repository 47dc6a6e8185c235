// AdamW (Loshchilov & Hutter 2019) over parameters of any tensor, moments in one of four formats.
//   m ← β1 m + (1−β1) g;  v ← β2 v + (1−β2) g²;  p ← p − (lr·c2/c1)·m/(sqrt(v) + eps·c2);  then p ← p(1 − lr·wd)
//   c1 = 1−β1^t, c2 = sqrt(1−β2^t): algebraically PyTorch's update. All arithmetic fp32, c1 and c2 in double on the host.
#pragma once
#include "runtime/device.h"

enum class MomentFormat {
    fp32,
    bf16_stochastic,  // unbiased: v decays as it should
    bf16_nearest,     // the paper's runs: torch's foreach AdamW on bf16, a rounding after every operation; v never decays
    int8              // bitsandbytes' blockwise 8-bit: dynamic maps, blocks of 256, states of tensors < 4096 elements stay fp32
};
enum class ParamRounding {
    nearest,
    stochastic,   // bf16 parameters: unbiased, no master copy
    master        // bf16 parameters plus a 16-bit correction each: together an exact fp32 master
};

constexpr int64_t kAdamBlock = 256;       // elements per absmax of an 8-bit state
constexpr int64_t kAdam8bitMinimum = 4096;

// The moments of one parameter, over its *logical* elements row-major (a padded parameter has unpadded moments).
struct AdamState {
    MomentFormat format = MomentFormat::fp32;
    Tensor m, v;                 // f32, bf16 or u8 codes: (1, N)
    Tensor m_absmax, v_absmax;   // f32 (1, ⌈N/256⌉), int8 only
    Tensor correction;           // i16 (1, N), ParamRounding::master only: p_fp32 = bits(p_bf16 << 16) + correction
};

struct AdamStep {
    double lr, beta1, beta2, eps, weight_decay;  // double: 1 − 0.999f is 1e-5 away from 0.001
    int64_t t;            // 1 for the first update of this parameter (bias correction)
    float grad_scale;     // multiplies g (clipping, averaging)
    ParamRounding rounding;
    uint64_t seed;        // stochastic rounding: Philox key
    uint32_t stream, step;  // stochastic rounding: which tensor, which optimizer step
};

// The format a tensor of numel elements really uses (8-bit only from kAdam8bitMinimum on).
MomentFormat effective_format(MomentFormat wanted, int64_t numel);

// One update of p in place. p: (rows, cols) f32 or bf16, ld free; g: same shape, f32 or bf16. An element with a non-finite gradient
// is left alone, its moments too, and counted into *nonfinite (device int32, may be null).
void adam_update(Device& device, Tensor p, Tensor g, const AdamState& state, const AdamStep& step, int32_t* nonfinite);

// Moments to and from plain fp32 (merging projects them). dst/src: (1, N) f32; `second` selects v. Rounding to bf16 is stochastic
// for bf16_stochastic (seed, stream, step as in AdamStep), nearest otherwise.
void adam_load_moment(Device& device, Tensor dst, const AdamState& state, bool second);
void adam_store_moment(Device& device, const AdamState& state, bool second, Tensor src, uint64_t seed, uint32_t stream, uint32_t step);

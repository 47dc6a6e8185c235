// What Adam does to one element, and how its state is stored: for the CPU form (adam.cu) and the kernels (adam_kernels.cuh), one translation
// unit. Every product that feeds a sum is an explicit fmaf, so neither compiler is left to choose where to contract: CPU and GPU do the
// same arithmetic, and a bf16 parameter with its correction takes exactly the steps of an fp32 one.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "adam.h"
#include "dynamic_map.h"
#include "flat_matrix.h"
#include "ops/row_kernels.h"
#include "runtime/philox.h"

namespace {

// What one step needs, rounded once from double.
struct AdamConstants {
    float beta1, one_minus_beta1, beta2, one_minus_beta2;
    float step_size, eps_c2;         // lr·c2/c1 and eps·c2
    float c2, eps, torch_step_size;  // bf16_nearest keeps torch's form: lr/c1 · m/(sqrt(v)/c2 + eps)
    float decay, grad_scale;
    ParamRounding rounding;
    uint64_t seed;
    uint32_t stream, step;

    explicit AdamConstants(const AdamStep& s) {
        double c1 = 1 - std::pow(s.beta1, double(s.t)), root = std::sqrt(1 - std::pow(s.beta2, double(s.t)));
        beta1 = float(s.beta1), one_minus_beta1 = float(1 - s.beta1);
        beta2 = float(s.beta2), one_minus_beta2 = float(1 - s.beta2);
        step_size = float(s.lr * root / c1), eps_c2 = float(s.eps * root);
        c2 = float(root), eps = float(s.eps), torch_step_size = float(s.lr / c1);
        decay = float(1 - s.lr * s.weight_decay), grad_scale = s.grad_scale;
        rounding = s.rounding, seed = s.seed, stream = s.stream, step = s.step;
    }
};

// Philox streams of one tensor: the parameter and its moments draw separately.
enum RoundingStream : uint32_t { kParamStream = 0, kFirstStream = 1, kSecondStream = 2 };
HOST_DEVICE uint32_t rounding_stream(uint32_t stream, uint32_t part) { return stream * 4 + part; }

// x as the nearest bf16.
HOST_DEVICE float rounded(float x) {
#ifdef __CUDA_ARCH__
    return float_of_bits(pack_bf16x2(0.0f, x));
#else
    return to_float(to_bf16(x));
#endif
}

// One element. g is already scaled. Returns false (p, m, v kept) if g or its square is not finite.
// round_p: bf16 parameters rounded to nearest, which torch does after the decay and after the step.
template <MomentFormat F> HOST_DEVICE bool adam_element(const AdamConstants& c, float& p, float& m, float& v, float g, bool round_p) {
    const bool finite = g * g <= FLT_MAX;
    const float old_p = p, old_m = m, old_v = v;
    if (F == MomentFormat::bf16_nearest) {
        // torch's sequence for bf16 tensors: mul_(p, 1 − lr·wd); lerp_(m, g, 1 − β1); mul_(v, β2); addcmul_(v, g, g, 1 − β2);
        // d = sqrt(v); div_(d, c2); add_(d, eps); addcdiv_(p, m, d, −lr/c1): fp32 inside each, rounded to bf16 after each.
        g = rounded(g);
        p *= c.decay;
        if (round_p) p = rounded(p);
        m = rounded(fmaf(c.one_minus_beta1, g - m, m));
        v = rounded(v * c.beta2);
        v = rounded(fmaf(c.one_minus_beta2 * g, g, v));
        float d = rounded(rounded(rounded(sqrtf(v)) / c.c2) + c.eps);
        p = fmaf(-c.torch_step_size, m / d, p);
    } else {
        m = fmaf(c.beta1, m, c.one_minus_beta1 * g);
        v = fmaf(c.beta2, v, c.one_minus_beta2 * g * g);
        p = fmaf(-c.step_size, m / (sqrtf(v) + c.eps_c2), p) * c.decay;
    }
    // Chosen afterwards: branches around the arithmetic would cost more than the arithmetic.
    p = finite ? p : old_p, m = finite ? m : old_m, v = finite ? v : old_v;
    return finite;
}

// An fp32 parameter split into bf16 and a 16-bit correction. Ties go away from zero: the correction is then in −32768..32767.
HOST_DEVICE float join_master(bf16 p, int16_t correction) { return float_of_bits((uint32_t(p.bits) << 16) + uint32_t(int32_t(correction))); }
HOST_DEVICE void split_master(float x, bf16& p, int16_t& correction) {
    p.bits = uint16_t((bits_of_float(x) + 0x8000u) >> 16);
    correction = int16_t(bits_of_float(x) - (uint32_t(p.bits) << 16));
}

// 1/a, or 0 where that would overflow: a block of zeros (or subnormals) has absmax 0 and the codes of 0.
HOST_DEVICE float reciprocal_or_zero(float a) { return a >= FLT_MIN ? 1.0f / a : 0.0f; }

// The 8-bit code of a moment x. The signed map has only a +0; as in bitsandbytes a negative m never becomes 0, so a tiny negative
// moment keeps its sign.
HOST_DEVICE uint8_t moment_code(const DynamicMap& map, float x, float inverse) {
    int code = dynamic_code(map, x * inverse);
    if (x < 0.0f && inverse > 0.0f && code == map.zero) --code;
    return uint8_t(code);
}

// Storage of one moment in format F.
template <MomentFormat F> struct MomentType { using type = bf16; };
template <> struct MomentType<MomentFormat::fp32> { using type = float; };
template <> struct MomentType<MomentFormat::int8> { using type = uint8_t; };

template <MomentFormat F> struct Moment {
    using T = typename MomentType<F>::type;
    T* data;
    float* absmax;
    bool second;
    int64_t numel;

    Moment(const AdamState& state, bool second_moment) : second(second_moment) {
        const Tensor& t = second ? state.v : state.m;
        data = t.as<T>();
        absmax = F == MomentFormat::int8 ? (second ? state.v_absmax : state.m_absmax).as<float>() : nullptr;
        numel = t.numel();
    }
    HOST_DEVICE FlatMatrix<T> matrix() const { return FlatMatrix<T>(data, numel); }
};

// Where stochastic rounding takes its draws from: group of eight elements → 128 bits.
struct RoundingSource {
    uint64_t seed;
    uint32_t stream, step;
    HOST_DEVICE Philox4 draws(int64_t group) const { return rounding_draws(seed, uint64_t(group), stream, step); }
};

RoundingSource moment_source(const AdamConstants& c, bool second) { return {c.seed, rounding_stream(c.stream, second ? kSecondStream : kFirstStream), c.step}; }

// The correction is used for bf16 parameters with ParamRounding::master only.
inline int16_t* correction_of(const AdamState& state, const Tensor& p, ParamRounding rounding) {
    return p.dtype == DType::bf16 && rounding == ParamRounding::master ? state.correction.as<int16_t>() : nullptr;
}

}  // namespace

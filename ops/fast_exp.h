// expf for vectorized CPU loops: the C library's exp is a call per element, this one is arithmetic that compilers turn into SIMD
// inside `#pragma omp simd`. Error ≤ 2 ulp over the normal range (test/test_swiglu.cpp); exp(−inf) = 0, overflow gives inf, NaN stays NaN.
#pragma once
#include "runtime/bfloat16.h"

inline float fast_exp(float x) {
    // Beyond these bounds the result is 0 or inf anyway; comparisons in this order keep NaN.
    x = x > 89.0f ? 89.0f : x;
    x = x < -104.0f ? -104.0f : x;
    // x = n·ln2 + r, |r| ≤ ln2/2. Adding 1.5·2^23 rounds to an integer that stands in the low bits.
    const float magic = 12582912.0f;
    float shifted = x * 1.44269504f + magic;
    float n = shifted - magic;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln2 in two parts, the first exact in the product
    // Taylor series: the first term left out is r^8/8! ≤ 5.2e-9.
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    // 2^n in two factors, so that subnormal results and overflow come out right.
    int32_t exponent = int32_t(bits_of_float(shifted)) - int32_t(0x4b400000);
    int32_t half = exponent >> 1;
    return p * float_of_bits(uint32_t(half + 127) << 23) * float_of_bits(uint32_t(exponent - half + 127) << 23);
}

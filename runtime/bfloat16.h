// bfloat16 on host and device without any CUDA header: the upper half of an IEEE fp32.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

struct bf16 {
    uint16_t bits;
};

HOST_DEVICE uint32_t bits_of_float(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

HOST_DEVICE float float_of_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

HOST_DEVICE float to_float(bf16 x) { return float_of_bits(uint32_t(x.bits) << 16); }
HOST_DEVICE float to_float(float x) { return x; }

// Round to nearest, ties to even; NaN stays NaN.
HOST_DEVICE bf16 to_bf16(float x) {
    uint32_t u = bits_of_float(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((u >> 16) | 0x40)};
    return bf16{uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}

// Stochastic rounding: up with probability (low 16 bits)/65536, so the expectation is exactly x (numerics: Philox draws).
// random16: uniform on 0..65535. NaN and Inf pass through; finite values never round to Inf.
HOST_DEVICE bf16 to_bf16_stochastic(float x, uint32_t random16) {
    uint32_t u = bits_of_float(x);
    if ((u & 0x7f800000u) == 0x7f800000u) return to_bf16(x);
    uint32_t sign = u & 0x80000000u, magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f7f0000u) magnitude = 0x7f7f0000u;  // 3.3895e38, the largest bf16
    return bf16{uint16_t((sign | (magnitude + (random16 & 0xffffu))) >> 16)};
}

// dst = x in the storage type of dst.
HOST_DEVICE void store(float& dst, float x) { dst = x; }
HOST_DEVICE void store(bf16& dst, float x) { dst = to_bf16(x); }

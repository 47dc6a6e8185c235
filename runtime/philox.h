// Philox4x32-10 counter-based random numbers (Salmon et al., SC'11): no state, so a draw depends only on
// (seed, step, tensor, element) and never on launch geometry, thread count or resume.
#pragma once
#include <cmath>
#include <cstdint>

#include "runtime/bfloat16.h"

struct Philox4 {
    uint32_t x[4];
};

// counter: 128 bits, key: 64 bits → 128 random bits. Known answers are in test/test_random.cpp.
HOST_DEVICE Philox4 philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
        uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n1 = uint32_t(p1);
        uint32_t n2 = uint32_t(p0 >> 32) ^ c3 ^ k1, n3 = uint32_t(p0);
        c0 = n0, c1 = n1, c2 = n2, c3 = n3;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return Philox4{{c0, c1, c2, c3}};
}

// Sixteen-bit draw for stochastic rounding of element `element` of tensor `stream` at optimizer step `step`.
// One Philox call serves a group of eight consecutive elements: draw i of the group is half i%2 of word i/2.
HOST_DEVICE Philox4 rounding_draws(uint64_t seed, uint64_t group, uint32_t stream, uint32_t step) {
    return philox4x32(uint32_t(group), uint32_t(group >> 32), stream, step, uint32_t(seed), uint32_t(seed >> 32));
}
HOST_DEVICE uint32_t rounding_draw16(const Philox4& p, int i) { return (p.x[i >> 1] >> ((i & 1) * 16)) & 0xffffu; }

// Where the draws that round one tensor come from: element i takes draw16 number begin + i of (seed, stream, step). begin is a multiple of 8.
struct RoundingDraws {
    uint64_t seed;
    uint32_t stream, step;
    uint64_t begin = 0;

    // Those of elements 8·group .. 8·group + 7.
    HOST_DEVICE Philox4 of_group(int64_t group) const { return rounding_draws(seed, begin / 8 + uint64_t(group), stream, step); }
    HOST_DEVICE uint32_t of_element(int64_t i) const { return rounding_draw16(of_group(i / 8), int(i % 8)); }
};

#ifdef __CUDACC__
// Eight bf16 in memory order.
struct Bf16x8 {
    uint32_t word[4];
    __device__ __forceinline__ bf16 operator[](int k) const { return bf16{uint16_t(word[k / 2] >> (k % 2 * 16))}; }
};

// Eight values rounded with the draws of their group.
__device__ __forceinline__ Bf16x8 round_stochastic(const float (&x)[8], const Philox4& draws) {
    constexpr float largest = 3.38953139e38f;  // of bf16. Up to there rounding is one addition: the carry runs into mantissa and exponent.
    bool ordinary = true;
#pragma unroll
    for (int k = 0; k < 8; ++k) ordinary &= fabsf(x[k]) <= largest;
    Bf16x8 packed;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (ordinary)
            packed.word[i] = __byte_perm(bits_of_float(x[2 * i]) + (draws.x[i] & 0xffffu), bits_of_float(x[2 * i + 1]) + (draws.x[i] >> 16), 0x7632);
        else
            packed.word[i] = to_bf16_stochastic(x[2 * i], draws.x[i] & 0xffffu).bits | uint32_t(to_bf16_stochastic(x[2 * i + 1], draws.x[i] >> 16).bits) << 16;
    }
    return packed;
}
#endif

// Uniform in (0, 1], 32-bit resolution.
HOST_DEVICE float uniform01(uint32_t u) { return (float(u >> 8) + 1.0f) * (1.0f / 16777216.0f); }

// The two functions of Box–Muller's transform in fp64, out of operations that IEEE 754 rounds alike everywhere (fma, ·, /, √), so that a
// CPU and a GPU draw the same bits. Errors are near 1e-16. No a·b + c here may be left to the compiler to fuse or not.

// ln u for normal u > 0, by 2·artanh((m − 1)/(m + 1)) on m in [√½, √2).
HOST_DEVICE double portable_log(double u) {
    union {
        double value;
        uint64_t bits;
    } m = {u};
    int exponent = int(m.bits >> 52) - 1023;
    m.bits = (m.bits & 0x000fffffffffffffull) | 0x3ff0000000000000ull;
    if (m.value > 1.4142135623730951) m.value *= 0.5, ++exponent;
    const double s = (m.value - 1.0) / (m.value + 1.0), z = s * s;
    double series = 2.0 / 23.0;
    for (int k = 21; k >= 3; k -= 2) series = fma(series, z, 2.0 / k);
    return fma(double(exponent), 0.6931471805599453, fma(s * z, series, 2.0 * s));
}

// cos (quarter = 0) or sin (quarter = 3) of 2π·u/2³², u + quarter·2³⁰ taken modulo 2³²: exact reduction to an eighth of a turn, Taylor.
HOST_DEVICE double portable_cos_turns(uint32_t u, int quarter) {
    u += uint32_t(quarter) << 30;
    const uint32_t nearest = (u + (1u << 29)) >> 30;  // quarter turns
    const double t = double(int32_t(u - (nearest << 30))) * (6.283185307179586 / 4294967296.0), z = t * t;
    double cosine = 1.0, sine = 1.0;  // (1 − z/(1·2)(1 − z/(3·4)(…))) and the like
    for (int k = 18; k >= 2; k -= 2) {
        cosine = fma(z * cosine, -1.0 / double(k * (k - 1)), 1.0);
        sine = fma(z * sine, -1.0 / double(k * (k + 1)), 1.0);
    }
    sine *= t;
    const double value = nearest % 2 ? sine : cosine;
    return nearest % 4 == 1 || nearest % 4 == 2 ? -value : value;
}

// Standard normal numbers 2·pair and 2·pair + 1 of stream `stream` (Box–Muller).
HOST_DEVICE void normal_pair(uint64_t seed, uint32_t stream, uint64_t pair, float& first, float& second) {
    Philox4 p = philox4x32(uint32_t(pair), uint32_t(pair >> 32), stream, 0x4e4f524du /* "NORM" */, uint32_t(seed), uint32_t(seed >> 32));
    const double u = (double(p.x[0]) + 1.0) / 4294967296.0, radius = sqrt(-2.0 * portable_log(u));
    first = float(radius * portable_cos_turns(p.x[1], 0));
    second = float(radius * portable_cos_turns(p.x[1], 3));
}

// Standard normal number `element` of stream `stream`.
HOST_DEVICE float normal_draw(uint64_t seed, uint32_t stream, uint64_t element) {
    float first, second;
    normal_pair(seed, stream, element >> 1, first, second);
    return element & 1 ? second : first;
}

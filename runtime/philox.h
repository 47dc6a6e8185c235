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

// Uniform in (0, 1], 32-bit resolution.
HOST_DEVICE float uniform01(uint32_t u) { return (float(u >> 8) + 1.0f) * (1.0f / 16777216.0f); }

// Standard normal number `element` of stream `stream` (Box–Muller on fp64, so host libraries agree to the last bits of fp32).
inline float normal_draw(uint64_t seed, uint32_t stream, uint64_t element) {
    uint64_t group = element >> 1;
    Philox4 p = philox4x32(uint32_t(group), uint32_t(group >> 32), stream, 0x4e4f524du /* "NORM" */, uint32_t(seed), uint32_t(seed >> 32));
    double u1 = (double(p.x[0]) + 1.0) / 4294967296.0, u2 = double(p.x[1]) / 4294967296.0;
    double radius = std::sqrt(-2.0 * std::log(u1)), angle = 6.283185307179586 * u2;
    return float((element & 1) ? radius * std::sin(angle) : radius * std::cos(angle));
}

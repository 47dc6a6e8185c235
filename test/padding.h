// Padding columns of a test tensor keep the NaN pattern that OnDevice filled them with: reading them gives NaN, writing them shows here.
#pragma once
#include <algorithm>

#include "test/support.h"

inline bool padding_untouched(const OnDevice& x) {
    std::vector<uint8_t> bytes = x.raw<uint8_t>();
    const int64_t size = size_of(x.t.dtype);
    for (int64_t r = 0; r < x.t.rows; ++r)
        for (int64_t b = (r * x.t.ld + x.t.cols) * size; b < (r + 1) * x.t.ld * size; ++b)
            if (bytes[b] != 0xff) return false;
    return true;
}

// Values as the device stores activations: bf16 on cuda, fp32 on cpu.
inline std::vector<float> as_activation(const Device& device, std::vector<float> x) { return device.is_cuda() ? round_to_bf16(std::move(x)) : x; }

// A relative Frobenius limit for n independently rounded bf16 values: with few of them one rounding (up to 2^-8) can be all there is.
inline double bf16_limit(double limit, int64_t n) { return n < 1000 ? std::max(limit, 4.2e-3) : limit; }

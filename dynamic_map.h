// The dynamic 8-bit map (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2015; bitsandbytes' create_dynamic_map):
// seven decades of ever finer linear steps, signed or unsigned, plus 0 and 1. Decade i = 0..6 holds n values
//   v(i, j) = 10^(i−6) · (0.1 + 0.9·(j + ½)/n),  j = 0..n−1,  n = 2^i signed, 2^(i+1) unsigned
// so code(±v(i, j)) = zero ± (n + j) signed, n − 1 + j unsigned; code(0) = zero; code(1) = 255; −1 is absent.
#pragma once
#include <cmath>

#include "runtime/bfloat16.h"

struct DynamicMap {
    // Where the codes of one decade start and how they follow from the magnitude: offset = first + min(magnitude·slope + shift, last).
    struct alignas(16) Decade {
        float slope, shift, last;
        int first;
    };
    float value[256];     // ascending; value[code]
    float midpoint[256];  // between value[k] and value[k+1]; the last one is never reached
    Decade decade[8];     // [0]: below the smallest value; [i + 1]: decade i
    float limit[7];       // magnitudes above limit[i] belong to decade i or higher
    int zero;             // code of 0: 127 signed, 0 unsigned
};

// Everything in fp64, rounded once to fp32; a compile-time constant.
constexpr DynamicMap make_dynamic_map(bool is_signed) {
    constexpr double power[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
    // The linear guess is shifted down by a little, so that rounding never makes it too high: one comparison then settles the code.
    constexpr double safety = 1e-3;
    DynamicMap map{};
    map.zero = is_signed ? 127 : 0;
    map.value[map.zero] = 0.0f;
    map.value[255] = 1.0f;
    for (int i = 0; i < 7; ++i) {
        int n = is_signed ? 1 << i : 2 << i;
        int first = is_signed ? n : n - 1;
        for (int j = 0; j < n; ++j) {
            float v = float(power[i] * (0.1 + 0.9 * (j + 0.5) / n));
            map.value[map.zero + first + j] = v;
            if (is_signed) map.value[map.zero - first - j] = -v;
        }
        map.decade[i + 1] = {float(n / (0.9 * power[i])), float(-n / 9.0 - safety), float(n - 1), first};
    }
    for (int k = 0; k < 255; ++k) map.midpoint[k] = float((double(map.value[k]) + double(map.value[k + 1])) / 2);
    map.midpoint[255] = 2.0f;
    for (int i = 0; i < 7; ++i) map.limit[i] = map.midpoint[map.zero + map.decade[i + 1].first - 1];
    return map;
}

inline constexpr DynamicMap kSignedMap = make_dynamic_map(true);
inline constexpr DynamicMap kUnsignedMap = make_dynamic_map(false);

// Code of the nearest value = number of midpoints below z (ties to the lower code), for z in [−1, 1] (a little outside: the end
// codes; NaN: some code). The decade by comparison, the place in it by a linear guess that is right or one short in magnitude,
// and one look at the midpoint table.
HOST_DEVICE int dynamic_code(const DynamicMap& map, float z) {
    float magnitude = fabsf(z);
    int d = 0;
    for (int i = 0; i < 7; ++i) d += magnitude > map.limit[i];
    DynamicMap::Decade decade = map.decade[d];
    int offset = decade.first + int(fminf(fmaf(magnitude, decade.slope, decade.shift), decade.last));
    int probe = z < 0 ? map.zero - offset - 1 : map.zero + offset;
    if (probe < 0) probe = 0;
    return probe + (z > map.midpoint[probe]);
}

// The dynamic 8-bit map (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2015; bitsandbytes' create_dynamic_map):
// seven decades of ever finer linear steps, signed or unsigned, plus 0 and 1. Decade i = 0..6 holds n values
//   v(i, j) = 10^(i−6) · (0.1 + 0.9·(j + ½)/n),  j = 0..n−1,  n = 2^i signed, 2^(i+1) unsigned
// so code(±v(i, j)) = zero ± (n + j) signed, n − 1 + j unsigned; code(0) = zero; code(1) = 255; −1 is absent.
#pragma once
#include <cmath>

#include "runtime/bfloat16.h"

struct DynamicMap {
    // Magnitudes fall into cells that share sign-free exponent and the upper seven mantissa bits of an fp32 number, from 2^−23 (below the
    // smallest midpoint) to 1: narrow enough to hold at most one midpoint each, so a cell and one comparison give the code.
    static constexpr int kOctaves = 23, kCellsPerOctave = 128, kCells = kOctaves * kCellsPerOctave, kFirstCell = (127 - kOctaves) * kCellsPerOctave;
    float value[256];       // ascending; value[code]
    float midpoint[256];    // between value[k] and value[k+1]; the last one is never reached
    uint8_t below[kCells];  // midpoints of positive numbers below the cell
    int zero;               // code of 0: 127 signed, 0 unsigned
};

// Everything in fp64, rounded once to fp32; a compile-time constant.
constexpr DynamicMap make_dynamic_map(bool is_signed) {
    constexpr double power[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
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
    }
    for (int k = 0; k < 255; ++k) map.midpoint[k] = float((double(map.value[k]) + double(map.value[k + 1])) / 2);
    map.midpoint[255] = 2.0f;
    double octave = 1.0 / (1 << DynamicMap::kOctaves);
    int below = 0;
    for (int cell = 1; cell < DynamicMap::kCells; ++cell) {
        const int step = cell % DynamicMap::kCellsPerOctave;
        if (step == 0) octave *= 2;
        while (map.midpoint[map.zero + below] < octave * (1 + step / double(DynamicMap::kCellsPerOctave))) ++below;
        map.below[cell] = uint8_t(below);
    }
    return map;
}

inline constexpr DynamicMap kSignedMap = make_dynamic_map(true);
inline constexpr DynamicMap kUnsignedMap = make_dynamic_map(false);

// Code of the nearest value = number of midpoints below z (ties to the lower code), for z in [−1, 1] (a little outside: the end
// codes; NaN: some code): one look at the cells, one at the midpoints.
HOST_DEVICE int dynamic_code(const DynamicMap& map, float z) {
    int cell = int((bits_of_float(z) & 0x7fffffffu) >> 16) - DynamicMap::kFirstCell;
    cell = cell < 0 ? 0 : cell < DynamicMap::kCells ? cell : DynamicMap::kCells - 1;
    int offset = map.below[cell];
    int probe = z < 0 ? map.zero - offset - 1 : map.zero + offset;
    if (probe < 0) probe = 0;
    return probe + (z > map.midpoint[probe]);
}

// The code book of NF4 and how a number finds its code: for the CPU form (nf4.cu) and the kernels (nf4_kernels.cuh), one translation unit.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "flat_matrix.h"
#include "nf4.h"

// Quantiles of N(0, 1) at offset 0.9677083 = 1 − (1/32 + 1/30)/2, eight negative and seven positive levels and 0, divided by the
// largest (Dettmers et al. 2023, appendix E).
constexpr float kNf4Code[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

namespace {

constexpr int64_t kGroupsPerBlock = 1024;  // groups of 8 columns that one partial sum of squares covers
constexpr int64_t kSumChunk = 4096;  // absmax values per partial sum: the order of summation is part of the format's reproducibility

struct Nf4Tables {
    float code[16], threshold[15];
};

constexpr Nf4Tables make_tables() {
    Nf4Tables tables{};
    for (int i = 0; i < 16; ++i) tables.code[i] = kNf4Code[i];
    for (int i = 0; i < 15; ++i) tables.threshold[i] = float((double(kNf4Code[i]) + double(kNf4Code[i + 1])) / 2);
    return tables;
}

constexpr Nf4Tables kTables = make_tables();

// Cell c: the numbers next to (c − 16)/16. The thresholds lie in different cells, so one comparison with the one in z's cell settles the
// code. Two arrays of 4-byte elements, not one of pairs: in shared memory all but the last lie in different banks.
struct Nf4Cells {
    float threshold[33];  // in the cell, else nothing exceeds it
    uint32_t code[33];    // of numbers in the cell up to the threshold
};

constexpr Nf4Cells make_cells() {
    Nf4Cells cells{};
    for (int c = 0; c < 33; ++c) {
        const double begin = (c - 16.5) / 16, end = (c - 15.5) / 16;
        cells.threshold[c] = FLT_MAX;
        for (int i = 0; i < 15; ++i) {
            if (double(kTables.threshold[i]) < begin) ++cells.code[c];
            else if (double(kTables.threshold[i]) < end) cells.threshold[c] = kTables.threshold[i];
        }
    }
    return cells;
}

constexpr Nf4Cells kCells = make_cells();

// Number of thresholds below z, |z| ≤ 1 or next to it.
HOST_DEVICE uint32_t nf4_code(const Nf4Cells& cells, float z) {
    // 16·z + 16, rounded, ends up in the low bits of a float near 1.5·2²³; the product is exact, fused or not.
    const uint32_t cell = bits_of_float(z * 16.0f + (12582912.0f + 16.0f)) & 63u;
    return cells.code[cell] + (z > cells.threshold[cell] ? 1u : 0u);
}

// 1/a, or 0 where that would overflow: zero and subnormal maxima count as zero.
HOST_DEVICE float reciprocal_or_zero(float a) { return a >= FLT_MIN ? 1.0f / a : 0.0f; }

HOST_DEVICE bool is_finite(float x) { return fabsf(x) <= FLT_MAX; }

}  // namespace

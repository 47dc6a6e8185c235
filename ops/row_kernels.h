// Building blocks of the memory-bound kernels: 16-byte loads and stores of bf16/fp32 groups, warp sums, launch geometry.
// Kernels are templates over the group width N: 8 elements where all rows are 16-byte aligned, else 1.
#pragma once
#ifdef WITH_CUDA
#include "runtime/cuda_context.h"
#include "runtime/tensor.h"

constexpr int kWarp = 32;
constexpr int kVector = 8;  // one 16-byte access of bf16, two of fp32

// Two fp32 to packed bf16, round to nearest even; lo goes to the lower address.
__device__ __forceinline__ uint32_t pack_bf16x2(float lo, float hi) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
    return packed;
}

__device__ __forceinline__ void unpack_bf16x8(const uint4& raw, float (&x)[8]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = float_of_bits(words[i] << 16);
        x[2 * i + 1] = float_of_bits(words[i] & 0xffff0000u);
    }
}

// N consecutive elements as fp32; for N = 8, p must be 16-byte aligned.
template <int N> __device__ __forceinline__ void load_n(const bf16* p, float (&x)[N]) {
    static_assert(N == 1 || N == 8, "width");
    if constexpr (N == 8) unpack_bf16x8(*reinterpret_cast<const uint4*>(p), x);
    else x[0] = to_float(*p);
}
template <int N> __device__ __forceinline__ void load_n(const float* p, float (&x)[N]) {
    static_assert(N == 1 || N == 8, "width");
    if constexpr (N == 8) {
        float4 a = *reinterpret_cast<const float4*>(p), b = *reinterpret_cast<const float4*>(p + 4);
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else {
        x[0] = *p;
    }
}

template <int N> __device__ __forceinline__ void store_n(bf16* p, const float (&x)[N]) {
    if constexpr (N == 8)
        *reinterpret_cast<uint4*>(p) = make_uint4(pack_bf16x2(x[0], x[1]), pack_bf16x2(x[2], x[3]), pack_bf16x2(x[4], x[5]), pack_bf16x2(x[6], x[7]));
    else store(*p, x[0]);
}
template <int N> __device__ __forceinline__ void store_n(float* p, const float (&x)[N]) {
    if constexpr (N == 8) {
        *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
        *reinterpret_cast<float4*>(p + 4) = make_float4(x[4], x[5], x[6], x[7]);
    } else {
        *p = x[0];
    }
}

// One 16-byte store: left to itself the compiler splits it where the words come out of branches.
__device__ __forceinline__ void store_words(void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Sum over the warp, the same bits in every lane (each exchange adds the same two numbers on both sides).
template <class T> __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// True if every row of t starts on a 16-byte boundary.
inline bool aligned_rows(const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && (t.rows == 1 || t.ld * size_of(t.dtype) % 16 == 0);
}

// n / divisor for n < 2^32 by a multiplication (Granlund & Montgomery 1994); the GPU has no integer division.
struct Divisor {
    uint32_t divisor = 1, factor = 1, shift = 0;
    explicit Divisor(int64_t d) : divisor(uint32_t(d)) {
        while ((uint64_t(1) << shift) < divisor) ++shift;
        factor = uint32_t((uint64_t(1) << 32) * ((uint64_t(1) << shift) - divisor) / divisor + 1);
    }
    __device__ __forceinline__ uint32_t divide(uint32_t n) const { return uint32_t((uint64_t(__umulhi(n, factor)) + n) >> shift); }
};

// One thread per group of every row of a matrix, in one sequence: no thread idles at the end of a row.
struct RowLaunch {
    static constexpr int threads = 256;
    unsigned blocks;
    int64_t total;
    bool one_row;
    Divisor groups_per_row;

    RowLaunch(int64_t rows, int64_t groups)
        : blocks(unsigned(ceil_div(rows * groups, threads))), total(rows * groups), one_row(rows == 1), groups_per_row(one_row ? 1 : groups) {
        const int64_t limit = one_row ? int64_t(threads) << 31 : int64_t(1) << 32;
        CHECK_INTERNAL(total < limit, "%lld × %lld groups exceed one launch", (long long)rows, (long long)groups);
    }
    // This thread's row and group; false past the end.
    __device__ __forceinline__ bool locate(int64_t& row, int64_t& group) const {
        const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
        if (i >= total) return false;
        const uint32_t r = one_row ? 0 : groups_per_row.divide(uint32_t(i));
        row = r, group = one_row ? i : int64_t(uint32_t(i) - r * groups_per_row.divisor);
        return true;
    }
};
#endif

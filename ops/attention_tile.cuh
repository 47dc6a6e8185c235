// What the attention kernels share: 64-row bf16 tiles in shared memory, and the warp-level matrix instructions on them.
// A block is four warps; warp w owns rows 16w .. 16w+15 of the block's result, so no warp needs another's accumulators.
#pragma once
#include "ops/rope_rotation.h"
#include "runtime/bfloat16.h"
#include "runtime/cuda_context.h"

namespace attention {

constexpr int kTile = 64;       // rows of every tile: queries or keys
constexpr int kThreads = 128;   // four warps of 16 rows
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// One lane's place in the fragments of mma.m16n8k16: rows g and g+8, columns 2t and 2t+1.
struct Lane {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int g = lane / 4, t = lane % 4;
};

template <int D> constexpr int tile_bytes() { return kTile * D * int(sizeof(bf16)); }

// Where the q, k, v of one sequence begin, and the stride between rows (all three share the rows of qkv).
struct Strided {
    const bf16* data;
    int64_t ld;
};

// Offset of 16-byte chunk `chunk` of row `row`. The XOR spreads the eight rows that ldmatrix reads at once over all banks.
template <int D> __device__ __forceinline__ int swizzled(int row, int chunk) { return row * D + ((chunk ^ (row & 7)) << 3); }

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Asynchronous copy of 16 (4) bytes into shared memory, or zeros if !inside: src is then not read (callers still pass an
// address inside the tensor).
__device__ __forceinline__ void copy16_async(void* dst, const void* src, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(dst)), "l"(src), "r"(inside ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy4_async(void* dst, const void* src, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(dst)), "l"(src), "r"(inside ? 4 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most `Pending` of this thread's most recent groups are unfinished.
template <int Pending> __device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory"); }

// Starts copying rows row0 .. row0+63 (zeros from row `rows` on) by D columns into a tile; the whole block takes part.
template <int D> __device__ __forceinline__ void load_tile(bf16* tile, Strided src, int row0, int rows) {
    constexpr int kChunks = D / 8, kRowStep = kThreads / kChunks;
    static_assert(kRowStep % 8 == 0, "a thread's rows share their swizzle");
    const int r = int(threadIdx.x) / kChunks, chunk = int(threadIdx.x) % kChunks;
    bf16* to = tile + swizzled<D>(r, chunk);
    const bf16* from = src.data + int64_t(row0 + r) * src.ld + chunk * 8;
#pragma unroll
    for (int i = 0; i < kTile; i += kRowStep) {
        bool inside = row0 + r + i < rows;
        copy16_async(to + i * D, inside ? from + i * src.ld : src.data, inside);
    }
}

// Four 8×8 matrices; the address that lane l gives is row l%8 of matrix l/8.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// A operand: 16 rows × 16 columns of the tile at (row0, col0).
template <int D> __device__ __forceinline__ void load_a(uint32_t (&a)[4], const bf16* tile, int row0, int col0, int lane) {
    ldmatrix(a, tile + swizzled<D>(row0 + (lane & 15), col0 / 8 + (lane >> 4)));
}
// B operand with k along the tile's columns, n along its rows (X·tileᵀ): two n8 blocks, b[0..1] rows row0.., b[2..3] rows row0+8.. .
template <int D> __device__ __forceinline__ void load_b_rows(uint32_t (&b)[4], const bf16* tile, int row0, int col0, int lane) {
    ldmatrix(b, tile + swizzled<D>(row0 + (lane & 7) + ((lane >> 4) << 3), col0 / 8 + ((lane >> 3) & 1)));
}
// B operand with k along the tile's rows, n along its columns (X·tile): two n8 blocks, b[0..1] columns col0.., b[2..3] columns col0+8.. .
template <int D> __device__ __forceinline__ void load_b_cols(uint32_t (&b)[4], const bf16* tile, int row0, int col0, int lane) {
    ldmatrix_transposed(b, tile + swizzled<D>(row0 + (lane & 15), col0 / 8 + (lane >> 4)));
}

// c (16×8, fp32) += a (16×16) · b (16×8).
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Both n8 blocks of a loaded B operand.
__device__ __forceinline__ void mma_pair(float (*c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    mma(c[0], a, b[0], b[1]);
    mma(c[1], a, b[2], b[3]);
}

// Two floats rounded to nearest even, `low` in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
// Two adjacent 16×8 accumulators are, lane by lane, a 16×16 A operand.
__device__ __forceinline__ void accumulators_to_a(uint32_t (&a)[4], const float (*c)[4]) {
    a[0] = pack_bf16(c[0][0], c[0][1]);
    a[1] = pack_bf16(c[0][2], c[0][3]);
    a[2] = pack_bf16(c[1][0], c[1][1]);
    a[3] = pack_bf16(c[1][2], c[1][3]);
}

__device__ __forceinline__ float exp2_approx(float x) {  // 2 ulp; −inf gives 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

// Writes a warp's 16×D accumulator, rows times scale[0] (g) and scale[1] (g+8), to rows row0+16·warp.. of dst where those are
// < rows. It passes through the warp's own 16 rows of a tile that only this warp still reads, so that global stores are 16 bytes.
template <int D>
__device__ __forceinline__ void store_rows(bf16* tile, const float (&c)[D / 8][4], const float (&scale)[2], bf16* dst, int64_t ld, int row0,
                                           int rows, const Lane& at) {
    __syncwarp();
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            *reinterpret_cast<uint32_t*>(tile + swizzled<D>(16 * at.warp + at.g + 8 * half, n) + 2 * at.t) =
                pack_bf16(c[n][2 * half] * scale[half], c[n][2 * half + 1] * scale[half]);
    __syncwarp();
    constexpr int kChunks = D / 8;
#pragma unroll
    for (int i = 0; i < 16 * kChunks / 32; ++i) {
        int index = i * 32 + at.lane, r = 16 * at.warp + index / kChunks, chunk = index % kChunks;
        if (row0 + r < rows)
            *reinterpret_cast<uint4*>(dst + int64_t(row0 + r) * ld + chunk * 8) = *reinterpret_cast<const uint4*>(tile + swizzled<D>(r, chunk));
    }
}

// Rotates a warp's 16×D gradient back by the angles of its rows, as the two-step form does: times `scale`, rounded to bf16, turned in
// fp32. What is stored next rounds once more. table: cos | sin, ld floats per position; rows ≥ `rows` are left alone.
template <int D>
__device__ __forceinline__ void rotate_back(float (&c)[D / 8][4], float scale, const float* table, int64_t ld, int row0, int rows, const Lane& at) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row0 + 16 * at.warp + at.g + 8 * half;
        if (row >= rows) continue;
        const float* angles = table + row * ld + 2 * at.t;
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            const float2 cosine = *reinterpret_cast<const float2*>(angles + 8 * n), sine = *reinterpret_cast<const float2*>(angles + D / 2 + 8 * n);
            float *first = &c[n][2 * half], *second = &c[n + D / 16][2 * half];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                first[e] = to_float(to_bf16(first[e] * scale)), second[e] = to_float(to_bf16(second[e] * scale));
                rotate_pair(first[e], second[e], e ? cosine.y : cosine.x, e ? -sine.y : -sine.x);
            }
        }
    }
}

// Launches kernel on `stream` with dynamic shared memory above the 48 KB default.
template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, int shared_bytes, cudaStream_t stream, Args... args) {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    kernel<<<grid, kThreads, shared_bytes, stream>>>(args...);
    LAUNCH_CHECK();
}

}  // namespace attention

// What the attention kernels share: bf16 tiles in shared memory, and the warp-level matrix instructions on them.
#pragma once
#include "ops/rope_rotation.h"
#include "runtime/bfloat16.h"
#include "runtime/cuda_context.h"

namespace attention {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__host__ __device__ constexpr int tiles_of(int size, int tile) { return (size + tile - 1) / tile; }

// One lane's place in the fragments of mma.m16n8k16: rows g and g+8, columns 2t and 2t+1.
struct Lane {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int g = lane / 4, t = lane % 4;
};

// One head's columns of q, k, v or dO in one sequence, and the stride between rows.
struct Strided {
    const bf16* data;
    int ld;
};

// Offset of 16-byte chunk `chunk` of row `row` of a tile of C columns. The XOR spreads the eight rows that ldmatrix reads at once over
// all banks (rows of 32 columns are half a line of banks: two of them share it).
template <int C> __device__ __forceinline__ int swizzled(int row, int chunk) {
    static_assert(C == 32 || C % 64 == 0, "columns");
    return row * C + ((C == 32 ? chunk ^ (row >> 1 & 3) : chunk ^ (row & 7)) << 3);
}

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

// Starts copying Rows rows from row0 on (zeros from row `rows` on) by D columns into a tile; all Threads of the block take part.
template <int D, int Rows, int Threads> __device__ __forceinline__ void load_tile(bf16* tile, Strided src, int row0, int rows) {
    constexpr int kChunks = D / 8, kRowStep = Threads / kChunks;
    static_assert(kRowStep % 8 == 0 && Rows % kRowStep == 0, "a thread's rows share their swizzle");
    const int r = int(threadIdx.x) / kChunks, chunk = int(threadIdx.x) % kChunks;
    bf16* to = tile + swizzled<D>(r, chunk);
    const bf16* from = src.data + int64_t(row0 + r) * src.ld + chunk * 8;
#pragma unroll
    for (int i = 0; i < Rows; i += kRowStep) {
        bool inside = row0 + r + i < rows;
        copy16_async(to + i * D, inside ? from + int64_t(i) * src.ld : src.data, inside);
    }
}

// Four 8×8 matrices; the address that lane l gives is row l%8 of matrix l/8. A operands (16 rows × 16 columns) come from ldmatrix at
// by_columns, or if the tile holds the operand's transpose from ldmatrix_transposed at by_rows. B operands for two n8 blocks: X·tileᵀ, k
// along the tile's columns, from ldmatrix at by_rows; X·tile, k along its rows, from ldmatrix_transposed at by_columns.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// Byte offsets of what a lane hands to ldmatrix and of what it writes, within tiles of C columns. Tiles begin at multiples of 256 bytes,
// so a column that is a multiple of 8 is reached by an XOR (see swizzled) and a row that is a multiple of 8 by an addition: the loops
// need no other arithmetic. `keep` hides the values' origin from the compiler, which would compute them anew at each use.
template <int C> __device__ __forceinline__ uint32_t by_columns(int lane) { return uint32_t(swizzled<C>(lane & 15, lane >> 4)) * 2; }
template <int C> __device__ __forceinline__ uint32_t by_rows(int lane) {
    return uint32_t(swizzled<C>((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1)) * 2;
}
template <int C> __device__ __forceinline__ uint32_t by_pairs(const Lane& at) { return uint32_t(swizzled<C>(at.g, 0) + 2 * at.t) * 2; }
__device__ __forceinline__ uint32_t keep(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}
__host__ __device__ constexpr uint32_t column(int col) { return uint32_t(col) * 2; }                                    // to XOR
template <int C> __host__ __device__ constexpr uint32_t row(int r) { return uint32_t(r) * C * 2; }  // to add

// c (16×8, fp32) += a (16×16) · b (16×8).
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
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
__device__ __forceinline__ void unpack_bf16(uint32_t word, float (&x)[2]) {
    x[0] = float_of_bits(word << 16), x[1] = float_of_bits(word & 0xffff0000u);
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

// Stores two adjacent 16×8 blocks of one row: low and high are a lane's two columns of each. After swapping words with its neighbour a
// lane holds four adjacent columns, and a row's 32 bytes go out in one piece. All lanes take part; `inside`: whether to write.
__device__ __forceinline__ void store_16_columns(bf16* dst, uint32_t low, uint32_t high, bool inside, const Lane& at) {
    const bool odd = at.t & 1;
    const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
    if (inside) *reinterpret_cast<uint2*>(dst + (odd ? 8 : 0) + (at.t & 2) * 2) = odd ? make_uint2(other, high) : make_uint2(low, other);
}

// Stores 16 rows (row0.. where < rows) of a gradient of which a lane has N blocks of 8 columns from out on and N from half_head columns
// further: times scale, rounded to bf16, and with a table (cos | sin of out's first column on, half_head apart) turned back by the angles
// of its rows in fp32 and rounded again, as rope_inplace does.
template <int N>
__device__ __forceinline__ void store_gradient(const float (&c)[2 * N][4], float scale, const float* table, int ld_table, bf16* out, int ld,
                                               int half_head, int row0, int rows, const Lane& at) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row0 + at.g + 8 * half;
        const bool inside = row < rows;
        uint32_t words[2][N];  // of the first and the second half of the head
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int second = 0; second < 2; ++second)
                words[second][n] = pack_bf16(c[second * N + n][2 * half] * scale, c[second * N + n][2 * half + 1] * scale);
        if (table) {
            const float* angles = table + int64_t(inside ? row : 0) * ld_table + 2 * at.t;
            float2 cosine[N], sine[N];  // all fetched before the first is used
#pragma unroll
            for (int n = 0; n < N; ++n) {
                cosine[n] = __ldg(reinterpret_cast<const float2*>(angles + 8 * n));
                sine[n] = __ldg(reinterpret_cast<const float2*>(angles + half_head + 8 * n));
            }
#pragma unroll
            for (int n = 0; n < N; ++n) {
                float a[2], b[2];
                unpack_bf16(words[0][n], a), unpack_bf16(words[1][n], b);
                rotate_pair(a[0], b[0], cosine[n].x, -sine[n].x), rotate_pair(a[1], b[1], cosine[n].y, -sine[n].y);
                words[0][n] = pack_bf16(a[0], a[1]), words[1][n] = pack_bf16(b[0], b[1]);
            }
        }
        bf16* to = out + int64_t(row) * ld;
#pragma unroll
        for (int n = 0; n < N; n += 2)
#pragma unroll
            for (int second = 0; second < 2; ++second)
                store_16_columns(to + second * half_head + 8 * n, words[second][n], words[second][n + 1], inside, at);
    }
}

// Lets a kernel use so much dynamic shared memory, above the 48 KB default.
template <class Kernel> void allow_shared(Kernel kernel, int bytes) {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

}  // namespace attention

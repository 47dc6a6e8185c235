// NF4 on the GPU: quantization, dequantization and residuals. See nf4.h; the plain loops are in nf4.cu.
#pragma once
#include <algorithm>
#include <type_traits>

#include "dynamic_map.h"
#include "nf4_tables.h"
#include "ops/row_kernels.h"
#include "runtime/cuda_context.h"

namespace {

Tensor as_row(const Tensor& t) { return Tensor{t.data, t.dtype, 1, t.numel(), t.numel()}; }

constexpr int kThreads = 256, kQuantizeGroups = 2, kDequantizeGroups = 4;

__device__ const Nf4Cells kDeviceCells = kCells;
__device__ const DynamicMap kDeviceSignedMap = kSignedMap;
__device__ const Nf4Tables kDeviceTables = kTables;

// A matrix as groups of up to `width` consecutive columns of one row, in one sequence.
struct GroupGrid {
    int64_t cols, ld;
    int width, last;  // columns of a group, of the last one of a row
    uint32_t count;   // groups
    Divisor per_row;

    GroupGrid(const Tensor& t, int columns)
        : cols(t.cols), ld(t.ld), width(columns), last(int((t.cols - 1) % columns) + 1), per_row(ceil_div(t.cols, columns)) {
        const int64_t groups = t.rows * ceil_div(t.cols, columns);
        CHECK_INTERNAL(groups <= (int64_t(1) << 32) - kGroupsPerBlock, "NF4 matrix of %lld elements", (long long)t.numel());
        count = uint32_t(groups);
    }
    unsigned blocks(int64_t groups_per_block) const { return unsigned(ceil_div(count, groups_per_block)); }
    // True if groups may begin anywhere within a code word and straddle two NF4 blocks.
    bool ragged() const { return count > per_row.divisor && cols % 8 != 0; }
    // Finds a group's row and its number there; returns its columns, 0 past the end.
    __device__ int locate(uint32_t group, uint32_t& row, uint32_t& index) const {
        row = per_row.divide(group), index = group - row * per_row.divisor;
        return group >= count ? 0 : index + 1 < per_row.divisor ? width : last;
    }
};

// Eight consecutive elements at a time, so 8 lanes share a block of 64 and 8 codes are one 32-bit store. whole: all groups are eight
// aligned neighbours in memory and so are their codes. All loads come first and nothing waits for them before the last is on its way.
template <class T, bool whole>
__global__ void __launch_bounds__(kThreads) quantize_kernel(uint8_t* codes, float* absmax, FlatMatrix<const T> w, GroupGrid grid, int32_t* nonfinite) {
    __shared__ Nf4Cells cells;
    const uint32_t first = blockIdx.x * kThreads * kQuantizeGroups + threadIdx.x;
    Pack8<T> in[kQuantizeGroups];
    int count[kQuantizeGroups];
#pragma unroll
    for (int u = 0; u < kQuantizeGroups; ++u) {
        const uint32_t group = first + u * kThreads;
        uint32_t row, index;
        count[u] = grid.locate(group, row, index);
#pragma unroll
        for (int k = 0; k < 8; ++k) in[u].x[k] = T{};
        if (whole) {
            if (count[u]) in[u].load(w.data + row * grid.ld + int64_t(index) * 8);
        } else if (count[u]) {
            FlatCursor<const T> cursor(w, int64_t(group) * 8);
            if (count[u] == 8 && cursor.left_in_row() >= 8 && Pack8<T>::aligned(cursor.pointer())) {
                in[u].load(cursor.pointer());
            } else {
#pragma unroll
                for (int k = 0; k < 8; ++k)
                    if (k < count[u]) in[u].x[k] = *cursor, ++cursor;
            }
        }
    }
    if (threadIdx.x < 33) cells.threshold[threadIdx.x] = kDeviceCells.threshold[threadIdx.x], cells.code[threadIdx.x] = kDeviceCells.code[threadIdx.x];
    __syncthreads();

#pragma unroll
    for (int u = 0; u < kQuantizeGroups; ++u) {
        float x[8];
        uint32_t largest = 0;  // bits of absolute values: they are ordered as the numbers are, and what is not finite comes last
#pragma unroll
        for (int k = 0; k < 8; ++k) x[k] = to_float(in[u].x[k]), largest = max(largest, bits_of_float(x[k]) & 0x7fffffffu);
        if (__any_sync(0xffffffffu, largest >= 0x7f800000u)) {
            int bad = 0;
            largest = 0;
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                if (!is_finite(x[k])) x[k] = 0.0f, ++bad;
                largest = max(largest, bits_of_float(x[k]) & 0x7fffffffu);
            }
            if (bad && nonfinite) atomicAdd(nonfinite, bad);
        }
#pragma unroll
        for (int lane = 1; lane < 8; lane *= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lane));
        const float a = float_of_bits(largest), inverse = reciprocal_or_zero(a);
        if (count[u] == 0) continue;
        const uint32_t group = first + u * kThreads;
        if (group % 8 == 0) absmax[group / 8] = inverse > 0.0f ? a : 0.0f;

        uint32_t packed = 0;
#pragma unroll
        for (int k = 7; k >= 0; --k) packed = packed * 16 + nf4_code(cells, x[k ^ 1] * inverse);  // even element: high nibble
        if (whole) {
            reinterpret_cast<uint32_t*>(codes)[group] = packed;
        } else {
            for (int i = 0; i < (count[u] + 1) / 2; ++i) codes[int64_t(group) * 4 + i] = uint8_t(packed >> (8 * i));
        }
    }
}

// Sum over the thread block in a fixed order; every thread gets it.
__device__ double block_sum(double x) {
    __shared__ double shared[kThreads];
    shared[threadIdx.x] = x;
    __syncthreads();
    for (int half = kThreads / 2; half; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    return shared[0];
}

__device__ float block_max(float x) {
    __shared__ float shared[kThreads];
    shared[threadIdx.x] = x;
    __syncthreads();
    for (int half = kThreads / 2; half; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] = fmaxf(shared[threadIdx.x], shared[threadIdx.x + half]);
        __syncthreads();
    }
    return shared[0];
}

__global__ void __launch_bounds__(kThreads) sum_absmax_kernel(double* partial, const float* absmax, int64_t blocks) {
    const int64_t begin = blockIdx.x * kSumChunk, end = min(blocks, begin + kSumChunk);
    double sum = 0;
    for (int64_t b = begin + threadIdx.x; b < end; b += kThreads) sum += absmax[b];
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One thread block per second-level block, one thread per absmax. Every thread block adds the partial sums again: cheaper than
// another launch.
__global__ void __launch_bounds__(kThreads)
    nest_absmax_kernel(uint8_t* codes8, float* scale2, float* offset_out, const float* absmax, int64_t blocks, const double* partial, int64_t chunks) {
    static_assert(kThreads == kNestedBlock, "one thread per absmax");
    double sum = 0;
    for (int64_t c = threadIdx.x; c < chunks; c += kThreads) sum += partial[c];
    const float offset = float(block_sum(sum) / double(blocks));
    const int64_t b = int64_t(blockIdx.x) * kNestedBlock + threadIdx.x;
    const float difference = b < blocks ? absmax[b] - offset : 0.0f;
    const float a = block_max(fabsf(difference));
    const float inverse = reciprocal_or_zero(a);
    if (b < blocks) codes8[b] = uint8_t(dynamic_code(kDeviceSignedMap, difference * inverse));
    if (threadIdx.x == 0) {
        scale2[blockIdx.x] = inverse > 0.0f ? a : 0.0f;
        if (blockIdx.x == 0) *offset_out = offset;
    }
}

template <class T> void quantize_blocks_cuda(CudaContext& cuda, const Nf4Tensor& q, Tensor w, float* absmax, int32_t* nonfinite) {
    uint8_t* codes = q.codes.as<uint8_t>();
    if (w.contiguous()) w = as_row(w);
    const bool whole = w.cols % 8 == 0 && aligned_rows(w) && reinterpret_cast<uintptr_t>(codes) % 4 == 0;
    const GroupGrid grid(whole ? w : as_row(w), 8);  // else groups of the flat sequence, wherever its rows begin
    const FlatMatrix<const T> flat(w);
    const unsigned blocks = grid.blocks(kThreads * kQuantizeGroups);
    if (whole) quantize_kernel<T, true><<<blocks, kThreads, 0, cuda.stream>>>(codes, absmax, flat, grid, nonfinite);
    else quantize_kernel<T, false><<<blocks, kThreads, 0, cuda.stream>>>(codes, absmax, flat, grid, nonfinite);
    LAUNCH_CHECK();
}

void quantize_cuda(CudaContext& cuda, const Nf4Tensor& q, Tensor w, float* absmax, double* partial, int32_t* nonfinite) {
    const int64_t blocks = q.blocks();
    if (w.dtype == DType::bf16) quantize_blocks_cuda<bf16>(cuda, q, w, absmax, nonfinite);
    else quantize_blocks_cuda<float>(cuda, q, w, absmax, nonfinite);
    if (!q.nested) return;
    const int64_t chunks = ceil_div(blocks, kSumChunk);
    sum_absmax_kernel<<<unsigned(chunks), kThreads, 0, cuda.stream>>>(partial, absmax, blocks);
    LAUNCH_CHECK();
    nest_absmax_kernel<<<unsigned(ceil_div(blocks, kNestedBlock)), kThreads, 0, cuda.stream>>>(
        q.codes8.as<uint8_t>(), q.scale2.as<float>(), q.offset.as<float>(), absmax, blocks, partial, chunks);
    LAUNCH_CHECK();
}

// What dequantization reads; absmax is null for a nested tensor.
struct Nf4Source {
    const uint8_t *codes, *codes8;
    const float *absmax, *scale2, *offset;
    int64_t code_bytes;
    uint32_t blocks, whole_words;  // whole_words: of 8 codes that can be read as such; not a shorter last one, none at an odd address

    explicit Nf4Source(const Nf4Tensor& q)
        : codes(q.codes.as<uint8_t>()), codes8(static_cast<uint8_t*>(q.codes8.data)), absmax(static_cast<float*>(q.absmax.data)),
          scale2(static_cast<float*>(q.scale2.data)), offset(static_cast<float*>(q.offset.data)), code_bytes((q.numel() + 1) / 2),
          blocks(uint32_t(q.blocks())), whole_words(reinterpret_cast<uintptr_t>(codes) % 4 == 0 ? uint32_t(code_bytes / 4) : 0) {}

    __device__ uint32_t bytes_of_word(int64_t position) const {
        uint32_t bytes = 0;
        for (int i = 0; i < 4; ++i)
            if (position * 4 + i < code_bytes) bytes |= uint32_t(codes[position * 4 + i]) << (8 * i);
        return bytes;
    }
};

// Tables for one thread block.
struct SharedTables {
    float code_value[16];  // 16 different banks: no conflicts whatever the codes
    float map[256];

    template <bool nested> __device__ void fill() {
        static_assert(kThreads == 256, "one map entry per thread");
        if (nested) map[threadIdx.x] = kDeviceSignedMap.value[threadIdx.x];
        if (threadIdx.x < 16) code_value[threadIdx.x] = kDeviceTables.code[threadIdx.x];
        __syncthreads();
    }
};

// Dequantization deals out work by what is *written*: a thread writes the 16 bytes (or one row's last few) next to its neighbour's and
// fetches the codes from wherever in the flat sequence they are, so rows of odd length cost two code words instead of one but no narrow
// accesses. load() only asks memory and values() does all that waits for the answer, so that a thread that loads several groups and then
// the tables has everything on its way at once: a small matrix takes one trip to memory, a large one keeps memory busy.
template <int width, bool nested, bool ragged> struct CodeGroup {
    static constexpr int parts = ragged ? 2 : 1;  // code words and NF4 blocks that a group may touch
    uint32_t row, index;                          // index: of the group in its row
    int count;                                    // elements; 0 past the end
    uint64_t element;
    uint32_t word[parts];
    uint8_t code8[parts];
    float scale[parts];  // absmax or the second-level scale

    __device__ void load(const GroupGrid& grid, const Nf4Source& q, uint32_t group) {
        count = grid.locate(group, row, index);
        if (count == 0) return;
        element = ragged ? row * uint64_t(grid.cols) + uint64_t(index) * width : uint64_t(group) * width;
#pragma unroll
        for (int i = 0; i < parts; ++i) {
            const uint32_t position = uint32_t(element / 8) + i;
            if (position < q.whole_words) word[i] = reinterpret_cast<const uint32_t*>(q.codes)[position];
            const uint32_t block = min(uint32_t(element / kNf4Block) + i, q.blocks - 1);
            if (nested) code8[i] = q.codes8[block];
            scale[i] = nested ? q.scale2[block / kNestedBlock] : q.absmax[block];
        }
    }
    __device__ void values(const SharedTables& shared, const Nf4Source& q, float offset, float (&x)[width]) {
#pragma unroll
        for (int i = 0; i < parts; ++i) {
            const uint32_t position = uint32_t(element / 8) + i;
            if (position >= q.whole_words) word[i] = q.bytes_of_word(position);
            word[i] = (word[i] & 0x0f0f0f0fu) << 4 | ((word[i] >> 4) & 0x0f0f0f0fu);  // the first code in the lowest nibble
            if (nested) scale[i] = __fadd_rn(__fmul_rn(shared.map[code8[i]], scale[i]), offset);
        }
        const int shift = int(element % 8) * 4, straddle = int(kNf4Block - element % kNf4Block);  // straddle: elements before the next NF4 block
        const uint32_t codes = ragged ? __funnelshift_r(word[0], word[parts - 1], shift) : width < 8 ? word[0] >> shift : word[0];
#pragma unroll
        for (int k = 0; k < width; ++k)
            x[k] = __fmul_rn(shared.code_value[(codes >> (4 * k)) & 15], !ragged || k < straddle ? scale[0] : scale[parts - 1]);
    }
    __device__ int64_t offset(int64_t ld) const { return row * ld + int64_t(index) * width; }
};

// x of a group to or from memory, with 16-byte accesses where that is possible.
__device__ void store_whole(bf16* out, const float (&x)[8]) { store_n(out, x); }
template <int width> __device__ void store_whole(float* out, const float (&x)[width]) {
#pragma unroll
    for (int k = 0; k < width; k += 4) *reinterpret_cast<float4*>(out + k) = make_float4(x[k], x[k + 1], x[k + 2], x[k + 3]);
}

template <class T, int width> __device__ void store_group(T* out, const float (&x)[width], int count, bool aligned) {
    if (count == width && aligned) return store_whole(out, x);
#pragma unroll
    for (int k = 0; k < width; ++k)
        if (k < count) store(out[k], x[k]);
}

__device__ void load_group(const float* in, float (&x)[8], int count, bool aligned) {
    if (count == 8 && aligned) return load_n(in, x);
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] = k < count ? in[k] : 0.0f;
}

// 16 bytes a thread, next to its neighbours' 16 bytes.
template <class T, bool nested, bool ragged> __global__ void __launch_bounds__(kThreads) dequantize_kernel(T* w, GroupGrid grid, bool aligned, Nf4Source q) {
    constexpr int width = int(16 / sizeof(T));
    __shared__ SharedTables shared;
    CodeGroup<width, nested, ragged> group[kDequantizeGroups];
#pragma unroll
    for (int u = 0; u < kDequantizeGroups; ++u) group[u].load(grid, q, (blockIdx.x * kDequantizeGroups + u) * kThreads + threadIdx.x);
    const float offset = nested ? *q.offset : 0.0f;
    shared.fill<nested>();
#pragma unroll
    for (int u = 0; u < kDequantizeGroups; ++u) {
        if (group[u].count == 0) continue;
        float x[width];
        group[u].values(shared, q, offset, x);
        store_group(w + group[u].offset(grid.ld), x, group[u].count, aligned);
    }
}

// call(nested, ragged) with the two as types.
template <class F> void with_layout(bool nested, bool ragged, F call) {
    using yes = std::true_type;
    using no = std::false_type;
    if (nested) ragged ? call(yes{}, yes{}) : call(yes{}, no{});
    else ragged ? call(no{}, yes{}) : call(no{}, no{});
}

template <class T> void dequantize_cuda(CudaContext& cuda, Tensor w, const Nf4Tensor& q) {
    if (w.contiguous()) w = as_row(w);
    const GroupGrid grid(w, int(16 / sizeof(T)));
    with_layout(q.nested, grid.ragged(), [&](auto nested, auto ragged) {
        dequantize_kernel<T, nested, ragged>
            <<<grid.blocks(kThreads * kDequantizeGroups), kThreads, 0, cuda.stream>>>(w.as<T>(), grid, aligned_rows(w), Nf4Source(q));
    });
    LAUNCH_CHECK();
}

// residual (unless null) = w − deq(q); partial[block] = Σ (w − deq(q))² over the groups of the block.
template <class T, bool nested, bool ragged>
__global__ void __launch_bounds__(kThreads)
    residual_kernel(T* residual, int64_t ld_residual, bool aligned_residual, double* partial, const float* w, GroupGrid grid, bool aligned, Nf4Source q) {
    constexpr int kGroupsPerThread = int(kGroupsPerBlock) / kThreads;
    __shared__ SharedTables shared;
    CodeGroup<8, nested, ragged> group[kGroupsPerThread];
    float x[kGroupsPerThread][8];
#pragma unroll
    for (int u = 0; u < kGroupsPerThread; ++u) {
        group[u].load(grid, q, (blockIdx.x * kGroupsPerThread + u) * kThreads + threadIdx.x);
        if (group[u].count) load_group(w + group[u].offset(grid.ld), x[u], group[u].count, aligned);
    }
    const float offset = nested ? *q.offset : 0.0f;
    shared.fill<nested>();
    double sum = 0;
#pragma unroll
    for (int u = 0; u < kGroupsPerThread; ++u) {
        if (group[u].count == 0) continue;
        float value[8], squares = 0;
        group[u].values(shared, q, offset, value);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            value[k] = k < group[u].count ? x[u][k] - value[k] : 0.0f;
            squares = fmaf(value[k], value[k], squares);
        }
        sum += double(squares);
        if (residual) store_group(residual + group[u].offset(ld_residual), value, group[u].count, aligned_residual);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) add_partials_kernel(double* out, const double* partial, int64_t count) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *out = sum;
}

template <class T> void residual_cuda(CudaContext& cuda, Tensor residual, Tensor w, const Nf4Tensor& q, double* sum, double* partial) {
    if (w.contiguous() && (!residual || residual.contiguous())) {  // else the rows of both are walked one by one
        w = as_row(w);
        if (residual) residual = as_row(residual);
    }
    const GroupGrid grid(w, 8);
    const unsigned blocks = grid.blocks(kGroupsPerBlock);
    T* out = residual ? residual.as<T>() : nullptr;
    with_layout(q.nested, grid.ragged(), [&](auto nested, auto ragged) {
        residual_kernel<T, nested, ragged><<<blocks, kThreads, 0, cuda.stream>>>(out, residual.ld, aligned_rows(residual), partial, w.as<float>(), grid,
                                                                               aligned_rows(w), Nf4Source(q));
    });
    LAUNCH_CHECK();
    add_partials_kernel<<<1, kThreads, 0, cuda.stream>>>(sum, partial, blocks);
    LAUNCH_CHECK();
}

}  // namespace

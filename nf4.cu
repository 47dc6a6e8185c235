// NF4 quantization and dequantization. See nf4.h.
#include "nf4.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "dynamic_map.h"
#include "flat_matrix.h"
#include "ops/row_kernels.h"
#include "runtime/cuda_context.h"
#include "runtime/profile.h"

// Quantiles of N(0, 1) at offset 0.9677083 = 1 − (1/32 + 1/30)/2, eight negative and seven positive levels and 0, divided by the
// largest (Dettmers et al. 2023, appendix E).
constexpr float kNf4Code[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

namespace {

constexpr int64_t kGroupsPerBlock = 1024;  // groups of 8 columns that one thread block dequantizes, and that one partial sum of squares covers
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

// Number of thresholds below z, by bisection; NaN gives 0.
HOST_DEVICE int nf4_code(const float* threshold, float z) {
    int code = 0;
    for (int step = 8; step; step >>= 1) code += z > threshold[code + step - 1] ? step : 0;
    return code;
}

// 1/a, or 0 where that would overflow: zero and subnormal maxima count as zero.
HOST_DEVICE float reciprocal_or_zero(float a) { return a >= FLT_MIN ? 1.0f / a : 0.0f; }

HOST_DEVICE bool is_finite(float x) { return fabsf(x) <= FLT_MAX; }

// ---- CPU ----------------------------------------------------------------------------------------------------------------------

template <class T> void quantize_blocks_cpu(const Nf4Tensor& q, Tensor w, float* absmax, int32_t* nonfinite) {
    const FlatMatrix<const T> matrix(w);
    const int64_t numel = q.numel(), blocks = q.blocks();
    uint8_t* codes = q.codes.as<uint8_t>();
    int64_t bad = 0;
#pragma omp parallel for reduction(+ : bad)
    for (int64_t b = 0; b < blocks; ++b) {
        float x[kNf4Block] = {};  // beyond the end: zeros
        int64_t begin = b * kNf4Block, count = std::min(kNf4Block, numel - begin);
        FlatCursor<const T> cursor(matrix, begin);
        float a = 0.0f;
        for (int64_t k = 0; k < count; ++k, ++cursor) {
            float value = to_float(*cursor);
            if (is_finite(value)) x[k] = value;
            else ++bad;
            a = std::max(a, std::fabs(x[k]));
        }
        float inverse = reciprocal_or_zero(a);
        absmax[b] = inverse > 0.0f ? a : 0.0f;
        for (int64_t k = 0; k < count; k += 2)
            codes[(begin + k) / 2] = uint8_t(nf4_code(kTables.threshold, x[k] * inverse) << 4 | nf4_code(kTables.threshold, x[k + 1] * inverse));
    }
    if (nonfinite) *nonfinite += int32_t(bad);
}

void nest_absmax_cpu(const Nf4Tensor& q, const float* absmax, double* partial) {
    const int64_t blocks = q.blocks(), chunks = ceil_div(blocks, kSumChunk);
#pragma omp parallel for
    for (int64_t c = 0; c < chunks; ++c) {
        double sum = 0;
        for (int64_t b = c * kSumChunk; b < std::min(blocks, (c + 1) * kSumChunk); ++b) sum += absmax[b];
        partial[c] = sum;
    }
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += partial[c];
    const float offset = float(sum / double(blocks));
    *q.offset.as<float>() = offset;

    uint8_t* codes8 = q.codes8.as<uint8_t>();
    float* scale2 = q.scale2.as<float>();
#pragma omp parallel for
    for (int64_t s = 0; s < ceil_div(blocks, kNestedBlock); ++s) {
        int64_t begin = s * kNestedBlock, end = std::min(blocks, begin + kNestedBlock);
        float a = 0.0f;
        for (int64_t b = begin; b < end; ++b) a = std::max(a, std::fabs(absmax[b] - offset));
        float inverse = reciprocal_or_zero(a);
        scale2[s] = inverse > 0.0f ? a : 0.0f;
        for (int64_t b = begin; b < end; ++b) codes8[b] = uint8_t(dynamic_code(kSignedMap, (absmax[b] - offset) * inverse));
    }
}

void quantize_cpu(const Nf4Tensor& q, Tensor w, float* absmax, double* partial, int32_t* nonfinite) {
    if (w.dtype == DType::bf16) quantize_blocks_cpu<bf16>(q, w, absmax, nonfinite);
    else quantize_blocks_cpu<float>(q, w, absmax, nonfinite);
    if (q.nested) nest_absmax_cpu(q, absmax, partial);
}

// The scale of one block. Two roundings, as bitsandbytes multiplies and adds in separate kernels; the volatile keeps the compiler
// from contracting them into one.
float block_scale_cpu(const Nf4Tensor& q, int64_t block) {
    if (!q.nested) return q.absmax.as<float>()[block];
    volatile float product = kSignedMap.value[q.codes8.as<uint8_t>()[block]] * q.scale2.as<float>()[block / kNestedBlock];
    return product + *q.offset.as<float>();
}

template <class T> void dequantize_cpu(Tensor w, const Nf4Tensor& q) {
    const FlatMatrix<T> matrix(w);
    const int64_t numel = q.numel(), blocks = q.blocks();
    const uint8_t* codes = q.codes.as<uint8_t>();
#pragma omp parallel for
    for (int64_t b = 0; b < blocks; ++b) {
        float scale = block_scale_cpu(q, b), value[16];
        for (int i = 0; i < 16; ++i) value[i] = kNf4Code[i] * scale;
        int64_t begin = b * kNf4Block, end = std::min(numel, begin + kNf4Block);
        FlatCursor<T> cursor(matrix, begin);
        for (int64_t e = begin; e < end; ++e, ++cursor) store(*cursor, value[(codes[e / 2] >> (e % 2 ? 0 : 4)) & 15]);
    }
}

// Partial sums over 8·kGroupsPerBlock elements, then their sum, so that the result does not depend on the number of threads.
template <class T> void residual_cpu(Tensor residual, Tensor w, const Nf4Tensor& q, double* sum, double* partial) {
    const FlatMatrix<const float> matrix(w);
    const int64_t numel = q.numel(), chunk = 8 * kGroupsPerBlock, chunks = ceil_div(numel, chunk);
    const uint8_t* codes = q.codes.as<uint8_t>();
#pragma omp parallel for
    for (int64_t c = 0; c < chunks; ++c) {
        const int64_t begin = c * chunk, end = std::min(numel, begin + chunk);
        FlatCursor<const float> in(matrix, begin);
        FlatCursor<T> out(FlatMatrix<T>(residual ? residual : w), begin);  // without a residual it is never written through
        double squares = 0;
        float scale = 0;
        for (int64_t e = begin; e < end; ++e, ++in, ++out) {
            if (e % kNf4Block == 0) scale = block_scale_cpu(q, e / kNf4Block);
            const float difference = *in - kNf4Code[(codes[e / 2] >> (e % 2 ? 0 : 4)) & 15] * scale;
            squares += double(difference) * double(difference);
            if (residual) store(*out, difference);
        }
        partial[c] = squares;
    }
    *sum = 0;
    for (int64_t c = 0; c < chunks; ++c) *sum += partial[c];
}

// ---- CUDA ---------------------------------------------------------------------------------------------------------------------
#ifdef WITH_CUDA

Tensor as_row(const Tensor& t) { return Tensor{t.data, t.dtype, 1, t.numel(), t.numel()}; }

constexpr int kThreads = 256;

__device__ const DynamicMap kDeviceSignedMap = kSignedMap;
__device__ const Nf4Tables kDeviceTables = kTables;

// One thread per 8 consecutive elements, so 8 lanes share a block of 64 and 8 codes are one 32-bit store.
template <class T>
__global__ void __launch_bounds__(kThreads) quantize_kernel(uint8_t* codes, float* absmax, FlatMatrix<const T> w, int32_t* nonfinite) {
    __shared__ float threshold[15];
    if (threadIdx.x < 15) threshold[threadIdx.x] = kDeviceTables.threshold[threadIdx.x];
    __syncthreads();

    const int64_t begin = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 8;
    const int count = int(min(int64_t(8), max(int64_t(0), w.numel - begin)));
    float x[8];
    load8(w, begin, count, x);
    float a = 0.0f;
    int bad = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        if (!is_finite(x[k])) x[k] = 0.0f, ++bad;
        a = fmaxf(a, fabsf(x[k]));
    }
    if (bad && nonfinite) atomicAdd(nonfinite, bad);
#pragma unroll
    for (int lane = 1; lane < 8; lane *= 2) a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, lane));
    const float inverse = reciprocal_or_zero(a);
    if (count == 0) return;
    if (threadIdx.x % 8 == 0) absmax[begin / kNf4Block] = inverse > 0.0f ? a : 0.0f;

    uint32_t packed = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) packed |= uint32_t(nf4_code(threshold, x[k] * inverse)) << (4 * (k ^ 1));  // even element: high nibble
    uint8_t* out = codes + begin / 2;
    if (count == 8 && (reinterpret_cast<uintptr_t>(out) & 3) == 0) {
        *reinterpret_cast<uint32_t*>(out) = packed;
    } else {
        for (int i = 0; i < (count + 1) / 2; ++i) out[i] = uint8_t(packed >> (8 * i));
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

void quantize_cuda(CudaContext& cuda, const Nf4Tensor& q, Tensor w, float* absmax, double* partial, int32_t* nonfinite) {
    const int64_t grid = ceil_div(q.numel(), 8 * kThreads), blocks = q.blocks();
    uint8_t* codes = q.codes.as<uint8_t>();
    if (w.dtype == DType::bf16)
        quantize_kernel<<<unsigned(grid), kThreads, 0, cuda.stream>>>(codes, absmax, FlatMatrix<const bf16>(w), nonfinite);
    else
        quantize_kernel<<<unsigned(grid), kThreads, 0, cuda.stream>>>(codes, absmax, FlatMatrix<const float>(w), nonfinite);
    LAUNCH_CHECK();
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
};

template <bool nested> __device__ float block_scale(const Nf4Source& q, int64_t block) {
    if (!nested) return q.absmax[block];
    return __fadd_rn(__fmul_rn(kDeviceSignedMap.value[q.codes8[block]], q.scale2[block / kNestedBlock]), *q.offset);
}

// Codes 8·word .. 8·word + 7, the first in the lowest nibble.
__device__ uint32_t load_codes8(const Nf4Source& q, int64_t word) {
    uint32_t bytes = 0;
    if (word * 4 + 4 <= q.code_bytes && (reinterpret_cast<uintptr_t>(q.codes) & 3) == 0) {
        bytes = reinterpret_cast<const uint32_t*>(q.codes)[word];
    } else {
        for (int i = 0; i < 4; ++i)
            if (word * 4 + i < q.code_bytes) bytes |= uint32_t(q.codes[word * 4 + i]) << (8 * i);
    }
    return (bytes & 0x0f0f0f0fu) << 4 | ((bytes >> 4) & 0x0f0f0f0fu);
}

// Work is dealt out by what is *written*: a thread handles 8 aligned columns of one row with 16-byte accesses and fetches the codes
// from wherever in the flat sequence they are, so rows of odd length cost two code words instead of one but no narrow accesses.
// Four such groups per thread, all loads first, keep enough bytes in flight.
constexpr int kGroupsPerThread = 4;
static_assert(kGroupsPerBlock == kThreads * kGroupsPerThread, "groups of a thread block");

struct GroupGrid {  // the 8-column groups of a matrix
    int64_t cols, ld;
    uint32_t count, per_row;
    unsigned blocks;  // thread blocks that cover them

    explicit GroupGrid(const Tensor& t) : cols(t.cols), ld(t.ld), per_row(uint32_t(ceil_div(t.cols, 8))) {
        const int64_t groups = t.rows * per_row;
        CHECK_INTERNAL(groups < (int64_t(1) << 32), "NF4 matrix of %lld elements", (long long)t.numel());
        count = uint32_t(groups), blocks = unsigned(ceil_div(groups, kGroupsPerBlock));
    }
};

// The quantized form of one group.
template <bool nested> struct CodeGroup {
    uint32_t row, codes;
    int64_t column;
    float scale, next_scale;
    int straddle, count = 0;  // elements before the next NF4 block; elements of the group

    __device__ void load(const GroupGrid& grid, const Nf4Source& q, int64_t group) {
        if (group >= grid.count) return;
        row = uint32_t(group) / grid.per_row;
        column = int64_t(uint32_t(group) - row * grid.per_row) * 8;
        count = int(min(int64_t(8), grid.cols - column));
        const int64_t first = row * grid.cols + column, word = first / 8, block = first / kNf4Block;
        const int shift = int(first % 8) * 4;
        codes = load_codes8(q, word);
        if (shift) codes = __funnelshift_r(codes, load_codes8(q, word + 1), shift);
        straddle = int(kNf4Block - first % kNf4Block);
        scale = block_scale<nested>(q, block);
        next_scale = straddle < count ? block_scale<nested>(q, block + 1) : 0.0f;
    }
    __device__ float value(const float* code_value, int k) const {
        return __fmul_rn(code_value[(codes >> (4 * k)) & 15], k < straddle ? scale : next_scale);
    }
    __device__ int64_t offset(int64_t ld) const { return row * ld + column; }
};

__device__ int64_t group_index(int u) { return (int64_t(blockIdx.x) * kGroupsPerThread + u) * kThreads + threadIdx.x; }

// Elements 0 .. count − 1 of pack to or from memory, all at once where that is possible.
template <class T> __device__ void store_group(T* out, const Pack8<T>& pack, int count, bool aligned) {
    if (count == 8 && aligned) return pack.store(out);
#pragma unroll
    for (int k = 0; k < 8; ++k)
        if (k < count) out[k] = pack.x[k];
}

template <class T> __device__ void load_group(Pack8<T>& pack, const T* in, int count, bool aligned) {
    if (count == 8 && aligned) return pack.load(in);
#pragma unroll
    for (int k = 0; k < 8; ++k)
        if (k < count) pack.x[k] = in[k];
}

__device__ void copy_code_values(float (&shared)[16]) {  // 16 different banks: no conflicts whatever the codes
    if (threadIdx.x < 16) shared[threadIdx.x] = kDeviceTables.code[threadIdx.x];
    __syncthreads();
}

template <class T, bool nested> __global__ void __launch_bounds__(kThreads) dequantize_kernel(T* w, GroupGrid grid, bool aligned, Nf4Source q) {
    __shared__ float code_value[16];
    copy_code_values(code_value);
    CodeGroup<nested> group[kGroupsPerThread];
#pragma unroll
    for (int u = 0; u < kGroupsPerThread; ++u) group[u].load(grid, q, group_index(u));
#pragma unroll
    for (int u = 0; u < kGroupsPerThread; ++u) {
        if (group[u].count == 0) continue;
        Pack8<T> pack;
#pragma unroll
        for (int k = 0; k < 8; ++k) store(pack.x[k], group[u].value(code_value, k));
        store_group(w + group[u].offset(grid.ld), pack, group[u].count, aligned);
    }
}

Nf4Source source_of(const Nf4Tensor& q) {
    Nf4Source source{};
    source.codes = q.codes.as<uint8_t>();
    source.code_bytes = (q.numel() + 1) / 2;
    if (q.nested) {
        source.codes8 = q.codes8.as<uint8_t>();
        source.scale2 = q.scale2.as<float>();
        source.offset = q.offset.as<float>();
    } else {
        source.absmax = q.absmax.as<float>();
    }
    return source;
}

template <class T> void dequantize_cuda(CudaContext& cuda, Tensor w, const Nf4Tensor& q) {
    if (w.contiguous()) w = as_row(w);
    const GroupGrid grid(w);
    auto kernel = q.nested ? dequantize_kernel<T, true> : dequantize_kernel<T, false>;
    kernel<<<grid.blocks, kThreads, 0, cuda.stream>>>(w.as<T>(), grid, aligned_rows(w), source_of(q));
    LAUNCH_CHECK();
}

// residual (unless null) = w − deq(q); partial[block] = Σ (w − deq(q))² over the groups of the block.
template <class T, bool nested>
__global__ void __launch_bounds__(kThreads)
    residual_kernel(T* residual, int64_t ld_residual, bool aligned_residual, double* partial, const float* w, GroupGrid grid, bool aligned, Nf4Source q) {
    __shared__ float code_value[16];
    copy_code_values(code_value);
    CodeGroup<nested> group[kGroupsPerThread];
    Pack8<float> x[kGroupsPerThread];
#pragma unroll
    for (int u = 0; u < kGroupsPerThread; ++u) {
        group[u].load(grid, q, group_index(u));
        if (group[u].count) load_group(x[u], w + group[u].offset(grid.ld), group[u].count, aligned);
    }
    double sum = 0;
#pragma unroll
    for (int u = 0; u < kGroupsPerThread; ++u) {
        if (group[u].count == 0) continue;
        Pack8<T> pack;
        float squares = 0;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const float difference = k < group[u].count ? x[u].x[k] - group[u].value(code_value, k) : 0.0f;
            squares = fmaf(difference, difference, squares);
            store(pack.x[k], difference);
        }
        sum += double(squares);
        if (residual) store_group(residual + group[u].offset(ld_residual), pack, group[u].count, aligned_residual);
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
    const GroupGrid grid(w);
    T* out = residual ? residual.as<T>() : nullptr;
    auto kernel = q.nested ? residual_kernel<T, true> : residual_kernel<T, false>;
    kernel<<<grid.blocks, kThreads, 0, cuda.stream>>>(out, residual.ld, aligned_rows(residual), partial, w.as<float>(), grid, aligned_rows(w), source_of(q));
    LAUNCH_CHECK();
    add_partials_kernel<<<1, kThreads, 0, cuda.stream>>>(sum, partial, grid.blocks);
    LAUNCH_CHECK();
}
#endif

void check_shapes(const Nf4Tensor& q, const Tensor& w) {
    CHECK_INTERNAL(w.rows == q.rows && w.cols == q.cols, "w is %lld × %lld, its NF4 form %lld × %lld", (long long)w.rows, (long long)w.cols,
                   (long long)q.rows, (long long)q.cols);
    CHECK_INTERNAL(w.dtype == DType::f32 || w.dtype == DType::bf16, "NF4 of %s", safetensors_name(w.dtype));
}

// The bytes of q and of w without its padding.
double traffic(const Nf4Tensor& q, const Tensor& w) { return double(q.numel()) * (double(size_of(w.dtype)) + (q.nested ? 0.515869 : 0.5625)); }

}  // namespace

float nf4_threshold(int i) { return kTables.threshold[i]; }

const float* dynamic_map_signed() { return kSignedMap.value; }
const float* dynamic_map_unsigned() { return kUnsignedMap.value; }

void nf4_quantize(Device& device, const Nf4Tensor& q, Tensor w, int32_t* nonfinite) {
    check_shapes(q, w);
    if (q.numel() == 0) return;
    ScratchScope scratch(device);
    float* absmax = nullptr;
    double* partial = nullptr;
    if (q.nested) {
        absmax = scratch.tensor("NF4 absmax", DType::f32, 1, q.blocks()).as<float>();
        partial = scratch.tensor("NF4 partial sums", DType::f64, 1, ceil_div(q.blocks(), kSumChunk)).as<double>();
    } else {
        absmax = q.absmax.as<float>();
    }
    OperationTimer timer(device, "nf4_quantize", 0, traffic(q, w));
    ON_DEVICE(device, quantize_cuda(device.cuda(), q, w, absmax, partial, nonfinite), quantize_cpu(q, w, absmax, partial, nonfinite));
}

void nf4_dequantize(Device& device, Tensor w, const Nf4Tensor& q) {
    check_shapes(q, w);
    if (q.numel() == 0) return;
    OperationTimer timer(device, "nf4_dequantize", 0, traffic(q, w));
    if (w.dtype == DType::bf16)
        ON_DEVICE(device, dequantize_cuda<bf16>(device.cuda(), w, q), dequantize_cpu<bf16>(w, q));
    else
        ON_DEVICE(device, dequantize_cuda<float>(device.cuda(), w, q), dequantize_cpu<float>(w, q));
}

void nf4_residual(Device& device, Tensor residual, Tensor w, const Nf4Tensor& q, double* sums, int64_t slot) {
    check_shapes(q, w);
    CHECK_INTERNAL(w.dtype == DType::f32, "the residual of %s", safetensors_name(w.dtype));
    if (residual) check_shapes(q, residual);
    ScratchScope scratch(device);
    // As many partial sums as a matrix with padded rows needs.
    double* partial = scratch.tensor("NF4 partial sums", DType::f64, 1, ceil_div(w.rows * ceil_div(w.cols, 8), kGroupsPerBlock) + 1).as<double>();
    OperationTimer timer(device, "nf4_residual", 0, traffic(q, w) + (residual ? double(q.numel() * size_of(residual.dtype)) : 0.0));
    if (residual && residual.dtype == DType::bf16)
        ON_DEVICE(device, residual_cuda<bf16>(device.cuda(), residual, w, q, sums + slot, partial), residual_cpu<bf16>(residual, w, q, sums + slot, partial));
    else
        ON_DEVICE(device, residual_cuda<float>(device.cuda(), residual, w, q, sums + slot, partial), residual_cpu<float>(residual, w, q, sums + slot, partial));
}

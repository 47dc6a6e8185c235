// NF4 quantization and dequantization: plain loops, and what is public. See nf4.h.
#include "nf4.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "dynamic_map.h"
#include "flat_matrix.h"
#include "nf4_tables.h"
#include "runtime/profile.h"
#ifdef WITH_CUDA
#include "nf4_kernels.cuh"
#endif

namespace {

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
            codes[(begin + k) / 2] = uint8_t(nf4_code(kCells, x[k] * inverse) << 4 | nf4_code(kCells, x[k + 1] * inverse));
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
    if (q.numel() == 0) return device.zero(sums + slot, sizeof(double));
    ScratchScope scratch(device);
    // As many partial sums as a matrix with padded rows needs.
    double* partial = scratch.tensor("NF4 partial sums", DType::f64, 1, ceil_div(w.rows * ceil_div(w.cols, 8), kGroupsPerBlock) + 1).as<double>();
    OperationTimer timer(device, "nf4_residual", 0, traffic(q, w) + (residual ? double(q.numel() * size_of(residual.dtype)) : 0.0));
    if (residual && residual.dtype == DType::bf16)
        ON_DEVICE(device, residual_cuda<bf16>(device.cuda(), residual, w, q, sums + slot, partial), residual_cpu<bf16>(residual, w, q, sums + slot, partial));
    else
        ON_DEVICE(device, residual_cuda<float>(device.cuda(), residual, w, q, sums + slot, partial), residual_cpu<float>(residual, w, q, sums + slot, partial));
}

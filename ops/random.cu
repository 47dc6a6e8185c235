// Random tensors. See random.h.
#include "ops/random.h"

#include "flat_matrix.h"
#include "runtime/cuda_context.h"
#include "runtime/philox.h"
#include "runtime/profile.h"

namespace {

// Numbers come in pairs, and a pair is the unit of work: pair k covers the elements 2k − odd and 2k − odd + 1, odd = begin % 2.

// The numbers of pair k, of which those within 0 … numel − 1 are stored.
HOST_DEVICE void fill_pair(const FlatMatrix<float>& x, int64_t k, float deviation, uint64_t seed, uint32_t stream, uint64_t begin) {
    float first, second;
    normal_pair(seed, stream, (begin >> 1) + uint64_t(k), first, second);
    const int64_t element = 2 * k - int64_t(begin & 1);
    if (element >= 0) *FlatCursor<float>(x, element) = deviation * first;
    if (element + 1 < x.numel) *FlatCursor<float>(x, element + 1) = deviation * second;
}

int64_t pairs_of(int64_t numel, uint64_t begin) { return ceil_div(numel + int64_t(begin & 1), 2); }

void fill_normal_cpu(FlatMatrix<float> x, float deviation, uint64_t seed, uint32_t stream, uint64_t begin) {
    const int64_t pairs = pairs_of(x.numel, begin);
#pragma omp parallel for
    for (int64_t k = 0; k < pairs; ++k) fill_pair(x, k, deviation, seed, stream, begin);
}

// Element i is word i % 4 of Philox block i / 4: 24 bits, in (−bound, bound].
HOST_DEVICE void fill_uniform_group(const FlatMatrix<float>& x, int64_t group, float bound, uint64_t seed, uint32_t stream) {
    const Philox4 words = philox4x32(uint32_t(group), uint32_t(uint64_t(group) >> 32), stream, 0x554e4946u /* "UNIF" */, uint32_t(seed), uint32_t(seed >> 32));
    for (int k = 0; k < 4; ++k)
        if (4 * group + k < x.numel) *FlatCursor<float>(x, 4 * group + k) = bound * (2.0f * uniform01(words.x[k]) - 1.0f);
}

void fill_uniform_cpu(FlatMatrix<float> x, float bound, uint64_t seed, uint32_t stream) {
#pragma omp parallel for
    for (int64_t group = 0; group < ceil_div(x.numel, 4); ++group) fill_uniform_group(x, group, bound, seed, stream);
}

void fill_cpu(FlatMatrix<float> x, float value) {
#pragma omp parallel for
    for (int64_t i = 0; i < x.numel; ++i) *FlatCursor<float>(x, i) = value;
}

#ifdef WITH_CUDA
constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    fill_normal_kernel(FlatMatrix<float> x, int64_t pairs, float deviation, uint64_t seed, uint32_t stream, uint64_t begin) {
    const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (k < pairs) fill_pair(x, k, deviation, seed, stream, begin);
}

void fill_normal_cuda(CudaContext& cuda, FlatMatrix<float> x, float deviation, uint64_t seed, uint32_t stream, uint64_t begin) {
    const int64_t pairs = pairs_of(x.numel, begin);
    fill_normal_kernel<<<unsigned(ceil_div(pairs, kThreads)), kThreads, 0, cuda.stream>>>(x, pairs, deviation, seed, stream, begin);
    LAUNCH_CHECK();
}

__global__ void __launch_bounds__(kThreads) fill_uniform_kernel(FlatMatrix<float> x, float bound, uint64_t seed, uint32_t stream) {
    const int64_t group = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (4 * group < x.numel) fill_uniform_group(x, group, bound, seed, stream);
}

void fill_uniform_cuda(CudaContext& cuda, FlatMatrix<float> x, float bound, uint64_t seed, uint32_t stream) {
    fill_uniform_kernel<<<unsigned(ceil_div(x.numel, 4 * kThreads)), kThreads, 0, cuda.stream>>>(x, bound, seed, stream);
    LAUNCH_CHECK();
}

__global__ void __launch_bounds__(kThreads) fill_kernel(FlatMatrix<float> x, float value) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i < x.numel) *FlatCursor<float>(x, i) = value;
}

void fill_cuda(CudaContext& cuda, FlatMatrix<float> x, float value) {
    fill_kernel<<<unsigned(ceil_div(x.numel, kThreads)), kThreads, 0, cuda.stream>>>(x, value);
    LAUNCH_CHECK();
}
#endif

}  // namespace

void fill_normal(Device& device, Tensor x, float deviation, uint64_t seed, uint32_t stream, uint64_t begin) {
    if (x.numel() == 0) return;
    FlatMatrix<float> matrix(x);
    OperationTimer timer(device, "fill_normal", 0, double(x.numel() * size_of(x.dtype)));
    ON_DEVICE(device, fill_normal_cuda(device.cuda(), matrix, deviation, seed, stream, begin), fill_normal_cpu(matrix, deviation, seed, stream, begin));
}

void fill_uniform(Device& device, Tensor x, float bound, uint64_t seed, uint32_t stream) {
    if (x.numel() == 0) return;
    FlatMatrix<float> matrix(x);
    OperationTimer timer(device, "fill_uniform", 0, double(x.numel() * size_of(x.dtype)));
    ON_DEVICE(device, fill_uniform_cuda(device.cuda(), matrix, bound, seed, stream), fill_uniform_cpu(matrix, bound, seed, stream));
}

void fill(Device& device, Tensor x, float value) {
    if (x.numel() == 0) return;
    FlatMatrix<float> matrix(x);
    OperationTimer timer(device, "fill", 0, double(x.numel() * size_of(x.dtype)));
    ON_DEVICE(device, fill_cuda(device.cuda(), matrix, value), fill_cpu(matrix, value));
}

// Checksums of memory; see checksum.h.
#include "ops/checksum.h"

#include <algorithm>
#include <cstring>

#include "ops/row_kernels.h"
#include "runtime/philox.h"
#include "runtime/profile.h"

namespace {

// Word i contributes mix(i·γ + word); the contributions are added modulo 2⁶⁴, in any order. mix is SplitMix64's (Steele, Lea & Flood 2014): one to
// one, so two different words in one place never contribute the same.
constexpr uint64_t kGamma = 0x9e3779b97f4a7c15u;

HOST_DEVICE uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

HOST_DEVICE uint64_t word_sum(uint32_t word, int64_t i) { return mix(uint64_t(i) * kGamma + word); }

// The length counts too: zeros at the end make a difference.
uint64_t length_sum(int64_t bytes) { return mix(~uint64_t(bytes)); }

// The last word is filled up with zeros.
HOST_DEVICE uint32_t load_word(const unsigned char* data, int64_t bytes, int64_t i) {
    const int64_t begin = 4 * i, end = bytes < begin + 4 ? bytes : begin + 4;
    uint32_t word = 0;
    for (int64_t k = begin; k < end; ++k) word |= uint32_t(data[k]) << (8 * (k - begin));
    return word;
}

void checksum_cpu(uint64_t* sum, const void* data, int64_t bytes) {
    const auto* words = static_cast<const uint32_t*>(data);
    uint64_t total = length_sum(bytes);
#pragma omp parallel for reduction(+ : total)
    for (int64_t i = 0; i < bytes / 4; ++i) total += word_sum(words[i], i);
    if (bytes % 4) total += word_sum(load_word(static_cast<const unsigned char*>(data), bytes, bytes / 4), bytes / 4);
    *sum = total;
}

#ifdef WITH_CUDA
constexpr int kThreads = 256, kBlocksPerMultiprocessor = 8, kUnroll = 4;

// Words first .. first + 4·groups − 1 lie in whole groups of four on 16-byte boundaries; at most three before them and three and a part after.
__global__ void __launch_bounds__(kThreads) checksum_kernel(unsigned long long* sum, const unsigned char* data, int64_t bytes, int first, int64_t groups, uint64_t of_length) {
    const uint4* quads = reinterpret_cast<const uint4*>(data + 4 * first);
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    uint64_t total = 0;
    const auto add = [&](uint4 quad, int64_t group) {
        const int64_t i = first + 4 * group;
        total += word_sum(quad.x, i) + word_sum(quad.y, i + 1) + word_sum(quad.z, i + 2) + word_sum(quad.w, i + 3);
    };
    int64_t group = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    for (; group + (kUnroll - 1) * stride < groups; group += kUnroll * stride) {
        uint4 quad[kUnroll];
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) quad[k] = quads[group + k * stride];
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) add(quad[k], group + k * stride);
    }
    for (; group < groups; group += stride) add(quads[group], group);

    if (blockIdx.x == 0) {
        const int64_t words = (bytes + 3) / 4, after = first + 4 * groups;
        const int64_t i = threadIdx.x < first ? threadIdx.x : after + threadIdx.x - first;
        if (i < words) total += word_sum(load_word(data, bytes, i), i);
        if (threadIdx.x == 0) total += of_length;
    }
    __shared__ uint64_t of_warp[kThreads / kWarp];
    total = warp_sum(total);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < kThreads / kWarp; ++w) total += of_warp[w];
        atomicAdd(sum, static_cast<unsigned long long>(total));  // of integers: the same in any order
    }
}

void checksum_cuda(CudaContext& cuda, uint64_t* sum, const void* data, int64_t bytes) {
    const int64_t words = bytes / 4, before = int64_t(16 - reinterpret_cast<uintptr_t>(data) % 16) / 4 % 4;
    const int64_t first = std::min(before, words), groups = (words - first) / 4;
    const int64_t most = int64_t(cuda.properties.multiProcessorCount) * kBlocksPerMultiprocessor;
    const int64_t blocks = std::clamp<int64_t>(ceil_div(groups, kThreads * kUnroll), 1, most);
    CUDA_CHECK(cudaMemsetAsync(sum, 0, sizeof *sum, cuda.stream));
    checksum_kernel<<<unsigned(blocks), kThreads, 0, cuda.stream>>>(reinterpret_cast<unsigned long long*>(sum), static_cast<const unsigned char*>(data), bytes,
                                                                   int(first), groups, length_sum(bytes));
    LAUNCH_CHECK();
}
#endif

}  // namespace

void checksum(Device& device, uint64_t* sums, int64_t slot, const void* data, int64_t bytes) {
    CHECK_INTERNAL(bytes >= 0 && reinterpret_cast<uintptr_t>(data) % 4 == 0, "%lld bytes at %p", (long long)bytes, data);
    OperationTimer timer(device, "checksum", 0, double(bytes));
    ON_DEVICE(device, checksum_cuda(device.cuda(), sums + slot, data, bytes), checksum_cpu(sums + slot, data, bytes));
}

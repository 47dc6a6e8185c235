// Softmax cross-entropy; see cross_entropy.h.
#include "ops/cross_entropy.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "ops/fast_exp.h"
#include "ops/row_kernels.h"
#include "runtime/profile.h"

namespace {

void cross_entropy_cpu(Tensor losses, Tensor logits, const int32_t* targets, float scale, bool backward) {
    const int64_t vocab = logits.cols;
#pragma omp parallel for
    for (int64_t t = 0; t < logits.rows; ++t) {
        float* z = logits.as<float>() + t * logits.ld;
        const int32_t target = targets[t];
        if (target < 0) {
            losses.as<float>()[t] = 0;
            if (backward) std::memset(z, 0, vocab * sizeof(float));
            continue;
        }
        float maximum = -FLT_MAX;
#pragma omp simd reduction(max : maximum)
        for (int64_t c = 0; c < vocab; ++c) maximum = z[c] > maximum ? z[c] : maximum;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < vocab; ++c) sum += double(fast_exp(z[c] - maximum));
        losses.as<float>()[t] = float(std::log(sum) + (double(maximum) - double(z[target])));
        if (!backward) continue;
        const float factor = float(scale / sum);
#pragma omp simd
        for (int64_t c = 0; c < vocab; ++c) z[c] = fast_exp(z[c] - maximum) * factor;
        z[target] -= scale;
    }
}

#ifdef WITH_CUDA
constexpr int kMaxThreads = 1024;
constexpr int kRowThreads = 256;  // of a block whose row stays in registers: three rows of 64 KB per multiprocessor

// Blocks take the rows from the last to the first: a GEMM has just written the logits in order, so the last ones are still in L2, and
// the GEMMs that read the gradient begin with the first ones, which are then the most recent.
__device__ __forceinline__ int64_t block_row() { return gridDim.x - 1 - blockIdx.x; }

__device__ __forceinline__ float warp_maximum(float x) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

// The maximum of the block, in every thread. Skips NaN, which then enters through the sum.
__device__ float block_maximum(float x) {
    __shared__ float of_warp[kMaxThreads / kWarp];
    x = warp_maximum(x);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
    __syncthreads();
    return warp_maximum(of_warp[threadIdx.x % kWarp % (blockDim.x / kWarp)]);
}

// The sum over the block, the same bits in every thread.
__device__ float block_sum(float x) {
    __shared__ float of_warp[kMaxThreads / kWarp];
    x = warp_sum(x);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
    __syncthreads();
    const unsigned lane = threadIdx.x % kWarp;
    return warp_sum(lane < blockDim.x / kWarp ? of_warp[lane] : 0.0f);
}

__device__ __forceinline__ uint32_t max_bf16x2(uint32_t a, uint32_t b) {
    uint32_t maximum;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(maximum) : "r"(a), "r"(b));
    return maximum;
}

// The compiler would keep the unpacked values from one pass to the next, for which there are not enough registers.
template <int kGroups> __device__ __forceinline__ void forget_unpacked(uint4 (&raw)[kGroups]) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) asm volatile("" : "+r"(raw[i].x), "+r"(raw[i].y), "+r"(raw[i].z), "+r"(raw[i].w));
}

// One block per row, which stays packed in registers: read once, written once. A thread owns groups tid, tid + threads, … (of eight).
template <int kGroups>
__global__ void __launch_bounds__(kRowThreads, 3)
    cross_entropy_kernel(float* losses, bf16* logits, int64_t ld, int vocab, const int32_t* targets, float scale, bool backward) {
    const int64_t t = block_row();
    const int target = targets[t], groups = vocab / kVector, stride = blockDim.x;
    uint4* row = reinterpret_cast<uint4*>(logits + t * ld);
    if (target < 0) {
        if (threadIdx.x == 0) losses[t] = 0;
        for (int g = threadIdx.x; backward && g < groups; g += stride) row[g] = make_uint4(0, 0, 0, 0);
        return;
    }
    const uint32_t lowest = 0xff7fff7fu, minus_inf = 0xff80ff80u;  // twice −3.39e38, the lowest finite maximum: −inf − −inf cannot arise
    uint4 raw[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
        const int g = i * stride + threadIdx.x;
        raw[i] = g < groups ? row[g] : make_uint4(minus_inf, minus_inf, minus_inf, minus_inf);
    }
    const float target_logit = to_float(logits[t * ld + target]);  // read before the barriers, behind which it is overwritten
    uint32_t pair = lowest;
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
        pair = max_bf16x2(pair, max_bf16x2(max_bf16x2(raw[i].x, raw[i].y), max_bf16x2(raw[i].z, raw[i].w)));
    const float maximum = block_maximum(fmaxf(float_of_bits(pair << 16), float_of_bits(pair & 0xffff0000u)));

    forget_unpacked(raw);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
        float p[kVector];
        unpack_bf16x8(raw[i], p);
#pragma unroll
        for (int k = 0; k < kVector; ++k) p[k] = __expf(p[k] - maximum);
        sum += ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]));
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) losses[t] = logf(sum) + (maximum - target_logit);
    if (!backward) return;

    forget_unpacked(raw);
    const float factor = scale / sum;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
        const int g = i * stride + threadIdx.x, in_group = target - g * kVector;
        if (g >= groups) break;
        float p[kVector];
        unpack_bf16x8(raw[i], p);
#pragma unroll
        for (int k = 0; k < kVector; ++k) p[k] = __expf(p[k] - maximum) * factor;
        if (unsigned(in_group) < unsigned(kVector)) {
#pragma unroll
            for (int k = 0; k < kVector; ++k) p[k] -= k == in_group ? scale : 0.0f;
        }
        store_n(reinterpret_cast<bf16*>(row + g), p);
    }
}

// Maximum and Σ exp(z − maximum) of some logits.
struct SoftmaxSum {
    float maximum, sum;
};

template <int N> __device__ __forceinline__ void add_logits(SoftmaxSum& s, const float (&z)[N]) {
    float maximum = s.maximum;
#pragma unroll
    for (int k = 0; k < N; ++k) maximum = fmaxf(maximum, z[k]);
    float sum = s.sum * __expf(s.maximum - maximum);
#pragma unroll
    for (int k = 0; k < N; ++k) sum += __expf(z[k] - maximum);
    s.maximum = maximum, s.sum = sum;
}

// For rows that are too long for registers or unaligned: one block per row, read twice. With an odd vocabulary most rows start off a
// 16-byte boundary: the groups of eight in [body_begin, body_end) are aligned, the up to 14 logits around them (edges) go one per thread.
__global__ void __launch_bounds__(kMaxThreads)
    cross_entropy_any_kernel(float* losses, bf16* logits, int64_t ld, int vocab, const int32_t* targets, float scale, bool backward) {
    const int64_t t = block_row();
    const int tid = threadIdx.x, threads = blockDim.x, target = targets[t];
    bf16* z = logits + t * ld;

    const int head = int((16 - reinterpret_cast<uintptr_t>(z) % 16) % 16 / sizeof(bf16));
    const int body_begin = head < vocab ? head : vocab;
    const int body_end = body_begin + (vocab - body_begin) / kVector * kVector;
    const int edges = vocab - (body_end - body_begin);
    const int edge = tid < body_begin ? tid : tid - body_begin + body_end;  // this thread's, if tid < edges

    if (target < 0) {
        if (tid == 0) losses[t] = 0;
        if (!backward) return;
        const float zeros[kVector] = {};
        for (int c = body_begin + tid * kVector; c < body_end; c += threads * kVector) store_n(z + c, zeros);
        if (tid < edges) store(z[edge], 0.0f);
        return;
    }

    SoftmaxSum s{-FLT_MAX, 0};  // the lowest finite maximum, so that −inf − −inf cannot arise
#pragma unroll 2
    for (int c = body_begin + tid * kVector; c < body_end; c += threads * kVector) {
        float x[kVector];
        load_n(z + c, x);
        add_logits(s, x);
    }
    if (tid < edges) {
        const float x[1] = {to_float(z[edge])};
        add_logits(s, x);
    }
    const float target_logit = to_float(z[target]);  // before anything is overwritten
    const float maximum = block_maximum(s.maximum);
    const float sum = block_sum(s.sum * __expf(s.maximum - maximum));
    if (tid == 0) losses[t] = logf(sum) + (maximum - target_logit);
    if (!backward) return;

    const float factor = scale / sum;
#pragma unroll 2
    for (int c = body_begin + tid * kVector; c < body_end; c += threads * kVector) {
        float x[kVector];
        load_n(z + c, x);
#pragma unroll
        for (int k = 0; k < kVector; ++k) x[k] = __expf(x[k] - maximum) * factor - (c + k == target ? scale : 0.0f);
        store_n(z + c, x);
    }
    if (tid < edges) store(z[edge], __expf(to_float(z[edge]) - maximum) * factor - (edge == target ? scale : 0.0f));
}

void cross_entropy_cuda(CudaContext& cuda, Tensor losses, Tensor logits, const int32_t* targets, float scale, bool backward) {
    if (logits.rows == 0) return;
    const int64_t groups = ceil_div(logits.cols, kVector), per_thread = ceil_div(groups, kRowThreads);
    auto launch = [&](auto kernel, int most) {
        const int64_t threads = std::min<int64_t>(round_up(groups, kWarp), most);
        kernel<<<unsigned(logits.rows), unsigned(threads), 0, cuda.stream>>>(losses.as<float>(), logits.as<bf16>(), logits.ld, int(logits.cols), targets, scale,
                                                                   backward);
        LAUNCH_CHECK();
    };
    // The wider blocks of the other kernel keep fewer rows under way: what is read twice should come from L2 the second time.
    if (!aligned_rows(logits) || logits.cols % kVector != 0 || per_thread > 16) launch(cross_entropy_any_kernel, kMaxThreads);
    else if (per_thread <= 2) launch(cross_entropy_kernel<2>, kRowThreads);
    else if (per_thread <= 4) launch(cross_entropy_kernel<4>, kRowThreads);
    else if (per_thread <= 8) launch(cross_entropy_kernel<8>, kRowThreads);
    else launch(cross_entropy_kernel<16>, kRowThreads);
}
#endif

}  // namespace

void cross_entropy(Device& device, Tensor losses, Tensor logits, const int32_t* targets, float scale, bool backward) {
    CHECK_INTERNAL(losses.cols == logits.rows && logits.dtype == device.activation_dtype(), "losses %lld, logits %lld × %lld of %s",
                   (long long)losses.cols, (long long)logits.rows, (long long)logits.cols, safetensors_name(logits.dtype));
    OperationTimer timer(device, "cross_entropy", 0, double(logits.numel()) * size_of(logits.dtype) * (1 + backward));
    ON_DEVICE(device, cross_entropy_cuda(device.cuda(), losses, logits, targets, scale, backward),
              cross_entropy_cpu(losses, logits, targets, scale, backward));
}

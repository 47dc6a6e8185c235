// Softmax cross-entropy; see cross_entropy.h.
#include "ops/cross_entropy.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "ops/fast_exp.h"
#include "ops/row_kernels.h"

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
constexpr int kMaxThreads = 512;

// Running log-sum-exp: maximum and Σ exp(z − maximum).
struct SoftmaxSum {
    float maximum, sum;
};

template <int N> __device__ __forceinline__ void add_logits(SoftmaxSum& s, const float (&z)[N]) {
    float maximum = s.maximum;
#pragma unroll
    for (int k = 0; k < N; ++k) maximum = fmaxf(maximum, z[k]);  // skips NaN, which then enters through the sum
    float sum = s.sum * __expf(s.maximum - maximum);
#pragma unroll
    for (int k = 0; k < N; ++k) sum += __expf(z[k] - maximum);
    s.maximum = maximum, s.sum = sum;
}

__device__ __forceinline__ SoftmaxSum merge(SoftmaxSum a, SoftmaxSum b) {
    float maximum = fmaxf(a.maximum, b.maximum);
    return {maximum, a.sum * __expf(a.maximum - maximum) + b.sum * __expf(b.maximum - maximum)};
}

// One block per row. With an odd vocabulary most rows start off a 16-byte boundary: the groups of eight in [body_begin, body_end) are
// aligned, the up to 14 logits around them (edges) go one per thread.
__global__ void __launch_bounds__(kMaxThreads)
    cross_entropy_kernel(float* losses, bf16* logits, int64_t ld, int vocab, const int32_t* targets, float scale, bool backward) {
    __shared__ SoftmaxSum warp_sums[kMaxThreads / kWarp];
    const int64_t t = blockIdx.x;
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
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
        s = merge(s, {__shfl_xor_sync(0xffffffffu, s.maximum, offset), __shfl_xor_sync(0xffffffffu, s.sum, offset)});
    if (tid % kWarp == 0) warp_sums[tid / kWarp] = s;
    __syncthreads();
    s = warp_sums[0];
    for (int w = 1; w < threads / kWarp; ++w) s = merge(s, warp_sums[w]);
    if (tid == 0) losses[t] = logf(s.sum) + (s.maximum - target_logit);
    if (!backward) return;

    const float factor = scale / s.sum;
#pragma unroll 2
    for (int c = body_begin + tid * kVector; c < body_end; c += threads * kVector) {
        float x[kVector];
        load_n(z + c, x);
#pragma unroll
        for (int k = 0; k < kVector; ++k) x[k] = __expf(x[k] - s.maximum) * factor - (c + k == target ? scale : 0.0f);
        store_n(z + c, x);
    }
    if (tid < edges) store(z[edge], __expf(to_float(z[edge]) - s.maximum) * factor - (edge == target ? scale : 0.0f));
}

void cross_entropy_cuda(CudaContext& cuda, Tensor losses, Tensor logits, const int32_t* targets, float scale, bool backward) {
    if (logits.rows == 0) return;
    const unsigned threads = unsigned(std::min<int64_t>(round_up(ceil_div(logits.cols, kVector), kWarp), kMaxThreads));
    cross_entropy_kernel<<<unsigned(logits.rows), threads, 0, cuda.stream>>>(losses.as<float>(), logits.as<bf16>(), logits.ld, int(logits.cols),
                                                                             targets, scale, backward);
    LAUNCH_CHECK();
}
#endif

}  // namespace

void cross_entropy(Device& device, Tensor losses, Tensor logits, const int32_t* targets, float scale, bool backward) {
    CHECK_INTERNAL(losses.cols == logits.rows && logits.dtype == device.activation_dtype(), "losses %lld, logits %lld × %lld of %s",
                   (long long)losses.cols, (long long)logits.rows, (long long)logits.cols, safetensors_name(logits.dtype));
    ON_DEVICE(device, cross_entropy_cuda(device.cuda(), losses, logits, targets, scale, backward),
              cross_entropy_cpu(losses, logits, targets, scale, backward));
}

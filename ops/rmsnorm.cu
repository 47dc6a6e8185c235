// RMSNorm; see rmsnorm.h.
#include "ops/rmsnorm.h"

#include <algorithm>
#include <cmath>

#include "ops/row_kernels.h"
#include "runtime/profile.h"

namespace {

// dw is summed in two stages: worker b sums rows b, b + workers, …; then the workers' sums are added in order. The number of
// workers depends on the shape only, so results do not depend on the GPU or the thread count.
// cuda: blocks of one thread per eight columns, about 1024 threads for each of 132 multiprocessors (H100, H200).
int64_t worker_count(bool cuda, int64_t rows, int64_t cols) {
    int64_t workers = cuda ? 132 * std::min<int64_t>(std::max<int64_t>(8192 / cols, 1), 16) : 32;
    return std::min(workers, rows);
}

void forward_cpu(Tensor y, Tensor rstd, Tensor x, Tensor w, float eps) {
    const int64_t h = x.cols;
#pragma omp parallel for
    for (int64_t t = 0; t < x.rows; ++t) {
        const float *in = x.as<float>() + t * x.ld, *weight = w.as<float>();
        float* out = y.as<float>() + t * y.ld;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < h; ++c) sum += in[c] * in[c];
        const float rho = 1.0f / std::sqrt(sum / float(h) + eps);
        rstd.as<float>()[t] = rho;
#pragma omp simd
        for (int64_t c = 0; c < h; ++c) out[c] = weight[c] * (in[c] * rho);
    }
}

// Element c of a row reads dy before it writes normed, so the two may be one.
void backward_cpu(Tensor dx, Tensor dw, Tensor dy, Tensor x, Tensor w, Tensor rstd, Tensor normed, bool accumulate, Tensor partial) {
    const int64_t h = x.cols, workers = partial.rows;
#pragma omp parallel for
    for (int64_t b = 0; b < workers; ++b) {
        float* dw_part = partial.as<float>() + b * h;
        std::fill(dw_part, dw_part + h, 0.0f);
        for (int64_t t = b; t < x.rows; t += workers) {
            const float *in = x.as<float>() + t * x.ld, *grad = dy.as<float>() + t * dy.ld, *weight = w.as<float>();
            float* out = dx.as<float>() + t * dx.ld;
            const float rho = rstd.as<float>()[t];
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t c = 0; c < h; ++c) dot += weight[c] * grad[c] * (in[c] * rho);
            const float mean = dot / float(h);
            if (!accumulate) std::fill(out, out + h, 0.0f);
#pragma omp simd
            for (int64_t c = 0; c < h; ++c) {
                float normalized = in[c] * rho;
                out[c] += rho * (weight[c] * grad[c] - normalized * mean);
                dw_part[c] += grad[c] * normalized;
            }
            if (!normed) continue;
            float* y = normed.as<float>() + t * normed.ld;
#pragma omp simd
            for (int64_t c = 0; c < h; ++c) y[c] = weight[c] * (in[c] * rho);
        }
    }
    for (int64_t b = 0; b < workers; ++b) {
        const float* dw_part = partial.as<float>() + b * h;
        float* out = dw.as<float>();
#pragma omp simd
        for (int64_t c = 0; c < h; ++c) out[c] += dw_part[c];
    }
}

#ifdef WITH_CUDA
constexpr int kForwardWarps = 4;

// One warp per row, the row held in registers as kGroups 16-byte groups per lane.
template <int kGroups>
__global__ void __launch_bounds__(kForwardWarps* kWarp)
    forward_kernel(bf16* y, int64_t ld_y, float* rstd, const bf16* x, int64_t ld_x, const float* w, float eps, int64_t rows, int cols) {
    const int64_t t = int64_t(blockIdx.x) * kForwardWarps + threadIdx.x / kWarp;
    if (t >= rows) return;
    const int lane = threadIdx.x % kWarp;
    x += t * ld_x, y += t * ld_y;
    uint4 raw[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
        int c = (i * kWarp + lane) * kVector;
        raw[i] = c < cols ? *reinterpret_cast<const uint4*>(x + c) : make_uint4(0, 0, 0, 0);
    }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
        float v[kVector];
        unpack_bf16x8(raw[i], v);
#pragma unroll
        for (int k = 0; k < kVector; ++k) sum += v[k] * v[k];
    }
    const float rho = 1.0f / sqrtf(warp_sum(sum) / float(cols) + eps);
    if (lane == 0) rstd[t] = rho;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
        int c = (i * kWarp + lane) * kVector;
        if (c < cols) {
            float v[kVector], weight[kVector];
            unpack_bf16x8(raw[i], v);
            load_n(w + c, weight);
#pragma unroll
            for (int k = 0; k < kVector; ++k) v[k] = weight[k] * (v[k] * rho);
            store_n(y + c, v);
        }
    }
}

// One warp per row, the row read twice: for rows that are unaligned or too long for registers.
__global__ void __launch_bounds__(kForwardWarps* kWarp)
    forward_any_kernel(bf16* y, int64_t ld_y, float* rstd, const bf16* x, int64_t ld_x, const float* w, float eps, int64_t rows, int cols) {
    const int64_t t = int64_t(blockIdx.x) * kForwardWarps + threadIdx.x / kWarp;
    if (t >= rows) return;
    const int lane = threadIdx.x % kWarp;
    x += t * ld_x, y += t * ld_y;
    float sum = 0;
    for (int c = lane; c < cols; c += kWarp) sum += to_float(x[c]) * to_float(x[c]);
    const float rho = 1.0f / sqrtf(warp_sum(sum) / float(cols) + eps);
    if (lane == 0) rstd[t] = rho;
    for (int c = lane; c < cols; c += kWarp) store(y[c], w[c] * (to_float(x[c]) * rho));
}

void forward_cuda(CudaContext& cuda, Tensor y, Tensor rstd, Tensor x, Tensor w, float eps) {
    if (x.rows == 0) return;
    const unsigned blocks = unsigned(ceil_div(x.rows, kForwardWarps)), threads = kForwardWarps * kWarp;
    auto launch = [&](auto kernel) {
        kernel<<<blocks, threads, 0, cuda.stream>>>(y.as<bf16>(), y.ld, rstd.as<float>(), x.as<bf16>(), x.ld, w.as<float>(), eps, x.rows, int(x.cols));
    };
    const bool aligned = aligned_rows(x) && aligned_rows(y) && aligned_rows(w) && x.cols % kVector == 0;
    const int64_t groups = ceil_div(x.cols, kWarp * kVector);  // per lane
    if (!aligned || groups > 24) launch(forward_any_kernel);
    else if (groups <= 2) launch(forward_kernel<2>);
    else if (groups <= 4) launch(forward_kernel<4>);
    else if (groups <= 8) launch(forward_kernel<8>);
    else if (groups <= 16) launch(forward_kernel<16>);
    else launch(forward_kernel<24>);
    LAUNCH_CHECK();
}

constexpr int kMaxThreads = 1024;

// The sum over the block, the same bits in every thread. Calls must alternate between two buffers: one barrier is then enough.
__device__ __forceinline__ float block_sum(float x, float (&of_warp)[kMaxThreads / kWarp]) {
    x = warp_sum(x);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
    __syncthreads();
    float total = 0;
    for (int w = 0; w < int(blockDim.x) / kWarp; ++w) total += of_warp[w];
    return total;
}

// One block (worker) goes through its rows; a thread owns the same eight columns in all of them.
__global__ void __launch_bounds__(kMaxThreads)
    backward_kernel(bf16* dx, int64_t ld_dx, float* partial, const bf16* dy, int64_t ld_dy, const bf16* x, int64_t ld_x, const float* w,
                    const float* rstd, bf16* normed, int64_t ld_normed, bool accumulate, int64_t rows, int cols) {
    __shared__ float of_warp[2][kMaxThreads / kWarp];
    const int c = threadIdx.x * kVector;
    const bool inside = c < cols;
    float weight[kVector] = {}, dw[kVector] = {};
    if (inside) load_n(w + c, weight);
    int turn = 0;
    for (int64_t t = blockIdx.x; t < rows; t += gridDim.x, turn ^= 1) {
        const float rho = rstd[t];
        float normalized[kVector] = {}, g[kVector] = {}, out[kVector] = {};
        if (inside) {
            load_n(x + t * ld_x + c, normalized);
            load_n(dy + t * ld_dy + c, g);
            if (accumulate) load_n(dx + t * ld_dx + c, out);
        }
        float dot = 0, y[kVector];
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
            normalized[k] *= rho;
            y[k] = weight[k] * normalized[k];
            dw[k] += g[k] * normalized[k];
            g[k] *= weight[k];
            dot += g[k] * normalized[k];
        }
        if (normed && inside) store_n(normed + t * ld_normed + c, y);  // this thread has read its part of dy, which normed may be
        const float mean = block_sum(dot, of_warp[turn]) / float(cols);
#pragma unroll
        for (int k = 0; k < kVector; ++k) out[k] += rho * (g[k] - normalized[k] * mean);
        if (inside) store_n(dx + t * ld_dx + c, out);
    }
    if (inside) store_n(partial + int64_t(blockIdx.x) * cols + c, dw);
}

// For rows that are unaligned or longer than 8 · kMaxThreads: everything read twice, dw summed in memory.
__global__ void __launch_bounds__(kMaxThreads)
    backward_any_kernel(bf16* dx, int64_t ld_dx, float* partial, const bf16* dy, int64_t ld_dy, const bf16* x, int64_t ld_x, const float* w,
                        const float* rstd, bf16* normed, int64_t ld_normed, bool accumulate, int64_t rows, int cols) {
    __shared__ float of_warp[2][kMaxThreads / kWarp];
    partial += int64_t(blockIdx.x) * cols;
    for (int c = threadIdx.x; c < cols; c += blockDim.x) partial[c] = 0;
    int turn = 0;
    for (int64_t t = blockIdx.x; t < rows; t += gridDim.x, turn ^= 1) {
        const float rho = rstd[t];
        float dot = 0;
        for (int c = threadIdx.x; c < cols; c += blockDim.x) dot += to_float(dy[t * ld_dy + c]) * w[c] * (to_float(x[t * ld_x + c]) * rho);
        const float mean = block_sum(dot, of_warp[turn]) / float(cols);
        for (int c = threadIdx.x; c < cols; c += blockDim.x) {
            const float grad = to_float(dy[t * ld_dy + c]), normalized = to_float(x[t * ld_x + c]) * rho;
            bf16& out = dx[t * ld_dx + c];
            partial[c] += grad * normalized;
            if (normed) store(normed[t * ld_normed + c], w[c] * normalized);
            store(out, (accumulate ? to_float(out) : 0.0f) + rho * (grad * w[c] - normalized * mean));
        }
    }
}

// out += column sums of partial: (rows, cols). A block takes eight columns (a 32-byte sector of memory), 128 threads down each; all sums
// in a fixed order.
constexpr int kSumRows = 128;
__global__ void __launch_bounds__(kVector* kSumRows) add_column_sums_kernel(float* out, const float* partial, int rows, int cols) {
    __shared__ float sums[kVector][kSumRows + 1];
    const int first = blockIdx.x * kVector, c = first + threadIdx.x;
    float sum = 0;
    if (c < cols) {
#pragma unroll 4
        for (int r = threadIdx.y; r < rows; r += kSumRows) sum += partial[int64_t(r) * cols + c];
    }
    sums[threadIdx.x][threadIdx.y] = sum;
    __syncthreads();
    const int thread = threadIdx.y * kVector + threadIdx.x, column = thread / kWarp, lane = thread % kWarp;
    if (column >= kVector || first + column >= cols) return;  // warp by warp
    sum = 0;
    for (int r = lane; r < kSumRows; r += kWarp) sum += sums[column][r];
    sum = warp_sum(sum);
    if (lane == 0) out[first + column] += sum;
}

void backward_cuda(CudaContext& cuda, Tensor dx, Tensor dw, Tensor dy, Tensor x, Tensor w, Tensor rstd, Tensor normed, bool accumulate, Tensor partial) {
    if (x.rows == 0) return;
    const bool aligned = aligned_rows(x) && aligned_rows(dy) && aligned_rows(dx) && aligned_rows(w) && x.cols % kVector == 0 &&
                         (!normed || aligned_rows(normed));
    auto launch = [&](auto kernel, int64_t threads) {
        kernel<<<unsigned(partial.rows), unsigned(threads), 0, cuda.stream>>>(
            dx.as<bf16>(), dx.ld, partial.as<float>(), dy.as<bf16>(), dy.ld, x.as<bf16>(), x.ld, w.as<float>(), rstd.as<float>(),
            normed ? normed.as<bf16>() : nullptr, normed.ld, accumulate, x.rows, int(x.cols));
        LAUNCH_CHECK();
    };
    const int64_t threads = round_up(ceil_div(x.cols, kVector), kWarp);
    if (aligned && threads <= kMaxThreads) launch(backward_kernel, threads);
    else launch(backward_any_kernel, std::min<int64_t>(round_up(x.cols, kWarp), kMaxThreads));
    add_column_sums_kernel<<<unsigned(ceil_div(x.cols, kVector)), dim3(kVector, kSumRows), 0, cuda.stream>>>(dw.as<float>(), partial.as<float>(),
                                                                                                         int(partial.rows), int(x.cols));
    LAUNCH_CHECK();
}
#endif

}  // namespace

void rmsnorm_forward(Device& device, Tensor y, Tensor rstd, Tensor x, Tensor w, float eps) {
    CHECK_INTERNAL(y.rows == x.rows && y.cols == x.cols && rstd.cols == x.rows && w.cols == x.cols, "x %lld × %lld, y %lld × %lld, rstd %lld, w %lld",
                   (long long)x.rows, (long long)x.cols, (long long)y.rows, (long long)y.cols, (long long)rstd.cols, (long long)w.cols);
    OperationTimer timer(device, "rmsnorm_forward", 0, 2.0 * double(x.numel()) * size_of(x.dtype));
    ON_DEVICE(device, forward_cuda(device.cuda(), y, rstd, x, w, eps), forward_cpu(y, rstd, x, w, eps));
}

void rmsnorm_backward(Device& device, Tensor dx, Tensor dw, Tensor dy, Tensor x, Tensor w, Tensor rstd, Tensor normed, bool accumulate) {
    CHECK_INTERNAL(dx.rows == x.rows && dx.cols == x.cols && dy.rows == x.rows && dy.cols == x.cols && rstd.cols == x.rows && w.cols == x.cols &&
                       dw.cols == x.cols,
                   "x %lld × %lld, dx %lld × %lld, dy %lld × %lld, w %lld", (long long)x.rows, (long long)x.cols, (long long)dx.rows,
                   (long long)dx.cols, (long long)dy.rows, (long long)dy.cols, (long long)w.cols);
    CHECK_INTERNAL(!normed || (normed.rows == x.rows && normed.cols == x.cols), "x %lld × %lld, normed %lld × %lld", (long long)x.rows,
                   (long long)x.cols, (long long)normed.rows, (long long)normed.cols);
    ScratchScope scratch(device);
    Tensor partial = scratch.tensor("rmsnorm weight gradient", DType::f32, worker_count(device.is_cuda(), x.rows, x.cols), x.cols);
    OperationTimer timer(device, "rmsnorm_backward", 0, double(x.numel()) * size_of(x.dtype) * (3 + accumulate + bool(normed)));
    ON_DEVICE(device, backward_cuda(device.cuda(), dx, dw, dy, x, w, rstd, normed, accumulate, partial),
              backward_cpu(dx, dw, dy, x, w, rstd, normed, accumulate, partial));
}

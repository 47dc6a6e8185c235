// RMSNorm; see rmsnorm.h.
#include "ops/rmsnorm.h"

#include <algorithm>
#include <cmath>

#include "ops/row_kernels.h"
#include "runtime/profile.h"

namespace {

// dw is summed in two stages: worker b sums rows b, b + workers, …; then the workers' sums are added in order. The number of
// workers depends on the shape only, so results do not depend on the GPU or the thread count.
// cuda: about 2^18 threads in all, for eight columns each; multiples of 132 fill an H100 or H200 evenly.
int64_t worker_count(bool cuda, int64_t rows, int64_t cols) {
    int64_t workers = cuda ? 528 * std::min<int64_t>(std::max<int64_t>(2048 / cols, 1), 4) : 32;
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

constexpr int kBackwardThreads = 320;  // at most; 5120 columns are two groups of eight per thread

// One block (worker) goes through its rows; a thread owns the same kGroups groups of N columns in all of them.
template <int N, int kGroups>
__global__ void __launch_bounds__(kBackwardThreads)
    backward_kernel(bf16* dx, int64_t ld_dx, float* partial, const bf16* dy, int64_t ld_dy, const bf16* x, int64_t ld_x, const float* w,
                    const float* rstd, bf16* normed, int64_t ld_normed, bool accumulate, int64_t rows, int cols) {
    __shared__ float warp_dots[2][kBackwardThreads / kWarp];  // two in turn: one barrier per row is then enough
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    float dw[kGroups][N] = {};
    int turn = 0;
    for (int64_t t = blockIdx.x; t < rows; t += gridDim.x, turn ^= 1) {
        const float rho = rstd[t];
        float normalized[kGroups][N], g[kGroups][N], out[kGroups][N];
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const int c = (i * blockDim.x + threadIdx.x) * N;
            if (c < cols) {
                load_n(x + t * ld_x + c, normalized[i]);
                load_n(dy + t * ld_dy + c, g[i]);
                if (accumulate) load_n(dx + t * ld_dx + c, out[i]);
            }
        }
        float dot = 0;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const int c = (i * blockDim.x + threadIdx.x) * N;
            if (c < cols) {
                float weight[N], y[N];
                load_n(w + c, weight);
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    normalized[i][k] *= rho;
                    y[k] = weight[k] * normalized[i][k];
                    dw[i][k] += g[i][k] * normalized[i][k];
                    g[i][k] *= weight[k];
                    dot += g[i][k] * normalized[i][k];
                }
                if (normed) store_n(normed + t * ld_normed + c, y);  // this thread has read its part of dy, which normed may be
            }
        }
        dot = warp_sum(dot);
        if (lane == 0) warp_dots[turn][warp] = dot;
        __syncthreads();
        float total = 0;
        for (int i = 0; i < warps; ++i) total += warp_dots[turn][i];
        const float mean = total / float(cols);
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const int c = (i * blockDim.x + threadIdx.x) * N;
            if (c < cols) {
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    const float d = rho * (g[i][k] - normalized[i][k] * mean);
                    out[i][k] = accumulate ? out[i][k] + d : d;
                }
                store_n(dx + t * ld_dx + c, out[i]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
        const int c = (i * blockDim.x + threadIdx.x) * N;
        if (c < cols) store_n(partial + int64_t(blockIdx.x) * cols + c, dw[i]);
    }
}

// out += column sums of partial: (rows, cols). A block takes 32 columns, 32 threads down each, added in a fixed order.
__global__ void __launch_bounds__(1024) add_column_sums_kernel(float* out, const float* partial, int rows, int cols) {
    __shared__ float sums[kWarp][kWarp + 1];
    const int c = blockIdx.x * kWarp + threadIdx.x;
    float sum = 0;
    if (c < cols) {
#pragma unroll 8
        for (int r = threadIdx.y; r < rows; r += kWarp) sum += partial[int64_t(r) * cols + c];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    sum = warp_sum(sums[threadIdx.x][threadIdx.y]);  // warp y now holds column y of the block
    const int column = blockIdx.x * kWarp + threadIdx.y;
    if (threadIdx.x == 0 && column < cols) out[column] += sum;
}

void backward_cuda(CudaContext& cuda, Tensor dx, Tensor dw, Tensor dy, Tensor x, Tensor w, Tensor rstd, Tensor normed, bool accumulate, Tensor partial) {
    if (x.rows == 0) return;
    const bool aligned = aligned_rows(x) && aligned_rows(dy) && aligned_rows(dx) && aligned_rows(w) && x.cols % kVector == 0 &&
                         (!normed || aligned_rows(normed));
    auto launch = [&](auto kernel, int width, int groups) {
        const unsigned threads = unsigned(round_up(ceil_div(x.cols, width * groups), kWarp));
        CHECK_INTERNAL(threads <= kBackwardThreads, "rmsnorm over %lld columns: at most %d", (long long)x.cols, kBackwardThreads * width * groups);
        kernel<<<unsigned(partial.rows), threads, 0, cuda.stream>>>(dx.as<bf16>(), dx.ld, partial.as<float>(), dy.as<bf16>(), dy.ld, x.as<bf16>(),
                                                                    x.ld, w.as<float>(), rstd.as<float>(), normed ? normed.as<bf16>() : nullptr, normed.ld, accumulate,
                                                                    x.rows, int(x.cols));
        LAUNCH_CHECK();
    };
    const int64_t groups = ceil_div(x.cols, kVector * kBackwardThreads);
    if (!aligned) launch(backward_kernel<1, 32>, 1, 32);
    else if (groups <= 1) launch(backward_kernel<kVector, 1>, kVector, 1);
    else if (groups <= 2) launch(backward_kernel<kVector, 2>, kVector, 2);
    else launch(backward_kernel<kVector, 4>, kVector, 4);
    add_column_sums_kernel<<<unsigned(ceil_div(x.cols, kWarp)), dim3(kWarp, kWarp), 0, cuda.stream>>>(dw.as<float>(), partial.as<float>(),
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

// Small memory-bound helpers; see elementwise.h.
#include "ops/elementwise.h"

#include <algorithm>

#include "ops/row_kernels.h"

namespace {

// f(float{}) or f(bf16{}), by dtype.
template <class F> void with_float_type(DType dtype, F f) {
    CHECK_INTERNAL(dtype == DType::f32 || dtype == DType::bf16, "elementwise on %s", safetensors_name(dtype));
    if (dtype == DType::f32) f(float{});
    else f(bf16{});
}

// The same elements as one row where that is possible: long rows use wide accesses and even shares of work best.
Tensor as_row(const Tensor& t) { return t.contiguous() ? Tensor{t.data, t.dtype, 1, t.numel(), t.numel()} : t; }

// The elementwise functions: new value of dst from x and, if reads_dst, the old one.
struct Copy {
    static constexpr bool reads_dst = false;
    HOST_DEVICE float operator()(float x, float) const { return x; }
};
struct Scale {
    static constexpr bool reads_dst = false;
    float a;
    HOST_DEVICE float operator()(float x, float) const { return a * x; }
};
struct ScaleAndAdd {
    static constexpr bool reads_dst = true;
    float a, b;
    HOST_DEVICE float operator()(float x, float old) const { return a * x + b * old; }
};
struct Square {
    static constexpr bool reads_dst = false;
    HOST_DEVICE float operator()(float x, float) const { return x * x; }
};

constexpr int64_t kChunk = 1 << 15;  // columns of one row that a CPU thread takes at a time

template <class D, class S, class F> void map_cpu(Tensor dst, Tensor src, F f) {
    const int64_t chunks = ceil_div(src.cols, kChunk);
#pragma omp parallel for
    for (int64_t i = 0; i < src.rows * chunks; ++i) {
        const int64_t r = i / chunks, begin = i % chunks * kChunk, end = std::min(begin + kChunk, src.cols);
        D* out = dst.as<D>() + r * dst.ld;
        const S* in = src.as<S>() + r * src.ld;
#pragma omp simd
        for (int64_t c = begin; c < end; ++c) store(out[c], f(to_float(in[c]), F::reads_dst ? to_float(out[c]) : 0.0f));
    }
}

template <bool kSquares, class T> void sum_cpu(double* out, Tensor x) {
    const int64_t chunks = ceil_div(x.cols, kChunk);
    std::vector<double> partial(x.rows * chunks);
#pragma omp parallel for
    for (int64_t i = 0; i < int64_t(partial.size()); ++i) {
        const int64_t r = i / chunks, begin = i % chunks * kChunk, end = std::min(begin + kChunk, x.cols);
        const T* in = x.as<T>() + r * x.ld;
        double s = 0;
#pragma omp simd reduction(+ : s)
        for (int64_t c = begin; c < end; ++c) {
            const double v = to_float(in[c]);
            s += kSquares ? v * v : v;
        }
        partial[i] = s;
    }
    double s = 0;
    for (double p : partial) s += p;
    *out = s;
}

constexpr int64_t kSumBlocks = 1056;  // partial sums; a constant, so that the result does not depend on the GPU

#ifdef WITH_CUDA
constexpr int kSumThreads = 256;

template <int N, class D, class S, class F>
__global__ void __launch_bounds__(256) map_kernel(D* dst, int64_t ld_dst, const S* src, int64_t ld_src, int64_t cols, unsigned blocks_per_row, F f) {
    const int64_t r = launch_row(blocks_per_row), c = launch_group(blocks_per_row) * N;
    if (c >= cols) return;
    float x[N], old[N] = {};
    load_n(src + r * ld_src + c, x);
    if constexpr (F::reads_dst) load_n(dst + r * ld_dst + c, old);
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = f(x[k], old[k]);
    store_n(dst + r * ld_dst + c, x);
}

template <int N, class D, class S, class F> void map_cuda(CudaContext& cuda, Tensor dst, Tensor src, F f) {
    const RowLaunch launch = row_launch(src.rows, ceil_div(src.cols, N));
    map_kernel<N><<<launch.blocks, launch.threads, 0, cuda.stream>>>(dst.as<D>(), dst.ld, src.as<S>(), src.ld, src.cols, launch.blocks_per_row, f);
    LAUNCH_CHECK();
}

template <class D, class S, class F> void map_cuda(CudaContext& cuda, Tensor dst, Tensor src, F f) {
    if (src.numel() == 0) return;
    if (aligned_rows(dst) && aligned_rows(src) && src.cols % kVector == 0) map_cuda<kVector, D, S>(cuda, dst, src, f);
    else map_cuda<1, D, S>(cuda, dst, src, f);
}

// Sum over the block in a fixed order; the result is in thread 0.
__device__ double block_sum(double s) {
    __shared__ double warp_sums[kSumThreads / kWarp];
    s = warp_sum(s);
    if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = s;
    __syncthreads();
    double total = 0;
    for (double w : warp_sums) total += w;
    return total;
}

// partial[block] = Σ x or Σ x² over every kSumBlocks·kSumThreads-th group of N elements.
template <int N, bool kSquares, class T>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(double* partial, const T* x, int64_t ld, int64_t rows, int64_t cols) {
    const int64_t groups = cols / N, stride = int64_t(gridDim.x) * kSumThreads, first = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
    const int64_t row_step = stride / groups, group_step = stride % groups;  // the stride as rows and groups: no division in the loop
    double s = 0;
    for (int64_t r = first / groups, g = first % groups; r < rows;) {
        float v[N];
        load_n(x + r * ld + g * N, v);
#pragma unroll
        for (int k = 0; k < N; ++k) s += kSquares ? double(v[k]) * double(v[k]) : double(v[k]);
        r += row_step, g += group_step;
        if (g >= groups) g -= groups, ++r;
    }
    s = block_sum(s);
    if (threadIdx.x == 0) partial[blockIdx.x] = s;
}

__global__ void __launch_bounds__(kSumThreads) sum_partials_kernel(double* out, const double* partial, int count) {
    double s = 0;
    for (int i = threadIdx.x; i < count; i += kSumThreads) s += partial[i];
    s = block_sum(s);
    if (threadIdx.x == 0) *out = s;
}

template <bool kSquares, class T> void sum_cuda(CudaContext& cuda, double* out, Tensor x, double* partial) {
    const bool wide = aligned_rows(x) && x.cols % kVector == 0;
    int count = 0;  // an empty tensor has no partial sums
    if (x.numel() > 0) {
        count = int(kSumBlocks);
        auto kernel = wide ? sum_kernel<kVector, kSquares, T> : sum_kernel<1, kSquares, T>;
        kernel<<<unsigned(kSumBlocks), kSumThreads, 0, cuda.stream>>>(partial, x.as<T>(), x.ld, x.rows, x.cols);
        LAUNCH_CHECK();
    }
    sum_partials_kernel<<<1, kSumThreads, 0, cuda.stream>>>(out, partial, count);
    LAUNCH_CHECK();
}
#endif

template <class F> void map(Device& device, Tensor dst, Tensor src, F f) {
    CHECK_INTERNAL(dst.rows == src.rows && dst.cols == src.cols, "dst %lld × %lld, src %lld × %lld", (long long)dst.rows, (long long)dst.cols,
                   (long long)src.rows, (long long)src.cols);
    if (dst.contiguous() && src.contiguous()) dst = as_row(dst), src = as_row(src);
    with_float_type(dst.dtype, [&](auto d) {
        with_float_type(src.dtype, [&](auto s) {
            using D = decltype(d);
            using S = decltype(s);
            ON_DEVICE(device, (map_cuda<D, S>(device.cuda(), dst, src, f)), (map_cpu<D, S>(dst, src, f)));
        });
    });
}

template <bool kSquares> void sum(Device& device, double* sums, int64_t slot, Tensor x) {
    x = as_row(x);
    ScratchScope scratch(device);
    [[maybe_unused]] double* partial = scratch.tensor("partial sums", DType::f64, 1, kSumBlocks).as<double>();
    with_float_type(x.dtype, [&](auto type) {
        using T = decltype(type);
        ON_DEVICE(device, (sum_cuda<kSquares, T>(device.cuda(), sums + slot, x, partial)), (sum_cpu<kSquares, T>(sums + slot, x)));
    });
}

}  // namespace

void convert(Device& device, Tensor dst, Tensor src) { map(device, dst, src, Copy{}); }

// With b = 0, dst is not read (as in BLAS), so it may hold anything.
void axpby(Device& device, Tensor dst, float a, Tensor x, float b) {
    if (b == 0) map(device, dst, x, Scale{a});
    else map(device, dst, x, ScaleAndAdd{a, b});
}

void square(Device& device, Tensor dst, Tensor src) { map(device, dst, src, Square{}); }

void sum_of_squares(Device& device, double* sums, int64_t slot, Tensor x) { sum<true>(device, sums, slot, x); }
void sum(Device& device, double* sums, int64_t slot, Tensor x) { sum<false>(device, sums, slot, x); }

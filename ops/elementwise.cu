// Small memory-bound helpers; see elementwise.h.
#include "ops/elementwise.h"

#include <algorithm>

#include "ops/row_kernels.h"
#include "runtime/profile.h"

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

constexpr int64_t kSumChunk = 1 << 14;  // elements per partial sum; a constant, so that the result does not depend on the GPU
constexpr int kSumList = 64;            // tensors per launch: their descriptions travel as kernel arguments, of which there are 4 KB

#ifdef WITH_CUDA
constexpr int kSumThreads = 256;

template <int N, class D, class S, class F>
__global__ void __launch_bounds__(RowLaunch::threads) map_kernel(D* dst, int64_t ld_dst, const S* src, int64_t ld_src, RowLaunch launch, F f) {
    int64_t r, group;
    if (!launch.locate(r, group)) return;
    const int64_t c = group * N;
    float x[N], old[N] = {};
    load_n(src + r * ld_src + c, x);
    if constexpr (F::reads_dst) load_n(dst + r * ld_dst + c, old);
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = f(x[k], old[k]);
    store_n(dst + r * ld_dst + c, x);
}

template <int N, class D, class S, class F> void map_cuda(CudaContext& cuda, Tensor dst, Tensor src, F f) {
    const RowLaunch launch(src.rows, src.cols / N);
    map_kernel<N><<<launch.blocks, launch.threads, 0, cuda.stream>>>(dst.as<D>(), dst.ld, src.as<S>(), src.ld, launch, f);
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

// Some tensors and the chunks of each: those of tensor i are first_chunk[i] .. first_chunk[i + 1] − 1.
struct SumList {
    struct Matrix {
        const void* data;
        int64_t rows, cols, ld;
        bool is_bf16, wide;  // wide: in groups of eight
    } matrix[kSumList];
    int first_chunk[kSumList + 1];
};

// Σ x or Σ x² over elements begin .. end − 1 (row-major), every kSumThreads-th group of N.
template <int N, bool kSquares, class T> __device__ double sum_chunk(const SumList::Matrix& m, int64_t begin, int64_t end) {
    // Divisions are slow: none in the loop, none for one row (any contiguous tensor).
    const bool one_row = m.rows == 1;
    const int64_t step = int64_t(kSumThreads) * N, row_step = one_row ? 0 : step / m.cols, column_step = step - row_step * m.cols;
    int64_t i = begin + threadIdx.x * N, r = one_row ? 0 : i / m.cols, c = i - r * m.cols;
    double s = 0;
#pragma unroll 4
    for (; i < end; i += step) {
        float v[N];
        load_n(static_cast<const T*>(m.data) + r * m.ld + c, v);
#pragma unroll
        for (int k = 0; k < N; ++k) s += kSquares ? double(v[k]) * double(v[k]) : double(v[k]);
        r += row_step, c += column_step;
        if (c >= m.cols) c -= m.cols, ++r;
    }
    return s;
}

// partial[b] = the sum over chunk b of the list.
template <bool kSquares> __global__ void __launch_bounds__(kSumThreads) sum_chunks_kernel(double* partial, const __grid_constant__ SumList list) {
    int i = 0;
    for (int half = kSumList / 2; half > 0; half /= 2)
        if (int(blockIdx.x) >= list.first_chunk[i + half]) i += half;
    const SumList::Matrix& m = list.matrix[i];
    const int64_t begin = (int64_t(blockIdx.x) - list.first_chunk[i]) * kSumChunk, end = min(begin + kSumChunk, m.rows * m.cols);
    double s = m.is_bf16 ? m.wide ? sum_chunk<kVector, kSquares, bf16>(m, begin, end) : sum_chunk<1, kSquares, bf16>(m, begin, end)
                         : m.wide ? sum_chunk<kVector, kSquares, float>(m, begin, end) : sum_chunk<1, kSquares, float>(m, begin, end);
    s = block_sum(s);
    if (threadIdx.x == 0) partial[blockIdx.x] = s;
}

// out[b] = the sum of tensor b's partial sums.
__global__ void __launch_bounds__(kSumThreads) sum_partials_kernel(double* out, const double* partial, const __grid_constant__ SumList list) {
    double s = 0;
    for (int i = list.first_chunk[blockIdx.x] + threadIdx.x; i < list.first_chunk[blockIdx.x + 1]; i += kSumThreads) s += partial[i];
    s = block_sum(s);
    if (threadIdx.x == 0) out[blockIdx.x] = s;
}

template <bool kSquares> void sums_cuda(CudaContext& cuda, double* out, const Tensor* tensors, int count, double* partial) {
    SumList list{};
    for (int i = 0; i < kSumList; ++i) {
        int64_t chunks = 0;
        if (i < count) {
            const Tensor& t = tensors[i];
            list.matrix[i] = {t.data, t.rows, t.cols, t.ld, t.dtype == DType::bf16, aligned_rows(t) && t.cols % kVector == 0};
            chunks = ceil_div(t.numel(), kSumChunk);
        }
        list.first_chunk[i + 1] = int(list.first_chunk[i] + chunks);  // past the end of the list: empty, never found
    }
    if (list.first_chunk[kSumList] > 0) {
        sum_chunks_kernel<kSquares><<<unsigned(list.first_chunk[kSumList]), kSumThreads, 0, cuda.stream>>>(partial, list);
        LAUNCH_CHECK();
    }
    sum_partials_kernel<<<unsigned(count), kSumThreads, 0, cuda.stream>>>(out, partial, list);
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

template <bool kSquares> void sums_cpu(double* out, const Tensor* tensors, int count) {
    for (int i = 0; i < count; ++i) with_float_type(tensors[i].dtype, [&](auto type) { sum_cpu<kSquares, decltype(type)>(out + i, tensors[i]); });
}

template <bool kSquares> void sums(Device& device, double* out, const std::vector<Tensor>& tensors) {
    for (size_t begin = 0; begin < tensors.size(); begin += kSumList) {
        std::vector<Tensor> some;
        int64_t chunks = 0;
        for (size_t i = begin; i < std::min(begin + kSumList, tensors.size()); ++i) {
            some.push_back(as_row(tensors[i]));
            with_float_type(tensors[i].dtype, [](auto) {});  // checks
            chunks += ceil_div(tensors[i].numel(), kSumChunk);
        }
        ScratchScope scratch(device);
        [[maybe_unused]] double* partial = scratch.tensor("partial sums", DType::f64, 1, chunks).as<double>();
        const int count = int(some.size());
        ON_DEVICE(device, sums_cuda<kSquares>(device.cuda(), out + begin, some.data(), count, partial), sums_cpu<kSquares>(out + begin, some.data(), count));
    }
}

double map_bytes(const Tensor& dst, const Tensor& src, bool reads_dst) {
    return double(src.numel()) * double(size_of(src.dtype) + size_of(dst.dtype) * (1 + reads_dst));
}

}  // namespace

void convert(Device& device, Tensor dst, Tensor src) {
    OperationTimer timer(device, "convert", 0, map_bytes(dst, src, false));
    map(device, dst, src, Copy{});
}

// With b = 0, dst is not read (as in BLAS), so it may hold anything.
void axpby(Device& device, Tensor dst, float a, Tensor x, float b) {
    OperationTimer timer(device, "axpby", 0, map_bytes(dst, x, b != 0));
    if (b == 0) map(device, dst, x, Scale{a});
    else map(device, dst, x, ScaleAndAdd{a, b});
}

void square(Device& device, Tensor dst, Tensor src) {
    OperationTimer timer(device, "square", 0, map_bytes(dst, src, false));
    map(device, dst, src, Square{});
}

void sums_of_squares(Device& device, double* out, const std::vector<Tensor>& tensors) {
    double bytes = 0;
    for (const Tensor& t : tensors) bytes += double(t.numel()) * size_of(t.dtype);
    OperationTimer timer(device, "sum_of_squares", 0, bytes);
    sums<true>(device, out, tensors);
}

void sum_of_squares(Device& device, double* out, int64_t slot, Tensor x) { sums_of_squares(device, out + slot, {x}); }

void sum(Device& device, double* out, int64_t slot, Tensor x) {
    OperationTimer timer(device, "sum", 0, double(x.numel()) * size_of(x.dtype));
    sums<false>(device, out + slot, {x});
}

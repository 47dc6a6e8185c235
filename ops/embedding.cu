// Token embedding; see embedding.h.
#include "ops/embedding.h"

#include "ops/row_kernels.h"
#include "runtime/profile.h"

// Counting sort by token (stable), then one group per distinct token, cut into segments. O(count + vocab).
TokenGroups group_tokens(const int32_t* tokens, int64_t count, int64_t vocab) {
    CHECK_INTERNAL(count < (int64_t(1) << 31), "%lld tokens in a micro-batch", (long long)count);
    std::vector<int32_t> next(vocab, 0);  // first the counts, then where the next position of a token goes
    for (int64_t t = 0; t < count; ++t) {
        CHECK_INTERNAL(tokens[t] >= 0 && tokens[t] < vocab, "token %d at position %lld, vocabulary %lld", tokens[t], (long long)t, (long long)vocab);
        ++next[tokens[t]];
    }
    TokenGroups groups;
    int32_t begin = 0;
    for (int64_t token = 0; token < vocab; ++token) {
        int32_t n = next[token];
        next[token] = begin;
        if (n == 0) continue;
        groups.group_begin.push_back(int32_t(groups.segment_begin.size()));
        groups.group_token.push_back(int32_t(token));
        for (int32_t offset = 0; offset < n; offset += kEmbeddingSegment) groups.segment_begin.push_back(begin + offset);
        begin += n;
    }
    groups.group_begin.push_back(int32_t(groups.segment_begin.size()));
    groups.segment_begin.push_back(begin);
    groups.order.resize(count);
    for (int64_t t = 0; t < count; ++t) groups.order[next[tokens[t]]++] = int32_t(t);
    return groups;
}

namespace {

void forward_cpu(Tensor y, Tensor table, const int32_t* tokens) {
#pragma omp parallel for
    for (int64_t t = 0; t < y.rows; ++t) memcpy(y.at(t, 0), table.at(tokens[t], 0), y.cols * size_of(y.dtype));
}

template <class D> void add_groups_cpu(Tensor dtable, Tensor partial, const DeviceTokenGroups& groups, const RoundingDraws& draws) {
#pragma omp parallel for
    for (int64_t g = 0; g < groups.groups; ++g) {
        D* out = dtable.as<D>() + groups.group_token[g] * dtable.ld;
        const int64_t element = groups.group_token[g] * dtable.cols;
        const int32_t begin = groups.group_begin[g], end = groups.group_begin[g + 1];
        for (int64_t c = 0; c < dtable.cols; ++c) {
            float sum = 0;
            for (int64_t s = begin; s < end; ++s) sum += partial.as<float>()[s * partial.ld + c];
            sum += to_float(out[c]);
            if constexpr (std::is_same_v<D, bf16>) out[c] = to_bf16_stochastic(sum, draws.of_element(element + c));
            else out[c] = sum;
        }
    }
}

void backward_cpu(Tensor dtable, Tensor dy, Tensor partial, const DeviceTokenGroups& groups, const RoundingDraws& draws) {
#pragma omp parallel for
    for (int64_t s = 0; s < groups.segments; ++s) {
        float* sum = partial.as<float>() + s * partial.ld;
        std::fill(sum, sum + dy.cols, 0.0f);
        for (int32_t p = groups.segment_begin[s]; p < groups.segment_begin[s + 1]; ++p) {
            const float* row = dy.as<float>() + groups.order[p] * dy.ld;
#pragma omp simd
            for (int64_t c = 0; c < dy.cols; ++c) sum[c] += row[c];
        }
    }
    if (dtable.dtype == DType::f32) add_groups_cpu<float>(dtable, partial, groups, draws);
    else add_groups_cpu<bf16>(dtable, partial, groups, draws);
}

#ifdef WITH_CUDA
constexpr int kWarpsPerBlock = 8;

// One warp per row; T is the unit of copying (16 bytes where rows are aligned, else one element).
template <class T>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp)
    gather_kernel(T* y, int64_t ld_y, const T* table, int64_t ld_table, const int32_t* tokens, int64_t rows, int units) {
    int64_t t = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
    if (t >= rows) return;
    const T* from = table + tokens[t] * ld_table;
    T* to = y + t * ld_y;
#pragma unroll 4
    for (int i = threadIdx.x % kWarp; i < units; i += kWarp) to[i] = from[i];
}

void forward_cuda(CudaContext& cuda, Tensor y, Tensor table, const int32_t* tokens) {
    if (y.rows == 0) return;
    unsigned blocks = unsigned(ceil_div(y.rows, kWarpsPerBlock)), threads = kWarpsPerBlock * kWarp;
    if (aligned_rows(y) && aligned_rows(table) && y.cols % kVector == 0)
        gather_kernel<<<blocks, threads, 0, cuda.stream>>>(static_cast<uint4*>(y.data), y.ld / kVector, static_cast<const uint4*>(table.data),
                                                           table.ld / kVector, tokens, y.rows, int(y.cols / kVector));
    else
        gather_kernel<<<blocks, threads, 0, cuda.stream>>>(y.as<bf16>(), y.ld, table.as<bf16>(), table.ld, tokens, y.rows, int(y.cols));
    LAUNCH_CHECK();
}

// One warp per (item, chunk of 32·N columns).
struct WarpChunk {
    int64_t item, column;
};
template <int N> __device__ WarpChunk warp_chunk(int64_t cols) {
    unsigned warp = blockIdx.x * kWarpsPerBlock + threadIdx.x / kWarp, chunks = unsigned((cols + kWarp * N - 1) / (kWarp * N));
    return {warp / chunks, (warp % chunks) * int64_t(kWarp * N) + threadIdx.x % kWarp * N};
}
template <int N> unsigned warp_chunk_blocks(int64_t items, int64_t cols) {
    return unsigned(ceil_div(items * ceil_div(cols, kWarp * N), kWarpsPerBlock));
}

// partial[s] = Σ dy[order[p]] over the positions of segment s, in order.
template <int N>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp)
    segment_kernel(float* partial, const bf16* dy, int64_t ld_dy, int64_t cols, DeviceTokenGroups groups) {
    WarpChunk at = warp_chunk<N>(cols);
    if (at.item >= groups.segments || at.column >= cols) return;
    float sum[N] = {};
    const int end = groups.segment_begin[at.item + 1];
#pragma unroll 4
    for (int p = groups.segment_begin[at.item]; p < end; ++p) {
        float x[N];
        load_n(dy + groups.order[p] * ld_dy + at.column, x);
#pragma unroll
        for (int k = 0; k < N; ++k) sum[k] += x[k];
    }
    store_n(partial + at.item * cols + at.column, sum);
}

// out = x, elements number `element` on of their tensor. Eight of them are one group of draws.
template <int N> __device__ __forceinline__ void store_rounded(float* out, const float (&x)[N], int64_t, const RoundingDraws&) { store_n(out, x); }
template <int N> __device__ __forceinline__ void store_rounded(bf16* out, const float (&x)[N], int64_t element, const RoundingDraws& draws) {
    if constexpr (N == kVector) {
        const Bf16x8 rounded = round_stochastic(x, draws.of_group(element / kVector));
        store_words(out, rounded.word[0], rounded.word[1], rounded.word[2], rounded.word[3]);
    } else {
        *out = to_bf16_stochastic(x[0], draws.of_element(element));
    }
}

// dtable[token of group g] += Σ partial[s] over the segments of g, in order.
template <int N, class D>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp)
    group_kernel(D* dtable, int64_t ld_dtable, const float* partial, int64_t cols, DeviceTokenGroups groups, RoundingDraws draws) {
    WarpChunk at = warp_chunk<N>(cols);
    if (at.item >= groups.groups || at.column >= cols) return;
    float sum[N] = {};
    const int end = groups.group_begin[at.item + 1];
#pragma unroll 4
    for (int s = groups.group_begin[at.item]; s < end; ++s) {
        float x[N];
        load_n(partial + s * cols + at.column, x);
#pragma unroll
        for (int k = 0; k < N; ++k) sum[k] += x[k];
    }
    const int64_t token = groups.group_token[at.item];
    D* out = dtable + token * ld_dtable + at.column;
    float x[N];
    load_n(out, x);
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] += sum[k];
    store_rounded(out, x, token * cols + at.column, draws);
}

template <int N>
void backward_cuda(CudaContext& cuda, Tensor dtable, Tensor dy, Tensor partial, const DeviceTokenGroups& groups, const RoundingDraws& draws) {
    if (groups.segments == 0) return;
    const int threads = kWarpsPerBlock * kWarp;
    const int64_t h = dy.cols;
    segment_kernel<N><<<warp_chunk_blocks<N>(groups.segments, h), threads, 0, cuda.stream>>>(partial.as<float>(), dy.as<bf16>(), dy.ld, h, groups);
    LAUNCH_CHECK();
    const unsigned blocks = warp_chunk_blocks<N>(groups.groups, h);
    if (dtable.dtype == DType::f32)
        group_kernel<N><<<blocks, threads, 0, cuda.stream>>>(dtable.as<float>(), dtable.ld, partial.as<float>(), h, groups, draws);
    else
        group_kernel<N><<<blocks, threads, 0, cuda.stream>>>(dtable.as<bf16>(), dtable.ld, partial.as<float>(), h, groups, draws);
    LAUNCH_CHECK();
}

void backward_cuda(CudaContext& cuda, Tensor dtable, Tensor dy, Tensor partial, const DeviceTokenGroups& groups, const RoundingDraws& draws) {
    if (aligned_rows(dtable) && aligned_rows(dy) && dy.cols % kVector == 0) backward_cuda<kVector>(cuda, dtable, dy, partial, groups, draws);
    else backward_cuda<1>(cuda, dtable, dy, partial, groups, draws);
}
#endif

}  // namespace

void embedding_forward(Device& device, Tensor y, Tensor table, const int32_t* tokens) {
    CHECK_INTERNAL(y.cols == table.cols && y.dtype == table.dtype && y.dtype == device.activation_dtype(), "y %lld columns, table %lld",
                   (long long)y.cols, (long long)table.cols);
    OperationTimer timer(device, "embedding_forward", 0, 2.0 * double(y.numel()) * size_of(y.dtype));
    ON_DEVICE(device, forward_cuda(device.cuda(), y, table, tokens), forward_cpu(y, table, tokens));
}

void embedding_backward(Device& device, Tensor dtable, Tensor dy, const DeviceTokenGroups& groups, const RoundingDraws& draws) {
    CHECK_INTERNAL(dtable.cols == dy.cols && dy.dtype == device.activation_dtype(), "dtable %lld columns, dy %lld", (long long)dtable.cols,
                   (long long)dy.cols);
    CHECK_INTERNAL(dtable.dtype == DType::f32 || dtable.dtype == DType::bf16, "dtable of %s", safetensors_name(dtable.dtype));
    CHECK_INTERNAL(draws.begin % 8 == 0, "draws from %lld on", (long long)draws.begin);
    ScratchScope scratch(device);
    Tensor partial = scratch.tensor("embedding gradient segments", DType::f32, groups.segments, dy.cols);
    OperationTimer timer(device, "embedding_backward", 0,
                         double(dy.numel()) * size_of(dy.dtype) + 2.0 * double(groups.groups * dy.cols) * size_of(dtable.dtype));
    ON_DEVICE(device, backward_cuda(device.cuda(), dtable, dy, partial, groups, draws), backward_cpu(dtable, dy, partial, groups, draws));
}

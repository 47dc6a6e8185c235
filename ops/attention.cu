#include "ops/attention.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/fast_exp.h"
#include "ops/rope.h"
#include "runtime/profile.h"

#ifdef WITH_CUDA
#include "ops/attention_backward.cuh"
#include "ops/attention_forward.cuh"
#endif

namespace {

// ---- CPU -------------------------------------------------------------------------------------------------------------------
// A block of query rows at a time, against all keys up to its last row. The products are OpenBLAS's, single-threaded; the scores of one
// block are the only temporary. Weights above the diagonal are set to zero, so that the products need not know of it.

constexpr int64_t kQueryRows = 64;

struct CpuMatrix {
    float* data;
    int64_t ld;
};

struct CpuHeads {  // q, k, v of one sequence, or rows like them in dqkv
    float* base;
    int64_t ld, heads, kv_heads, head_dim;
    CpuHeads(Tensor t, const AttentionShape& s, int64_t b)
        : base(t.as<float>() + b * s.seq * t.ld), ld(t.ld), heads(s.heads), kv_heads(s.kv_heads), head_dim(s.head_dim) {}
    CpuMatrix q(int64_t row, int64_t head) const { return {base + row * ld + head * head_dim, ld}; }
    CpuMatrix k(int64_t kv_head) const { return {base + (heads + kv_head) * head_dim, ld}; }
    CpuMatrix v(int64_t kv_head) const { return {base + (heads + kv_heads + kv_head) * head_dim, ld}; }
};

CpuMatrix o_rows(Tensor o, const AttentionShape& s, int64_t b, int64_t row, int64_t head) {
    return {o.as<float>() + (b * s.seq + row) * o.ld + head * s.head_dim, o.ld};
}

inline float dot(const float* a, const float* b, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

// C (m, n) = alpha·op(A) (m, k)·op(B) (k, n) + beta·C
void product(CpuMatrix c, int64_t m, int64_t n, int64_t k, float alpha, CpuMatrix a, CBLAS_TRANSPOSE op_a, CpuMatrix b, CBLAS_TRANSPOSE op_b, float beta = 0) {
    cblas_sgemm(CblasRowMajor, op_a, op_b, blasint(m), blasint(n), blasint(k), alpha, a.data, blasint(a.ld), b.data, blasint(b.ld), beta, c.data, blasint(c.ld));
}

inline float score_scale(const AttentionShape& s) { return 1.0f / std::sqrt(float(s.head_dim)); }

// Softmax of the first `count` of n scores in place, zero beyond; returns the log of the sum of exponentials.
float causal_softmax(float* p, int64_t count, int64_t n) {
    float max = -INFINITY, sum = 0;
#pragma omp simd reduction(max : max)
    for (int64_t j = 0; j < count; ++j) max = p[j] > max ? p[j] : max;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; ++j) sum += p[j] = fast_exp(p[j] - max);
    const float inverse = 1.0f / sum;
    for (int64_t j = 0; j < count; ++j) p[j] *= inverse;
    std::fill(p + count, p + n, 0.0f);
    return max + std::log(sum);
}

void forward_cpu(Tensor o, Tensor lse, Tensor qkv, const AttentionShape& s) {
    const float scale = score_scale(s);
    const int64_t d = s.head_dim;
    openblas_set_num_threads(1);
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t h = 0; h < s.heads; ++h) {
            const CpuHeads in(qkv, s, b);
            const int64_t kv = h / (s.heads / s.kv_heads);
            std::vector<float> scores(kQueryRows * s.seq);
            const CpuMatrix p{scores.data(), s.seq};
            for (int64_t begin = 0; begin < s.seq; begin += kQueryRows) {
                const int64_t rows = std::min(kQueryRows, s.seq - begin), keys = begin + rows;
                product(p, rows, keys, d, scale, in.q(begin, h), CblasNoTrans, in.k(kv), CblasTrans);
                for (int64_t i = 0; i < rows; ++i)
                    lse.as<float>()[(b * s.heads + h) * s.seq + begin + i] = causal_softmax(p.data + i * p.ld, begin + i + 1, keys);
                product(o_rows(o, s, b, begin, h), rows, d, keys, 1, p, CblasNoTrans, in.v(kv), CblasNoTrans);
            }
        }
}

// With P = exp(scale·QKᵀ − lse) and dP = dO·Vᵀ: dV = Pᵀ·dO, dS = scale·P∘(dP − rowsum(dO∘O)), dQ = dS·K, dK = dSᵀ·Q.
// Parallel over (batch, kv head): all queries that add to one dK, dV are one thread's, in order.
void backward_cpu(Tensor dqkv, Tensor d_o, Tensor qkv, Tensor o, Tensor lse, Tensor row_sums, const AttentionShape& s) {
    const float scale = score_scale(s);
    const int64_t group = s.heads / s.kv_heads, d = s.head_dim;
    openblas_set_num_threads(1);
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t kv = 0; kv < s.kv_heads; ++kv) {
            const CpuHeads in(qkv, s, b), out(dqkv, s, b);
            const CpuMatrix k = in.k(kv), v = in.v(kv), dk = out.k(kv), dv = out.v(kv);
            for (int64_t j = 0; j < s.seq; ++j) {
                std::fill_n(dk.data + j * dk.ld, d, 0.0f);
                std::fill_n(dv.data + j * dv.ld, d, 0.0f);
            }
            std::vector<float> scores(kQueryRows * s.seq), gradients(kQueryRows * s.seq);
            const CpuMatrix p{scores.data(), s.seq}, ds{gradients.data(), s.seq};
            for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
                for (int64_t begin = 0; begin < s.seq; begin += kQueryRows) {
                    const int64_t rows = std::min(kQueryRows, s.seq - begin), keys = begin + rows;
                    const CpuMatrix q = in.q(begin, h), out_rows = o_rows(o, s, b, begin, h), d_out = o_rows(d_o, s, b, begin, h);
                    product(p, rows, keys, d, scale, q, CblasNoTrans, k, CblasTrans);
                    product(ds, rows, keys, d, 1, d_out, CblasNoTrans, v, CblasTrans);
                    for (int64_t i = 0; i < rows; ++i) {
                        const int64_t count = begin + i + 1, at = (b * s.heads + h) * s.seq + begin + i;
                        const float row_sum = row_sums.as<float>()[at] = dot(d_out.data + i * d_out.ld, out_rows.data + i * out_rows.ld, d);
                        const float row_lse = lse.as<float>()[at];
                        float *weight = p.data + i * p.ld, *gradient = ds.data + i * ds.ld;
#pragma omp simd
                        for (int64_t j = 0; j < count; ++j) {
                            weight[j] = fast_exp(weight[j] - row_lse);
                            gradient[j] = scale * weight[j] * (gradient[j] - row_sum);
                        }
                        std::fill(weight + count, weight + keys, 0.0f);
                        std::fill(gradient + count, gradient + keys, 0.0f);
                    }
                    product(dv, keys, d, rows, 1, p, CblasTrans, d_out, CblasNoTrans, 1);
                    product(dk, keys, d, rows, 1, ds, CblasTrans, q, CblasNoTrans, 1);
                    product(out.q(begin, h), rows, d, keys, 1, ds, CblasNoTrans, k, CblasNoTrans);
                }
        }
}

// Scratch of the backward pass, a function of the shape alone. On cuda (see ops/attention_backward.cuh): partial sums of dQ for as many
// key heads ("slots") as blocks in flight can belong to, and the counters that put the blocks in order.
struct BackwardScratch {
    int64_t slots = 0;
    Tensor row_sums, partial_dq, turns;

    BackwardScratch(ScratchScope& scratch, bool cuda, const AttentionShape& s) {
        row_sums = scratch.tensor("attention row sums", DType::f32, 1, s.batch * s.heads * s.seq);
        if (!cuda) return;
        const int64_t blocks_in_flight = 160 * 128 / s.head_dim;  // on the largest GPUs; with more, blocks would wait for slots
        const int64_t key_tiles = ceil_div(s.seq, 128), query_tiles = ceil_div(s.seq * s.head_dim, 4096);
        slots = std::min(s.batch * s.kv_heads, 2 * blocks_in_flight / key_tiles + 2);
        const int64_t heads = slots * (s.heads / s.kv_heads);
        partial_dq = scratch.tensor("attention sums of dQ", DType::f32, heads * query_tiles, 4096);
        turns = scratch.tensor("attention turns", DType::i32, 1, heads * key_tiles * s.head_dim / 16 + 1);
    }
};

// ---- CUDA ------------------------------------------------------------------------------------------------------------------
#ifdef WITH_CUDA
// The kernels move 16 bytes at a time; rows of whole heads always allow that.
const bf16* aligned(Tensor t, const char* what) {
    CHECK_INTERNAL(t.dtype == DType::bf16 && t.ld % 8 == 0 && t.ld < int64_t(1) << 31 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0,
                   "%s must be bf16 in 16-byte aligned rows (ld %lld)", what, (long long)t.ld);
    return t.as<bf16>();
}

void check_cuda_shape(const AttentionShape& s) {
    CHECK_INTERNAL(s.head_dim == 64 || s.head_dim == 128, "head_dim %lld: the CUDA kernels have 64 and 128", (long long)s.head_dim);
    CHECK_INTERNAL(s.batch <= 65535 && s.heads <= 65535 && s.seq * s.heads * s.head_dim < int64_t(1) << 31,
                   "batch %lld, seq %lld, heads %lld: past the grid or 32-bit indices", (long long)s.batch, (long long)s.seq, (long long)s.heads);
}

void forward_cuda(Device& device, Tensor o, Tensor lse, Tensor qkv, const AttentionShape& s) {
    check_cuda_shape(s);
    attention::ForwardArgs args{aligned(qkv, "qkv"), int(qkv.ld), const_cast<bf16*>(aligned(o, "o")), int(o.ld), lse.as<float>(),
                                int(s.seq), int(s.heads), int(s.kv_heads), score_scale(s)};
    const cudaStream_t stream = device.cuda().stream;
    // Short sequences prefer tiles of 64 queries, which waste less at the diagonal; the results are the same.
    if (s.head_dim == 128) attention::launch_forward<128, 2>(args, int(s.batch), stream);
    else if (s.seq <= 512) attention::launch_forward<64, 1>(args, int(s.batch), stream);
    else attention::launch_forward<64, 2>(args, int(s.batch), stream);
}

void backward_cuda(Device& device, Tensor dqkv, Tensor d_o, Tensor qkv, Tensor o, Tensor lse, const BackwardScratch& scratch, const AttentionShape& s,
                   Tensor rope) {
    check_cuda_shape(s);
    CHECK_INTERNAL(rope.ld % 2 == 0 && reinterpret_cast<uintptr_t>(rope.data) % 8 == 0, "rope table at %p, ld %lld", rope.data, (long long)rope.ld);
    unsigned* turns = scratch.turns.as<unsigned>();
    CUDA_CHECK(cudaMemsetAsync(turns, 0, scratch.turns.bytes(), device.cuda().stream));
    attention::BackwardArgs args{};
    args.dqkv = const_cast<bf16*>(aligned(dqkv, "dqkv")), args.ld_dqkv = int(dqkv.ld);
    args.d_o = aligned(d_o, "d_o"), args.ld_d_o = int(d_o.ld);
    args.qkv = aligned(qkv, "qkv"), args.ld_qkv = int(qkv.ld);
    args.o = aligned(o, "o"), args.ld_o = int(o.ld);
    args.lse = lse.as<float>(), args.row_sums = scratch.row_sums.as<float>();
    args.partial_dq = scratch.partial_dq.as<float>(), args.slots = int(scratch.slots);
    args.turns = turns, args.started = turns + scratch.turns.cols - 1;
    args.batch = int(s.batch), args.seq = int(s.seq), args.heads = int(s.heads), args.kv_heads = int(s.kv_heads), args.group = int(s.heads / s.kv_heads);
    args.scale = score_scale(s);
    args.rope = rope.as<float>(), args.ld_rope = int(rope.ld);
    if (s.head_dim == 64) attention::launch_backward<64>(args, device.cuda().stream);
    else attention::launch_backward<128>(args, device.cuda().stream);
}
#endif

void check_shape(const AttentionShape& s, Tensor qkv_like, Tensor o_like, Tensor lse) {
    CHECK_INTERNAL(s.batch > 0 && s.seq > 0 && s.head_dim > 0 && s.kv_heads > 0 && s.heads % s.kv_heads == 0,
                   "batch %lld, seq %lld, heads %lld/%lld, head_dim %lld", (long long)s.batch, (long long)s.seq, (long long)s.heads, (long long)s.kv_heads, (long long)s.head_dim);
    CHECK_INTERNAL(qkv_like.rows == s.batch * s.seq && qkv_like.cols == s.qkv_cols(), "%lld x %lld", (long long)qkv_like.rows, (long long)qkv_like.cols);
    CHECK_INTERNAL(o_like.rows == s.batch * s.seq && o_like.cols == s.heads * s.head_dim, "%lld x %lld", (long long)o_like.rows, (long long)o_like.cols);
    CHECK_INTERNAL(lse.dtype == DType::f32 && lse.numel() == s.batch * s.heads * s.seq && lse.contiguous(), "%lld elements", (long long)lse.numel());
}

}  // namespace

// Products of one causal pass over keys and values, by the convention of the FlashAttention papers: 2·seq²/2·head_dim for each of two.
static double forward_flops(const AttentionShape& s) {
    return 2.0 * double(s.batch * s.heads * s.head_dim) * double(s.seq) * double(s.seq);
}

void attention_forward(Device& device, Tensor o, Tensor lse, Tensor qkv, const AttentionShape& shape) {
    check_shape(shape, qkv, o, lse);
    OperationTimer timer(device, "attention_forward", forward_flops(shape), double(qkv.bytes() + o.bytes() + lse.bytes()));
    ON_DEVICE(device, forward_cuda(device, o, lse, qkv, shape), forward_cpu(o, lse, qkv, shape));
}

void attention_backward(Device& device, Tensor dqkv, Tensor d_o, Tensor qkv, Tensor o, Tensor lse, const AttentionShape& shape, Tensor rope) {
    check_shape(shape, qkv, o, lse);
    check_shape(shape, dqkv, d_o, lse);
    const bool rotate = rope.rows > 0;
    CHECK_INTERNAL(!rotate || (rope.dtype == DType::f32 && rope.rows >= shape.seq && rope.cols == shape.head_dim && shape.head_dim % 2 == 0),
                   "rope table %lld x %lld", (long long)rope.rows, (long long)rope.cols);
    ScratchScope scratch(device);
    const BackwardScratch sums(scratch, device.is_cuda(), shape);
    OperationTimer timer(device, "attention_backward", 2.5 * forward_flops(shape), double(2 * qkv.bytes() + 2 * o.bytes() + lse.bytes()));
    auto on_cpu = [&] {
        backward_cpu(dqkv, d_o, qkv, o, lse, sums.row_sums, shape);
        if (rotate) rope_inplace(device, dqkv, rope, shape.seq, shape.heads, shape.kv_heads, shape.head_dim, true);
    };
    ON_DEVICE(device, backward_cuda(device, dqkv, d_o, qkv, o, lse, sums, shape, rope), on_cpu());
}

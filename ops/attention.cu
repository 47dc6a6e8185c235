#include "ops/attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/rope.h"
#include "runtime/profile.h"

#ifdef WITH_CUDA
#include "ops/attention_backward.cuh"
#include "ops/attention_forward.cuh"
#endif

namespace {

// ---- CPU -------------------------------------------------------------------------------------------------------------------
// One query row at a time; the loops over head_dim are the vectorized ones. A row of seq weights is the only temporary.

inline float dot(const float* a, const float* b, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

// y += alpha·x
inline void add_scaled(float* y, float alpha, const float* x, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] += alpha * x[i];
}

struct CpuRows {  // q, k, v of one sequence, and rows like them in dqkv
    float* base;
    int64_t ld, heads, kv_heads, head_dim;
    CpuRows(Tensor t, const AttentionShape& s, int64_t b)
        : base(t.as<float>() + b * s.seq * t.ld), ld(t.ld), heads(s.heads), kv_heads(s.kv_heads), head_dim(s.head_dim) {}
    float* q(int64_t row, int64_t head) const { return base + row * ld + head * head_dim; }
    float* k(int64_t row, int64_t kv_head) const { return base + row * ld + (heads + kv_head) * head_dim; }
    float* v(int64_t row, int64_t kv_head) const { return base + row * ld + (heads + kv_heads + kv_head) * head_dim; }
};

inline float score_scale(const AttentionShape& s) { return 1.0f / std::sqrt(float(s.head_dim)); }

void forward_cpu(Tensor o, Tensor lse, Tensor qkv, const AttentionShape& s) {
    const float scale = score_scale(s);
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t h = 0; h < s.heads; ++h) {
            const CpuRows in(qkv, s, b);
            const int64_t kv = h / (s.heads / s.kv_heads);
            std::vector<float> p(s.seq);
            for (int64_t i = 0; i < s.seq; ++i) {
                const float* q = in.q(i, h);
                float max = -INFINITY, sum = 0;
                for (int64_t j = 0; j <= i; ++j) {
                    p[j] = scale * dot(q, in.k(j, kv), s.head_dim);
                    max = std::max(max, p[j]);
                }
                for (int64_t j = 0; j <= i; ++j) sum += p[j] = std::exp(p[j] - max);
                float* out = o.as<float>() + (b * s.seq + i) * o.ld + h * s.head_dim;
                std::fill_n(out, s.head_dim, 0.0f);
                for (int64_t j = 0; j <= i; ++j) add_scaled(out, p[j] / sum, in.v(j, kv), s.head_dim);
                lse.as<float>()[(b * s.heads + h) * s.seq + i] = max + std::log(sum);
            }
        }
}

// Parallel over (batch, kv head): all queries that add to one dK, dV are one thread's, in order.
void backward_cpu(Tensor dqkv, Tensor d_o, Tensor qkv, Tensor o, Tensor lse, Tensor row_sums, const AttentionShape& s) {
    const float scale = score_scale(s);
    const int64_t group = s.heads / s.kv_heads, d = s.head_dim;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t kv = 0; kv < s.kv_heads; ++kv) {
            const CpuRows in(qkv, s, b), out(dqkv, s, b);
            for (int64_t j = 0; j < s.seq; ++j) {
                std::fill_n(out.k(j, kv), d, 0.0f);
                std::fill_n(out.v(j, kv), d, 0.0f);
            }
            for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
                for (int64_t i = 0; i < s.seq; ++i) {
                    const float* d_out = d_o.as<float>() + (b * s.seq + i) * d_o.ld + h * d;
                    const int64_t at = (b * s.heads + h) * s.seq + i;
                    const float row_sum = row_sums.as<float>()[at] = dot(d_out, o.as<float>() + (b * s.seq + i) * o.ld + h * d, d);
                    const float row_lse = lse.as<float>()[at];
                    const float* q = in.q(i, h);
                    float* dq = out.q(i, h);
                    std::fill_n(dq, d, 0.0f);
                    for (int64_t j = 0; j <= i; ++j) {
                        const float p = std::exp(scale * dot(q, in.k(j, kv), d) - row_lse);
                        const float ds = scale * p * (dot(d_out, in.v(j, kv), d) - row_sum);
                        add_scaled(out.v(j, kv), p, d_out, d);
                        add_scaled(out.k(j, kv), ds, q, d);
                        add_scaled(dq, ds, in.k(j, kv), d);
                    }
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

// Attention backward on the GPU, without atomics: D = rowsum(dO∘O) first; then one kernel with a block per key tile for dK and dV
// (looping over the queries that see it) and one with a block per query tile for dQ (looping over the keys it sees). The scores
// are computed twice, seven products instead of five, which buys a fixed order of every sum.
//   P = exp(scale·Q·Kᵀ − LSE),  dV = Pᵀ·dO,  dP = dO·Vᵀ,  dS = P∘(dP − D),  dK = scale·dSᵀ·Q,  dQ = scale·dS·K
#pragma once
#include "ops/attention_tile.cuh"

namespace attention {

constexpr int kChunk = 32;  // columns of P and dS that a warp holds at a time

struct BackwardArgs {
    bf16* dqkv;
    int64_t ld_dqkv;
    const bf16* d_o;
    int64_t ld_d_o;
    const bf16* qkv;
    int64_t ld_qkv;
    const bf16* o;
    int64_t ld_o;
    const float* lse;
    float* row_sums;  // D, indexed like lse
    int batch, seq, heads, kv_heads;
    float scale;
    const float* rope;  // null: dq and dk are stored as they are
    int64_t ld_rope;
};

// Grid (x, batch); D/8 lanes per (token, head), 16 bytes each.
template <int D> __global__ void row_sums_kernel(BackwardArgs args) {
    constexpr int kLanes = D / 8;
    const unsigned item = (blockIdx.x * blockDim.x + threadIdx.x) / kLanes, token = item / args.heads, head = item % args.heads;
    const int lane = threadIdx.x % kLanes;
    if (token >= unsigned(args.seq)) return;  // a whole group leaves or stays
    const int64_t row = int64_t(blockIdx.y) * args.seq + token;
    uint4 a = *reinterpret_cast<const uint4*>(args.o + row * args.ld_o + head * D + lane * 8);
    uint4 b = *reinterpret_cast<const uint4*>(args.d_o + row * args.ld_d_o + head * D + lane * 8);
    const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)  // the two halves of each word
        sum += float_of_bits(x[i] << 16) * float_of_bits(y[i] << 16) + float_of_bits(x[i] & 0xffff0000u) * float_of_bits(y[i] & 0xffff0000u);
    const uint32_t group = ((1u << kLanes) - 1) << (threadIdx.x % 32 / kLanes * kLanes);
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(group, sum, offset);
    if (lane == 0) args.row_sums[(int64_t(blockIdx.y) * args.heads + head) * args.seq + token] = sum;
}

// The A operands of a warp's 16 rows of one tile: in registers for the whole kernel when D is 64, read again at each use when
// D is 128, where the accumulators need the registers.
template <int D> class OwnRows {
    static constexpr bool kResident = D == 64;
    uint32_t a_[kResident ? D / 16 : 1][4];

  public:
    __device__ __forceinline__ void load(const bf16* tile, const Lane& at) {
        if (kResident)
#pragma unroll
            for (int kk = 0; kk < D / 16; ++kk) load_a<D>(a_[kResident ? kk : 0], tile, 16 * at.warp, 16 * kk, at.lane);
    }
    __device__ __forceinline__ const uint32_t (&columns(const bf16* tile, int kk, const Lane& at))[4] {
        if (!kResident) load_a<D>(a_[0], tile, 16 * at.warp, 16 * kk, at.lane);
        return a_[kResident ? kk : 0];
    }
};

// x = A·Xᵀ and y = B·Yᵀ for the warp's 16 rows of A and B and rows row0 .. row0+31 of X and Y.
template <int D>
__device__ __forceinline__ void two_products(float (&x)[kChunk / 8][4], float (&y)[kChunk / 8][4], OwnRows<D>& a, const bf16* a_tile,
                                             OwnRows<D>& b, const bf16* b_tile, const bf16* x_tile, const bf16* y_tile, int row0,
                                             const Lane& at) {
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
        const uint32_t(&a_now)[4] = a.columns(a_tile, kk, at);
        const uint32_t(&b_now)[4] = b.columns(b_tile, kk, at);
#pragma unroll
        for (int n = 0; n < kChunk / 16; ++n) {
            uint32_t r[4];
            load_b_rows<D>(r, x_tile, row0 + 16 * n, 16 * kk, at.lane);
            mma_pair(&x[2 * n], a_now, r);
            load_b_rows<D>(r, y_tile, row0 + 16 * n, 16 * kk, at.lane);
            mma_pair(&y[2 * n], b_now, r);
        }
    }
}

// sum (16×D) += a (16×16) · rows row0 .. row0+15 of tile.
template <int D>
__device__ __forceinline__ void accumulate(float (&sum)[D / 8][4], const uint32_t (&a)[4], const bf16* tile, int row0, const Lane& at) {
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
        uint32_t b[4];
        load_b_cols<D>(b, tile, row0, 16 * n, at.lane);
        mma_pair(&sum[2 * n], a, b);
    }
}

// ---- dK, dV ----------------------------------------------------------------------------------------------------------------

// Shared memory of the key-tile kernel: k and v of the block, and two stages of what belongs to 64 queries.
template <int D> struct KeyTileShared {
    struct Stage {
        bf16 q[kTile * D], d_o[kTile * D];
        float lse[kTile], row_sums[kTile];
    };
    bf16 k[kTile * D], v[kTile * D];
    Stage stages[2];
};

// Adds the contribution of one query tile. Everything is transposed: the warp's rows are keys, the columns queries, so Pᵀ and dSᵀ
// come out of the first products as A operands of the second ones.
template <int D, bool Diagonal>
__device__ __forceinline__ void key_tile_step(float (&dk)[D / 8][4], float (&dv)[D / 8][4], OwnRows<D>& k, OwnRows<D>& v,
                                              const KeyTileShared<D>& shared, const typename KeyTileShared<D>::Stage& now,
                                              float scale_log2, const Lane& at) {
#pragma unroll(D == 64 ? 2 : 1)  // D 128 has no registers left for overlapping the two halves
    for (int query0 = 0; query0 < kTile; query0 += kChunk) {
        if (Diagonal && query0 + kChunk <= 16 * at.warp) continue;  // these queries come before all of the warp's keys
        float p[kChunk / 8][4] = {}, ds[kChunk / 8][4] = {};        // scores and dP to begin with
        two_products<D>(p, ds, k, shared.k, v, shared.v, now.q, now.d_o, query0, at);
#pragma unroll
        for (int n = 0; n < kChunk / 8; ++n) {
            const int query = query0 + 8 * n + 2 * at.t;
            const float2 lse = *reinterpret_cast<const float2*>(now.lse + query);
            const float2 sum = *reinterpret_cast<const float2*>(now.row_sums + query);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float lse_log2 = ((e & 1) ? lse.y : lse.x) * kLog2e;
                p[n][e] = exp2_approx(fmaf(p[n][e], scale_log2, -lse_log2));
                if (Diagonal && query + (e & 1) < 16 * at.warp + at.g + 8 * (e >> 1)) p[n][e] = 0;
                ds[n][e] = p[n][e] * (ds[n][e] - ((e & 1) ? sum.y : sum.x));
            }
        }
#pragma unroll
        for (int n = 0; n < kChunk / 16; ++n) {
            uint32_t a[4];
            accumulators_to_a(a, &p[2 * n]);
            accumulate<D>(dv, a, now.d_o, query0 + 16 * n, at);
            accumulators_to_a(a, &ds[2 * n]);
            accumulate<D>(dk, a, now.q, query0 + 16 * n, at);
        }
    }
}

// Grid (key tiles, kv heads, batch). The loop runs over the query heads of the group and, for each, the query tiles from the
// diagonal on. Rows past the sequence are zero in q, dO, LSE and D, so they add nothing.
template <int D> __global__ void __launch_bounds__(kThreads, D == 64 ? 3 : 2) key_tile_kernel(BackwardArgs args) {
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    auto& shared = *reinterpret_cast<KeyTileShared<D>*>(shared_bytes);

    const Lane at;
    const int key_tile = blockIdx.x, kv_head = blockIdx.y, row0 = key_tile * kTile, group = args.heads / args.kv_heads;
    const int64_t first_row = int64_t(blockIdx.z) * args.seq;
    const int64_t k_column = int64_t(args.heads + kv_head) * D, v_column = k_column + int64_t(args.kv_heads) * D;
    const bf16* rows = args.qkv + first_row * args.ld_qkv;

    const int tiles = gridDim.x - key_tile, steps = group * tiles;
    auto start_load = [&](int step) {
        auto& stage = shared.stages[step & 1];
        const int head = kv_head * group + step / tiles, query0 = (key_tile + step % tiles) * kTile;
        load_tile<D>(stage.q, {rows + head * D, args.ld_qkv}, query0, args.seq);
        load_tile<D>(stage.d_o, {args.d_o + first_row * args.ld_d_o + head * D, args.ld_d_o}, query0, args.seq);
        // Threads 0..63 fetch LSE, 64..127 D, one query each.
        const int i = threadIdx.x % kTile;
        const bool is_lse = threadIdx.x < kTile;
        const float* from = (is_lse ? args.lse : args.row_sums) + (int64_t(blockIdx.z) * args.heads + head) * args.seq;
        const bool inside = query0 + i < args.seq;
        copy4_async((is_lse ? stage.lse : stage.row_sums) + i, inside ? from + query0 + i : from, inside);
    };
    load_tile<D>(shared.k, {rows + k_column, args.ld_qkv}, row0, args.seq);
    load_tile<D>(shared.v, {rows + v_column, args.ld_qkv}, row0, args.seq);
    start_load(0);
    commit_copies();

    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    OwnRows<D> k, v;
    const float scale_log2 = args.scale * kLog2e;
    for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) start_load(step + 1);
        commit_copies();
        wait_copies<1>();
        __syncthreads();
        if (step == 0) k.load(shared.k, at), v.load(shared.v, at);
        const auto& now = shared.stages[step & 1];
        if (step % tiles) key_tile_step<D, false>(dk, dv, k, v, shared, now, scale_log2, at);
        else key_tile_step<D, true>(dk, dv, k, v, shared, now, scale_log2, at);
        __syncthreads();  // before this stage is overwritten
    }

    bf16* out = args.dqkv + first_row * args.ld_dqkv;
    const float one[2] = {1, 1}, scale[2] = {args.rope ? 1 : args.scale, args.rope ? 1 : args.scale};
    if (args.rope) rotate_back<D>(dk, args.scale, args.rope, args.ld_rope, row0, args.seq, at);
    store_rows<D>(shared.k, dk, scale, out + k_column, args.ld_dqkv, row0, args.seq, at);
    store_rows<D>(shared.v, dv, one, out + v_column, args.ld_dqkv, row0, args.seq, at);
}

// ---- dQ --------------------------------------------------------------------------------------------------------------------

template <int D> struct QueryTileShared {
    struct Stage {
        bf16 k[kTile * D], v[kTile * D];
    };
    bf16 q[kTile * D], d_o[kTile * D];
    Stage stages[2];
};

// Adds the contribution of one key tile to dQ. lse_log2 and row_sums belong to the lane's rows g and g+8.
template <int D, bool Diagonal>
__device__ __forceinline__ void query_tile_step(float (&dq)[D / 8][4], OwnRows<D>& q, OwnRows<D>& d_o, const QueryTileShared<D>& shared,
                                                const typename QueryTileShared<D>::Stage& now, const float (&lse_log2)[2],
                                                const float (&row_sums)[2], float scale_log2, const Lane& at) {
#pragma unroll
    for (int key0 = 0; key0 < kTile; key0 += kChunk) {
        if (Diagonal && key0 > 16 * at.warp + 15) continue;   // these keys come after all of the warp's queries
        float p[kChunk / 8][4] = {}, ds[kChunk / 8][4] = {};  // scores and dP to begin with
        two_products<D>(p, ds, q, shared.q, d_o, shared.d_o, now.k, now.v, key0, at);
#pragma unroll
        for (int n = 0; n < kChunk / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float weight = exp2_approx(fmaf(p[n][e], scale_log2, -lse_log2[e >> 1]));
                if (Diagonal && key0 + 8 * n + 2 * at.t + (e & 1) > 16 * at.warp + at.g + 8 * (e >> 1)) weight = 0;
                ds[n][e] = weight * (ds[n][e] - row_sums[e >> 1]);
            }
#pragma unroll
        for (int n = 0; n < kChunk / 16; ++n) {
            uint32_t a[4];
            accumulators_to_a(a, &ds[2 * n]);
            accumulate<D>(dq, a, now.k, key0 + 16 * n, at);
        }
    }
}

// Grid (query tiles, heads, batch).
template <int D> __global__ void __launch_bounds__(kThreads, D == 64 ? 3 : 2) query_tile_kernel(BackwardArgs args) {
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    auto& shared = *reinterpret_cast<QueryTileShared<D>*>(shared_bytes);

    const Lane at;
    const int query_tile = gridDim.x - 1 - blockIdx.x;  // the longest loops first
    const int head = blockIdx.y, kv_head = head / (args.heads / args.kv_heads), row0 = query_tile * kTile;
    const int64_t first_row = int64_t(blockIdx.z) * args.seq;
    const bf16* rows = args.qkv + first_row * args.ld_qkv;
    const Strided k{rows + (args.heads + kv_head) * D, args.ld_qkv}, v{rows + (args.heads + args.kv_heads + kv_head) * D, args.ld_qkv};

    auto start_load = [&](int tile) {
        load_tile<D>(shared.stages[tile & 1].k, k, tile * kTile, args.seq);
        load_tile<D>(shared.stages[tile & 1].v, v, tile * kTile, args.seq);
    };
    load_tile<D>(shared.q, {rows + head * D, args.ld_qkv}, row0, args.seq);
    load_tile<D>(shared.d_o, {args.d_o + first_row * args.ld_d_o + head * D, args.ld_d_o}, row0, args.seq);
    start_load(0);
    commit_copies();

    float lse_log2[2], row_sums[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row0 + 16 * at.warp + at.g + 8 * half;
        const int64_t i = (int64_t(blockIdx.z) * args.heads + head) * args.seq + row;
        lse_log2[half] = row < args.seq ? args.lse[i] * kLog2e : 0;
        row_sums[half] = row < args.seq ? args.row_sums[i] : 0;
    }

    float dq[D / 8][4] = {};
    OwnRows<D> q, d_o;
    const float scale_log2 = args.scale * kLog2e;
    for (int tile = 0; tile <= query_tile; ++tile) {
        if (tile < query_tile) start_load(tile + 1);
        commit_copies();
        wait_copies<1>();
        __syncthreads();
        if (tile == 0) q.load(shared.q, at), d_o.load(shared.d_o, at);
        const auto& now = shared.stages[tile & 1];
        if (tile < query_tile) query_tile_step<D, false>(dq, q, d_o, shared, now, lse_log2, row_sums, scale_log2, at);
        else query_tile_step<D, true>(dq, q, d_o, shared, now, lse_log2, row_sums, scale_log2, at);
        __syncthreads();  // before this stage is overwritten
    }

    const float scale[2] = {args.rope ? 1 : args.scale, args.rope ? 1 : args.scale};
    if (args.rope) rotate_back<D>(dq, args.scale, args.rope, args.ld_rope, row0, args.seq, at);
    store_rows<D>(shared.q, dq, scale, args.dqkv + first_row * args.ld_dqkv + head * D, args.ld_dqkv, row0, args.seq, at);
}

template <int D> void launch_backward(const BackwardArgs& args, cudaStream_t stream) {
    constexpr int kRowSumThreads = 256;
    const unsigned tiles = unsigned(ceil_div(args.seq, kTile)), lanes = unsigned(args.seq) * args.heads * (D / 8);
    row_sums_kernel<D><<<dim3(unsigned(ceil_div(lanes, kRowSumThreads)), args.batch), kRowSumThreads, 0, stream>>>(args);
    LAUNCH_CHECK();
    launch(key_tile_kernel<D>, dim3(tiles, args.kv_heads, args.batch), int(sizeof(KeyTileShared<D>)), stream, args);
    launch(query_tile_kernel<D>, dim3(tiles, args.heads, args.batch), int(sizeof(QueryTileShared<D>)), stream, args);
}

}  // namespace attention

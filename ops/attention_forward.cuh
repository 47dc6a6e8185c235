// Attention forward on the GPU: a block of four warps per tile of queries of one head, looping over the key tiles up to its diagonal. A
// warp has 32 (or 16) queries, so that what it reads of a key tile serves twice as many products.
#pragma once
#include "ops/attention_tile.cuh"

namespace attention {

struct ForwardArgs {
    const bf16* qkv;
    int ld_qkv;
    bf16* o;
    int ld_o;
    float* lse;
    int seq, heads, kv_heads;
    float scale;
};

// RowBlocks: of 16 queries, per warp.
template <int D, int RowBlocks> struct ForwardTile {
    static constexpr int kKeys = 64, kWarps = 4, kThreads = 32 * kWarps, kWarpQueries = 16 * RowBlocks, kQueries = kWarps * kWarpQueries;
    // Whether the A operands of q stay in registers, which a head of 128 has none left for.
    static constexpr bool kResidentQ = D == 64;

    bf16 q[kQueries * D];
    struct Stage {
        bf16 k[kKeys * D], v[kKeys * D];
    } stages[2];
};

// The running softmax of a warp's queries; each lane holds its share of rows g and g+8 of every block of 16.
template <int D, int RowBlocks> struct OnlineSoftmax {
    float o[RowBlocks][D / 8][4] = {};
    float max[RowBlocks][2];       // of scale·log2(e)·score, so that 2^(… − max) is the weight
    float sum[RowBlocks][2] = {};  // this lane's columns only; summed over the four lanes of a row at the end
};

template <int D, int RowBlocks> using QueryOperands = uint32_t[RowBlocks][ForwardTile<D, RowBlocks>::kResidentQ ? D / 16 : 1][4];

// Folds one tile of keys into the state. diagonal: the warp's first query minus the tile's first key; key j is hidden from query i
// where j > i + diagonal (positions within the warp and the tile).
template <int D, int RowBlocks>
__device__ __forceinline__ void forward_step(OnlineSoftmax<D, RowBlocks>& state, const QueryOperands<D, RowBlocks>& q,
                                             uint32_t q_at, uint32_t k_at, uint32_t v_at, float scale_log2, int diagonal, const Lane& at) {
    constexpr int kKeys = ForwardTile<D, RowBlocks>::kKeys;
    constexpr bool kResidentQ = ForwardTile<D, RowBlocks>::kResidentQ;
    float s[RowBlocks][kKeys / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
        uint32_t a[RowBlocks][4];
#pragma unroll
        for (int r = 0; r < RowBlocks; ++r) {
            if (kResidentQ)
                for (int i = 0; i < 4; ++i) a[r][i] = q[r][kResidentQ ? kk : 0][i];
            else
                ldmatrix(a[r], (q_at ^ column(16 * kk)) + row<D>(16 * r));
        }
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
            uint32_t b[4];
            ldmatrix(b, (k_at ^ column(16 * kk)) + row<D>(16 * n));
#pragma unroll
            for (int r = 0; r < RowBlocks; ++r) mma_pair(&s[r][2 * n], a[r], b);
        }
    }
    if (diagonal < kKeys - 1) {
#pragma unroll
        for (int r = 0; r < RowBlocks; ++r)
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    if (8 * n + 2 * at.t + (e & 1) > diagonal + 16 * r + at.g + 8 * (e >> 1)) s[r][n][e] = -INFINITY;
    }
#pragma unroll
    for (int r = 0; r < RowBlocks; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float m = -INFINITY;
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n) m = fmaxf(m, fmaxf(s[r][n][2 * half], s[r][n][2 * half + 1]));
            m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
            m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
            // The first tile holds key 0, which every query sees: the maximum is finite from here on.
            float max = fmaxf(state.max[r][half], m * scale_log2), rescale = exp2_approx(state.max[r][half] - max), sum = 0;
            state.max[r][half] = max;
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; ++e) {
                    s[r][n][e] = exp2_approx(fmaf(s[r][n][e], scale_log2, -max));
                    sum += s[r][n][e];
                }
            state.sum[r][half] = state.sum[r][half] * rescale + sum;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) state.o[r][n][2 * half] *= rescale, state.o[r][n][2 * half + 1] *= rescale;
        }
#pragma unroll
    for (int kk = 0; kk < kKeys / 16; ++kk) {
        uint32_t p[RowBlocks][4];
#pragma unroll
        for (int r = 0; r < RowBlocks; ++r) accumulators_to_a(p[r], &s[r][2 * kk]);
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            uint32_t b[4];
            ldmatrix_transposed(b, (v_at ^ column(16 * n)) + row<D>(16 * kk));
#pragma unroll
            for (int r = 0; r < RowBlocks; ++r) mma_pair(&state.o[r][2 * n], p[r], b);
        }
    }
}

// Grid (query tiles, heads, batch).
template <int D, int RowBlocks>
__global__ void __launch_bounds__(ForwardTile<D, RowBlocks>::kThreads, RowBlocks == 1 ? 4 : 2) forward_kernel(ForwardArgs args) {
    using Tile = ForwardTile<D, RowBlocks>;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    auto& shared = *reinterpret_cast<Tile*>(shared_bytes);

    const Lane at;
    const int query_tile = gridDim.x - 1 - blockIdx.x;  // the longest loops first
    const int head = blockIdx.y, kv_head = head / (args.heads / args.kv_heads), row0 = query_tile * Tile::kQueries;
    const bf16* rows = args.qkv + int64_t(blockIdx.z) * args.seq * args.ld_qkv;
    const Strided k{rows + (args.heads + kv_head) * D, args.ld_qkv}, v{rows + (args.heads + args.kv_heads + kv_head) * D, args.ld_qkv};

    auto start_load = [&](int tile) {
        load_tile<D, Tile::kKeys, Tile::kThreads>(shared.stages[tile & 1].k, k, tile * Tile::kKeys, args.seq);
        load_tile<D, Tile::kKeys, Tile::kThreads>(shared.stages[tile & 1].v, v, tile * Tile::kKeys, args.seq);
    };
    load_tile<D, Tile::kQueries, Tile::kThreads>(shared.q, {rows + head * D, args.ld_qkv}, row0, args.seq);
    start_load(0);
    commit_copies();

    const uint32_t stage0 = shared_address(&shared.stages[0]), k_offset = keep(by_rows<D>(at.lane));
    const uint32_t v_offset = keep(row<D>(Tile::kKeys) + by_columns<D>(at.lane));
    const uint32_t q_at = keep(shared_address(shared.q) + by_columns<D>(at.lane) + row<D>(at.warp * Tile::kWarpQueries));
    OnlineSoftmax<D, RowBlocks> state;
#pragma unroll
    for (int r = 0; r < RowBlocks; ++r) state.max[r][0] = state.max[r][1] = -INFINITY;
    QueryOperands<D, RowBlocks> q;
    const float scale_log2 = args.scale * kLog2e;
    const int first_query = row0 + at.warp * Tile::kWarpQueries;
    const int tiles = (min(row0 + Tile::kQueries, args.seq) - 1) / Tile::kKeys + 1;
    for (int tile = 0; tile < tiles; ++tile) {
        wait_copies<0>();
        __syncthreads();  // this stage has arrived, and nobody reads the other one any more
        if (tile + 1 < tiles) start_load(tile + 1);
        commit_copies();
        if (Tile::kResidentQ && tile == 0) {
#pragma unroll
            for (int r = 0; r < RowBlocks; ++r)
#pragma unroll
                for (int kk = 0; kk < D / 16; ++kk) ldmatrix(q[r][Tile::kResidentQ ? kk : 0], (q_at ^ column(16 * kk)) + row<D>(16 * r));
        }
        if (tile * Tile::kKeys >= first_query + Tile::kWarpQueries) continue;  // every key comes after the warp's queries
        const uint32_t stage = stage0 + (tile & 1) * uint32_t(sizeof(typename Tile::Stage));
        forward_step<D, RowBlocks>(state, q, q_at, stage + k_offset, stage + v_offset, scale_log2, first_query - tile * Tile::kKeys, at);
    }

    bf16* o = args.o + int64_t(blockIdx.z) * args.seq * args.ld_o + head * D;
#pragma unroll
    for (int r = 0; r < RowBlocks; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = state.sum[r][half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const float inverse = 1.0f / sum;
            const int row = first_query + 16 * r + at.g + 8 * half;
            const bool inside = row < args.seq;
            if (at.t == 0 && inside)
                args.lse[(int64_t(blockIdx.z) * args.heads + head) * args.seq + row] = state.max[r][half] * kLn2 + logf(sum);
#pragma unroll
            for (int n = 0; n < D / 8; n += 2)
                store_16_columns(o + int64_t(row) * args.ld_o + 8 * n,
                                 pack_bf16(state.o[r][n][2 * half] * inverse, state.o[r][n][2 * half + 1] * inverse),
                                 pack_bf16(state.o[r][n + 1][2 * half] * inverse, state.o[r][n + 1][2 * half + 1] * inverse), inside, at);
        }
}

template <int D, int RowBlocks> void launch_forward(const ForwardArgs& args, int batch, cudaStream_t stream) {
    using Tile = ForwardTile<D, RowBlocks>;
    allow_shared(forward_kernel<D, RowBlocks>, sizeof(Tile));
    forward_kernel<D, RowBlocks><<<dim3(tiles_of(args.seq, Tile::kQueries), args.heads, batch), Tile::kThreads, sizeof(Tile), stream>>>(args);
    LAUNCH_CHECK();
}

}  // namespace attention

// Attention forward on the GPU: one block per 64 queries of one head, looping over the key tiles up to its diagonal.
#pragma once
#include "ops/attention_tile.cuh"

namespace attention {

struct ForwardArgs {
    const bf16* qkv;
    int64_t ld_qkv;
    bf16* o;
    int64_t ld_o;
    float* lse;
    int seq, heads, kv_heads;
    float scale;
};

// The running softmax of a warp's 16 rows; each lane holds its share of rows g and g+8.
template <int D> struct OnlineSoftmax {
    float o[D / 8][4] = {};
    float max[2] = {-INFINITY, -INFINITY};  // of scale·log2(e)·score, so that 2^(… − max) is the weight
    float sum[2] = {0, 0};                  // this lane's columns only; summed over the four lanes of a row at the end
};

// Folds one tile of 64 keys into the state. In a diagonal tile key j is hidden from query i < j (positions within the tile).
template <int D, bool Diagonal>
__device__ __forceinline__ void forward_step(OnlineSoftmax<D>& state, const uint32_t (&q)[D / 16][4], const bf16* k, const bf16* v,
                                             float scale_log2, const Lane& at) {
    float s[kTile / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk)
#pragma unroll
        for (int n = 0; n < kTile / 16; ++n) {
            if (Diagonal && n > at.warp) continue;
            uint32_t b[4];
            load_b_rows<D>(b, k, 16 * n, 16 * kk, at.lane);
            mma_pair(&s[2 * n], q[kk], b);
        }
    if (Diagonal) {
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (8 * n + 2 * at.t + (e & 1) > 16 * at.warp + at.g + 8 * (e >> 1)) s[n][e] = -INFINITY;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float m = -INFINITY;
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) m = fmaxf(m, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
        // The first tile holds key 0, which every query sees: the maximum is finite from here on.
        float max = fmaxf(state.max[half], m * scale_log2), rescale = exp2_approx(state.max[half] - max), sum = 0;
        state.max[half] = max;
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
                s[n][e] = exp2_approx(fmaf(s[n][e], scale_log2, -max));
                sum += s[n][e];
            }
        state.sum[half] = state.sum[half] * rescale + sum;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) state.o[n][2 * half] *= rescale, state.o[n][2 * half + 1] *= rescale;
    }
#pragma unroll
    for (int kk = 0; kk < kTile / 16; ++kk) {
        if (Diagonal && kk > at.warp) continue;
        uint32_t p[4];
        accumulators_to_a(p, &s[2 * kk]);
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            uint32_t b[4];
            load_b_cols<D>(b, v, 16 * kk, 16 * n, at.lane);
            mma_pair(&state.o[2 * n], p, b);
        }
    }
}

template <int D> constexpr int forward_shared_bytes() { return 5 * tile_bytes<D>(); }

// Grid (query tiles, heads, batch). Shared memory: q, then two stages of k and v.
template <int D> __global__ void __launch_bounds__(kThreads, D == 64 ? 4 : 2) forward_kernel(ForwardArgs args) {
    extern __shared__ __align__(128) unsigned char shared[];
    bf16* q_tile = reinterpret_cast<bf16*>(shared);
    bf16* k_tiles = q_tile + kTile * D;
    bf16* v_tiles = k_tiles + 2 * kTile * D;

    const Lane at;
    const int query_tile = gridDim.x - 1 - blockIdx.x;  // the longest loops first
    const int head = blockIdx.y, kv_head = head / (args.heads / args.kv_heads), row0 = query_tile * kTile;
    const bf16* rows = args.qkv + int64_t(blockIdx.z) * args.seq * args.ld_qkv;
    const bf16* k = rows + (args.heads + kv_head) * D;
    const int k_to_v = args.kv_heads * D;

    auto start_load = [&](int tile) {
        load_tile<D>(k_tiles + (tile & 1) * kTile * D, {k, args.ld_qkv}, tile * kTile, args.seq);
        load_tile<D>(v_tiles + (tile & 1) * kTile * D, {k + k_to_v, args.ld_qkv}, tile * kTile, args.seq);
    };
    load_tile<D>(q_tile, {rows + head * D, args.ld_qkv}, row0, args.seq);
    start_load(0);
    commit_copies();

    OnlineSoftmax<D> state;
    uint32_t q_fragments[D / 16][4];
    const float scale_log2 = args.scale * kLog2e;
    for (int tile = 0; tile <= query_tile; ++tile) {
        if (tile < query_tile) start_load(tile + 1);
        commit_copies();
        wait_copies<1>();
        __syncthreads();
        if (tile == 0) {
#pragma unroll
            for (int kk = 0; kk < D / 16; ++kk) load_a<D>(q_fragments[kk], q_tile, 16 * at.warp, 16 * kk, at.lane);
        }
        const bf16 *k_now = k_tiles + (tile & 1) * kTile * D, *v_now = v_tiles + (tile & 1) * kTile * D;
        if (tile < query_tile) forward_step<D, false>(state, q_fragments, k_now, v_now, scale_log2, at);
        else forward_step<D, true>(state, q_fragments, k_now, v_now, scale_log2, at);
        __syncthreads();  // before this stage is overwritten
    }

    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = state.sum[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        inverse[half] = 1.0f / sum;
        int row = row0 + 16 * at.warp + at.g + 8 * half;
        if (at.t == 0 && row < args.seq)
            args.lse[(int64_t(blockIdx.z) * args.heads + head) * args.seq + row] = state.max[half] * kLn2 + logf(sum);
    }
    bf16* o = args.o + int64_t(blockIdx.z) * args.seq * args.ld_o + head * D;
    store_rows<D>(q_tile, state.o, inverse, o, args.ld_o, row0, args.seq, at);
}

template <int D> void launch_forward(const ForwardArgs& args, int batch, cudaStream_t stream) {
    dim3 grid(ceil_div(args.seq, kTile), args.heads, batch);
    launch(forward_kernel<D>, grid, forward_shared_bytes<D>(), stream, args);
}

}  // namespace attention

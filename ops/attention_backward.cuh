// Attention backward on the GPU: five products per tile of scores, and no float atomics. A block owns 128 keys of one head: their dK and
// dV are its registers, the queries that see them pass by in tiles. dQ is a sum over blocks: each adds its part to an fp32 partial sum in
// scratch memory when its turn comes, from a query's own (diagonal) key tile down to tile 0, which stores the finished dQ. A counter per
// 128 queries says whose turn it is. So every sum has one order, whatever the GPU. Blocks are numbered so that one waits only for blocks
// that started before it; and as each walks from its diagonal outwards, its turn has mostly come when it gets there.
//   P = exp(scale·Q·Kᵀ − LSE),  dV = Pᵀ·dO,  dP = dO·Vᵀ,  dS = P∘(dP − D),  dK = scale·dSᵀ·Q,  dQ = scale·dS·K,  D = rowsum(dO∘O)
#pragma once
#include "ops/attention_tile.cuh"

namespace attention {

struct BackwardArgs {
    bf16* dqkv;
    int ld_dqkv;
    const bf16* d_o;
    int ld_d_o;
    const bf16* qkv;
    int ld_qkv;
    const bf16* o;
    int ld_o;
    const float* lse;
    float* row_sums;  // D, indexed like lse
    float* partial_dq;
    unsigned *turns, *started;  // counters, zero to begin with: whose turn it is, how many blocks have started
    int slots;                  // key heads that partial_dq has room for
    int batch, seq, heads, kv_heads;
    int group;  // heads / kv_heads
    float scale;
    const float* rope;  // null: dq and dk are stored as they are
    int ld_rope;
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

// The shape of a block. Its warps own 16·kRowBlocks keys each; dK and dV take 128 registers of a thread.
template <int D> struct BackwardTile {
    static constexpr int kKeys = 128, kQueries = 4096 / D, kWarps = D / 16, kThreads = 32 * kWarps, kRowBlocks = 128 / D;
    static constexpr int kRowStep = kKeys / kRowBlocks;  // from a warp's 16 keys to its next: so every warp has its share of the diagonal
    static constexpr int kChunk = D / 4;  // queries whose P and dS a warp holds at a time

    struct Stage {
        bf16 q[kQueries * D], d_o[kQueries * D];
        float lse[kQueries], row_sums[kQueries];
    };
    bf16 k[kKeys * D];
    Stage stages[2];
    bf16 ds[2][kKeys * kQueries];  // dSᵀ, of this step and the last

    // v is needed only until it is in registers, the block's number only at the start: both before the second stage and ds are. Four bytes
    // of their own would cost a head of 64 its second block on an A100.
    __device__ bf16* v() { return stages[1].q; }
    __device__ int& number() { return reinterpret_cast<int*>(ds + 2)[-1]; }
    static_assert(sizeof(Stage) + sizeof ds >= sizeof k + sizeof(int), "room for v and the number");
};

// What a block works on: one key tile of one key head.
struct KeyTile {
    int batch, kv_head, slot, tile, epoch;  // epoch: how many heads used the slot of partial_dq before
};

__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
    unsigned x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(x) : "l"(p) : "memory");
    return x;
}
__device__ __forceinline__ float2 load_shared(uint32_t address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];\n" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
    asm volatile("st.shared.u32 [%0], %1;\n" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void store_release(unsigned* p, unsigned x) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;\n" ::"l"(p), "r"(x) : "memory");
}

// One warp's share of a query tile's dQ: 16·kRowBlocks rows by 32 columns, 16 in each half of the head, so that the pairs which the
// rotary embedding turns are in one lane. All blocks cut the tile alike: a warp continues what the same warp of another block began.
// Turns are per warp and 128 queries.
template <int D> class PartialDq {
    using Tile = BackwardTile<D>;
    static constexpr int kRowBlocks = Tile::kRowBlocks, kColumnGroups = D / 32;

    const BackwardArgs& args_;
    const KeyTile& key_;
    const Lane& at_;
    const int row0_, col0_;
    const uint32_t ds_offset_, k_at_;
    int head_;        // within the group
    float* memory_;   // of the head's first query tile
    unsigned* turns_;
    float sum_[kRowBlocks][4][4];

    __device__ __forceinline__ unsigned my_turn(int diagonal) const { return key_.epoch * (diagonal + 1) + diagonal - key_.tile; }

  public:
    __device__ __forceinline__ PartialDq(const BackwardArgs& args, const KeyTile& key, const Lane& at, uint32_t k)
        : args_(args), key_(key), at_(at), row0_(at.warp / kColumnGroups * 16 * kRowBlocks), col0_(at.warp % kColumnGroups * 16),
          ds_offset_(keep(by_rows<Tile::kQueries>(at.lane) ^ column(row0_))), k_at_(keep(k + (by_columns<D>(at.lane) ^ column(col0_)))) {}
    __device__ __forceinline__ void set_head(int head) {
        head_ = head;
        const int64_t index = key_.slot * args_.group + head;
        memory_ = args_.partial_dq + index * tiles_of(args_.seq, Tile::kQueries) * (Tile::kQueries * D) + at_.warp * (kRowBlocks * 16 * 32) + at_.lane * 4;
        turns_ = args_.turns + index * tiles_of(args_.seq, Tile::kKeys) * Tile::kWarps + at_.warp;
    }
    // Waits for this key tile's turn at query tile `tile` and fetches the sum so far.
    __device__ __forceinline__ void begin(int tile) {
        const int diagonal = tile * Tile::kQueries / Tile::kKeys;
        if (tile * Tile::kQueries % Tile::kKeys == 0) {
            while (load_acquire(turns_ + diagonal * Tile::kWarps) != my_turn(diagonal)) {}
            __syncwarp();
        }
        const float* from = memory_ + int64_t(tile) * (Tile::kQueries * D);
#pragma unroll
        for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                float4 x = {0, 0, 0, 0};
                if (key_.tile != diagonal) x = __ldcg(reinterpret_cast<const float4*>(from + (r * 4 + n) * 128));
                sum_[r][n][0] = x.x, sum_[r][n][1] = x.y, sum_[r][n][2] = x.z, sum_[r][n][3] = x.w;
            }
    }
    // += dS·K. ds: address of dSᵀ of the block's keys and the tile's queries.
    __device__ __forceinline__ void add(int tile, uint32_t ds) {
        const int keys = min(Tile::kKeys, tile * Tile::kQueries + row0_ + 16 * kRowBlocks - key_.tile * Tile::kKeys);  // that the rows see
        uint32_t a_at = ds + ds_offset_, b_at = k_at_;
#pragma unroll 4
        for (int kk = 0; kk < keys / 16; ++kk) {
            uint32_t a[kRowBlocks][4], b[2][4];
#pragma unroll
            for (int r = 0; r < kRowBlocks; ++r) ldmatrix_transposed(a[r], a_at ^ column(16 * r));
#pragma unroll
            for (int half = 0; half < 2; ++half) ldmatrix_transposed(b[half], b_at ^ column(half * (D / 2)));
#pragma unroll
            for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
                for (int half = 0; half < 2; ++half) mma_pair(&sum_[r][2 * half], a[r], b[half]);
            a_at += row<Tile::kQueries>(16), b_at += row<D>(16);
        }
    }
    // Leaves the sum to the next key tile, or stores the finished rows.
    __device__ __forceinline__ void end(int tile) {
        if (key_.tile > 0) {
            float* to = memory_ + int64_t(tile) * (Tile::kQueries * D);
#pragma unroll
            for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
                for (int n = 0; n < 4; ++n)
                    __stcg(reinterpret_cast<float4*>(to + (r * 4 + n) * 128),
                           make_float4(sum_[r][n][0], sum_[r][n][1], sum_[r][n][2], sum_[r][n][3]));
        } else {
            bf16* out = args_.dqkv + int64_t(key_.batch) * args_.seq * args_.ld_dqkv + (key_.kv_head * args_.group + head_) * D + col0_;
#pragma unroll
            for (int r = 0; r < kRowBlocks; ++r)
                store_gradient<2>(sum_[r], args_.scale, args_.rope ? args_.rope + col0_ : nullptr, args_.ld_rope, out, args_.ld_dqkv, D / 2,
                                  tile * Tile::kQueries + row0_ + 16 * r, args_.seq, at_);
        }
    }
    // After the last query tile of 128 queries: their turn goes to the next key tile.
    __device__ __forceinline__ void pass_turn(int tile) {
        const int end = (tile + 1) * Tile::kQueries, diagonal = tile * Tile::kQueries / Tile::kKeys;
        if (end % Tile::kKeys != 0 && end < args_.seq) return;
        __syncwarp();
        if (at_.lane == 0) store_release(turns_ + diagonal * Tile::kWarps, my_turn(diagonal) + 1);
    }
};

// A warp's keys: their dK and dV, and where its lanes find things. V's A operands stay in registers; K's are read again at each use.
template <int D> struct KeyWarp {
    static constexpr int kRowBlocks = BackwardTile<D>::kRowBlocks;
    float dk[kRowBlocks][D / 8][4] = {}, dv[kRowBlocks][D / 8][4] = {};
    uint32_t v[kRowBlocks][D / 16][4];
    int key0;                      // the warp's first key in the tile
    uint32_t by_rows, by_columns;  // offsets within a tile of queries
    uint32_t k_at;                 // address of the warp's keys
    uint32_t ds_offset, t_offset;  // of the warp's part of dSᵀ; of the lane's queries in LSE and D

    __device__ __forceinline__ KeyWarp(const Lane& at, uint32_t k) {
        key0 = int(keep(16 * at.warp));
        by_rows = keep(attention::by_rows<D>(at.lane)), by_columns = keep(attention::by_columns<D>(at.lane));
        k_at = keep(k + by_columns + row<D>(key0));
        ds_offset = keep(by_pairs<BackwardTile<D>::kQueries>(at) + row<BackwardTile<D>::kQueries>(key0)), t_offset = keep(8 * at.t);
    }
};

// Zeros for the dS of row block r and one chunk of queries, all of which come before the keys.
template <int D> __device__ __forceinline__ void clear_ds(const KeyWarp<D>& warp, uint32_t ds, int chunk, int r) {
    using Tile = BackwardTile<D>;
#pragma unroll
    for (int i = 0; i < Tile::kChunk / 4; ++i)
        store_shared(((ds + warp.ds_offset) ^ column(chunk + 8 * (i >> 1))) + row<Tile::kQueries>(Tile::kRowStep * r + 8 * (i & 1)), 0);
}

// Adds the contribution of one chunk of queries to dK and dV of the warp's first Blocks row blocks and leaves dSᵀ in `ds`. Everything is
// transposed: the warp's rows are keys, the columns queries, so Pᵀ and dSᵀ come out of the first products as A operands of the second
// ones. stage, ds: addresses. query0: the tile's first query, counted from the key tile's first key.
template <int D, int Blocks, bool Diagonal>
__device__ __forceinline__ void key_tile_chunk(KeyWarp<D>& warp, uint32_t stage, uint32_t ds, int query0, int chunk, float scale_log2, const Lane& at) {
    using Tile = BackwardTile<D>;
    constexpr int kQueries = Tile::kQueries, kChunk = Tile::kChunk, kBlocks = kChunk / 16;
    constexpr uint32_t kDo = kQueries * D * 2, kLse = 2 * kDo, kRowSums = kLse + kQueries * 4;
    const uint32_t rows_at = stage + warp.by_rows + row<D>(chunk), columns_at = stage + warp.by_columns + row<D>(chunk);
    float p[Blocks][2 * kBlocks][4] = {}, dp[Blocks][2 * kBlocks][4] = {};
    uint32_t q[2][kBlocks][4], d_o[2][kBlocks][4], a[2][Blocks][4];  // operands are loaded one step ahead of their products
    auto load = [&](int kk) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) ldmatrix(q[kk & 1][n], (rows_at ^ column(16 * kk)) + row<D>(16 * n));
#pragma unroll
        for (int r = 0; r < Blocks; ++r) ldmatrix(a[kk & 1][r], (warp.k_at ^ column(16 * kk)) + row<D>(Tile::kRowStep * r));
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) ldmatrix(d_o[kk & 1][n], (rows_at ^ column(16 * kk)) + kDo + row<D>(16 * n));
    };
    load(0);
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
        if (kk + 1 < D / 16) load(kk + 1);
#pragma unroll
        for (int n = 0; n < kBlocks; ++n)
#pragma unroll
            for (int r = 0; r < Blocks; ++r) mma_pair(&p[r][2 * n], a[kk & 1][r], q[kk & 1][n]);
#pragma unroll
        for (int n = 0; n < kBlocks; ++n)
#pragma unroll
            for (int r = 0; r < Blocks; ++r) mma_pair(&dp[r][2 * n], warp.v[r][kk], d_o[kk & 1][n]);
    }
    if (Diagonal) {
#pragma unroll
        for (int r = 0; r < Blocks; ++r)
#pragma unroll
            for (int n = 0; n < 2 * kBlocks; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    if (query0 + chunk + 8 * n + 2 * at.t + (e & 1) < warp.key0 + Tile::kRowStep * r + at.g + 8 * (e >> 1)) p[r][n][e] = -INFINITY;
    }
#pragma unroll
    for (int n = 0; n < 2 * kBlocks; ++n) {
        const uint32_t query = stage + (chunk + 8 * n) * 4 + warp.t_offset;
        const float2 lse = load_shared(query + kLse), sum = load_shared(query + kRowSums);
#pragma unroll
        for (int r = 0; r < Blocks; ++r)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                p[r][n][e] = exp2_approx(fmaf(p[r][n][e], scale_log2, -kLog2e * ((e & 1) ? lse.y : lse.x)));
                dp[r][n][e] = p[r][n][e] * (dp[r][n][e] - ((e & 1) ? sum.y : sum.x));
            }
    }
    uint32_t p_a[Blocks][kBlocks][4], ds_a[Blocks][kBlocks][4];
#pragma unroll
    for (int r = 0; r < Blocks; ++r)
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
            accumulators_to_a(p_a[r][n], &p[r][2 * n]);
            accumulators_to_a(ds_a[r][n], &dp[r][2 * n]);
#pragma unroll
            for (int i = 0; i < 4; ++i)  // i: rows g and g+8, then the same of the next eight queries
                store_shared(((ds + warp.ds_offset) ^ column(chunk + 16 * n + 8 * (i >> 1))) + row<kQueries>(Tile::kRowStep * r + 8 * (i & 1)),
                             ds_a[r][n][i]);
        }
    uint32_t b[2][2][4];  // of dO and Q
    auto load_columns = [&](int block, int n) {
        const uint32_t from = (columns_at ^ column(16 * n)) + row<D>(16 * block);
        ldmatrix_transposed(b[n & 1][0], from + kDo);
        ldmatrix_transposed(b[n & 1][1], from);
    };
    load_columns(0, 0);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            if (n + 1 < D / 16) load_columns(block, n + 1);
            else if (block + 1 < kBlocks) load_columns(block + 1, 0);
#pragma unroll
            for (int r = 0; r < Blocks; ++r) mma_pair(&warp.dv[r][2 * n], p_a[r][block], b[n & 1][0]);
#pragma unroll
            for (int r = 0; r < Blocks; ++r) mma_pair(&warp.dk[r][2 * n], ds_a[r][block], b[n & 1][1]);
        }
}

// All chunks of one query tile. On the diagonal row blocks whose keys all come after the queries are left out.
template <int D, bool Diagonal>
__device__ __forceinline__ void key_tile_step(KeyWarp<D>& warp, uint32_t stage, uint32_t ds, int query0, float scale_log2, const Lane& at) {
    using Tile = BackwardTile<D>;
#pragma unroll 1
    for (int chunk = 0; chunk < Tile::kQueries; chunk += Tile::kChunk) {
        const int last = query0 + chunk + Tile::kChunk - 1;
        if (Diagonal && last < warp.key0) {
            if (Tile::kRowBlocks == 2) clear_ds<D>(warp, ds, chunk, 0);
        } else if (Diagonal && Tile::kRowBlocks == 2 && last < warp.key0 + Tile::kRowStep) {
            key_tile_chunk<D, 1, true>(warp, stage, ds, query0, chunk, scale_log2, at);
            clear_ds<D>(warp, ds, chunk, 1);
        } else {
            key_tile_chunk<D, Tile::kRowBlocks, Diagonal>(warp, stage, ds, query0, chunk, scale_log2, at);
        }
    }
}

// Rows past the sequence are zero in q, dO, LSE and D, so they add nothing.
template <int D> __device__ __forceinline__ void do_key_tile(const BackwardArgs& args, BackwardTile<D>& shared, const KeyTile& key) {
    using Tile = BackwardTile<D>;
    constexpr int kRowBlocks = Tile::kRowBlocks, kQueries = Tile::kQueries, kThreads = Tile::kThreads;
    const Lane at;
    const int key0 = key.tile * Tile::kKeys, first = key0 / kQueries, tiles = tiles_of(args.seq, kQueries);
    const int64_t first_row = int64_t(key.batch) * args.seq;
    const int k_column = (args.heads + key.kv_head) * D, v_column = k_column + args.kv_heads * D;
    const bf16* rows = args.qkv + first_row * args.ld_qkv;
    const uint32_t k = shared_address(shared.k), stage0 = shared_address(&shared.stages[0]), ds0 = shared_address(shared.ds);
    load_tile<D, Tile::kKeys, kThreads>(shared.k, {rows + k_column, args.ld_qkv}, key0, args.seq);
    load_tile<D, Tile::kKeys, kThreads>(shared.v(), {rows + v_column, args.ld_qkv}, key0, args.seq);

    KeyWarp<D> warp(at, k);
    PartialDq<D> dq(args, key, at, k);
    const float scale_log2 = args.scale * kLog2e;
    for (int head_of_group = 0; head_of_group < args.group; ++head_of_group) {
        const int head = key.kv_head * args.group + head_of_group;
        const Strided q{rows + head * D, args.ld_qkv}, d_o{args.d_o + first_row * args.ld_d_o + head * D, args.ld_d_o};
        // The first kQueries threads fetch LSE, the next D.
        const float* row_values = (threadIdx.x < kQueries ? args.lse : args.row_sums) + (int64_t(key.batch) * args.heads + head) * args.seq;
        auto start_load = [&](int tile) {
            auto& stage = shared.stages[(tile - first) & 1];
            load_tile<D, kQueries, kThreads>(stage.q, q, tile * kQueries, args.seq);
            load_tile<D, kQueries, kThreads>(stage.d_o, d_o, tile * kQueries, args.seq);
            const int i = tile * kQueries + threadIdx.x % kQueries;
            if (threadIdx.x < 2 * kQueries) copy4_async(stage.lse + threadIdx.x, i < args.seq ? row_values + i : row_values, i < args.seq);
            commit_copies();
        };
        dq.set_head(head_of_group);
        if (head_of_group > 0) __syncthreads();  // the last head's tiles have been read
        start_load(first);
        if (head_of_group == 0) {
            wait_copies<0>();
            __syncthreads();
            const uint32_t v_at = shared_address(shared.v()) + warp.by_columns + row<D>(warp.key0);
#pragma unroll
            for (int r = 0; r < kRowBlocks; ++r)
#pragma unroll
                for (int kk = 0; kk < D / 16; ++kk) ldmatrix(warp.v[r][kk], (v_at ^ column(16 * kk)) + row<D>(Tile::kRowStep * r));
        }
        // dQ lags a step behind, when all warps' dS is there. With a head of 128 the sum so far is fetched behind the products of a step;
        // with 64 no registers are left for that, but a second block on the multiprocessor has work meanwhile.
        constexpr bool kFetchBehindStep = D == 128;
        for (int tile = first; tile <= tiles; ++tile) {
            const uint32_t odd = (tile - first) & 1, stage = stage0 + odd * uint32_t(sizeof(typename Tile::Stage));
            const uint32_t ds = ds0 + odd * row<kQueries>(Tile::kKeys), last_ds = ds0 + (odd ^ 1) * row<kQueries>(Tile::kKeys);
            const bool add = tile > first;
            if (add && !kFetchBehindStep) dq.begin(tile - 1);
            wait_copies<0>();
            __syncthreads();
            if (tile + 1 < tiles) start_load(tile + 1);
            if (add && !kFetchBehindStep) dq.add(tile - 1, last_ds), dq.end(tile - 1);
            if (add && kFetchBehindStep) {
                if (tile > first + 1) dq.pass_turn(tile - 2);
                dq.begin(tile - 1);
            }
            if (tile < tiles) {
                const int query0 = tile * kQueries - key0;
                if (query0 >= Tile::kKeys) key_tile_step<D, false>(warp, stage, ds, query0, scale_log2, at);
                else key_tile_step<D, true>(warp, stage, ds, query0, scale_log2, at);
            }
            if (add && kFetchBehindStep) dq.add(tile - 1, last_ds), dq.end(tile - 1);
            if (add && !kFetchBehindStep) dq.pass_turn(tile - 1);
        }
        if (kFetchBehindStep) dq.pass_turn(tiles - 1);
    }

    bf16* out = args.dqkv + first_row * args.ld_dqkv;
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) {
        const int row = key0 + Tile::kRowStep * r + 16 * at.warp;
        store_gradient<D / 16>(warp.dk[r], args.scale, args.rope, args.ld_rope, out + k_column, args.ld_dqkv, D / 2, row, args.seq, at);
        store_gradient<D / 16>(warp.dv[r], 1, nullptr, 0, out + v_column, args.ld_dqkv, D / 2, row, args.seq, at);
    }
}

// One-dimensional grid: the key tiles of every key head, the last tile of each first. Blocks take their numbers as they start.
template <int D> __global__ void __launch_bounds__(BackwardTile<D>::kThreads, 128 / D) key_tiles_kernel(BackwardArgs args) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    auto& shared = *reinterpret_cast<BackwardTile<D>*>(shared_bytes);
    if (threadIdx.x == 0) shared.number() = int(atomicAdd(args.started, 1u));
    __syncthreads();
    const int number = shared.number(), tiles = tiles_of(args.seq, BackwardTile<D>::kKeys), item = number / tiles, tile = tiles - 1 - number % tiles;
    do_key_tile<D>(args, shared, KeyTile{item / args.kv_heads, item % args.kv_heads, item % args.slots, tile, item / args.slots});
}

template <int D> void launch_backward(const BackwardArgs& args, cudaStream_t stream) {
    using Tile = BackwardTile<D>;
    constexpr int kRowSumThreads = 256;
    const int lanes = args.seq * args.heads * (D / 8);
    row_sums_kernel<D><<<dim3(tiles_of(lanes, kRowSumThreads), args.batch), kRowSumThreads, 0, stream>>>(args);
    LAUNCH_CHECK();
    allow_shared(key_tiles_kernel<D>, sizeof(Tile));
    key_tiles_kernel<D><<<tiles_of(args.seq, Tile::kKeys) * args.batch * args.kv_heads, Tile::kThreads, sizeof(Tile), stream>>>(args);
    LAUNCH_CHECK();
}

}  // namespace attention

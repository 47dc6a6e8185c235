// AdamW on the GPU. See adam.h; the plain loops are in adam.cu.
#pragma once
#include "adam_element.h"
#include "ops/row_kernels.h"
#include "runtime/cuda_context.h"

namespace {

// One thread owns a group of eight consecutive elements (one Philox call), one warp a block of 256 (one absmax).

constexpr int kThreads = 256;

__device__ const DynamicMap kDeviceMaps[2] = {kSignedMap, kUnsignedMap};

// Both maps in shared memory, where the data-dependent look-ups go. Other formats leave theirs untouched and the compiler drops it.
template <MomentFormat F> struct SharedMaps {
    DynamicMap map[F == MomentFormat::int8 ? 2 : 1];
    __device__ void fill() {
        if constexpr (F == MomentFormat::int8) {
            static_assert(sizeof(kDeviceMaps) % 4 == 0, "copied by words");
            for (int i = threadIdx.x; i < int(sizeof(kDeviceMaps) / 4); i += kThreads)
                reinterpret_cast<uint32_t*>(map)[i] = reinterpret_cast<const uint32_t*>(kDeviceMaps)[i];
            __syncthreads();
        }
    }
};

// Groups come in two kinds. kWide: every group of the tensor is whole and every access aligned (contiguous tensors with a multiple of
// eight elements: nearly all). Loads then need no branches, so all of a group are under way at once; threads past the end (count = 0)
// load the last group again and store nothing. Otherwise: any layout, element by element where it must be; 0 beyond the end.
HOST_DEVICE int64_t wide_begin(int64_t begin, int64_t numel) { return begin < numel ? begin : numel - 8; }

template <bool kWide, class T> __device__ void load_group(const FlatMatrix<T>& matrix, int64_t begin, int count, float (&x)[8]) {
    if constexpr (kWide) load_n(matrix.data + wide_begin(begin, matrix.numel), x);
    else load8(matrix, begin, count, x);
}

// The eight moments of one group as fp32.
template <bool kWide, MomentFormat F> __device__ void load_moment(const Moment<F>& moment, int64_t begin, int count, const DynamicMap& map, float (&x)[8]) {
    using T = typename Moment<F>::T;
    Pack8<T> pack;
    if constexpr (kWide) begin = wide_begin(begin, moment.numel), count = 8;
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] = 0.0f;
    if (count <= 0) return;
    if (kWide || (count == 8 && Pack8<T>::aligned(moment.data + begin))) {
        pack.load(moment.data + begin);
    } else {
#pragma unroll
        for (int k = 0; k < 8; ++k) pack.x[k] = k < count ? moment.data[begin + k] : T{};
    }
    if constexpr (F == MomentFormat::int8) {
        const float absmax = moment.absmax[begin / kAdamBlock];
#pragma unroll
        for (int k = 0; k < 8; ++k) x[k] = k < count ? map.value[pack.x[k]] * absmax : 0.0f;
    } else {
#pragma unroll
        for (int k = 0; k < 8; ++k) x[k] = to_float(pack.x[k]);
    }
}

__device__ __forceinline__ Bf16x8 round_nearest(const float (&x)[8]) {
    return {{pack_bf16x2(x[0], x[1]), pack_bf16x2(x[2], x[3]), pack_bf16x2(x[4], x[5]), pack_bf16x2(x[6], x[7])}};
}

// Elements begin .. begin + count − 1 = x.
template <bool kWide> __device__ __forceinline__ void store_group(const FlatMatrix<float>& matrix, int64_t begin, int count, const float (&x)[8]) {
    if constexpr (!kWide) {
        store8(matrix, begin, count, x);
    } else if (count > 0) {
        uint32_t word[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) word[k] = bits_of_float(x[k]);
        store_words(matrix.data + begin, word[0], word[1], word[2], word[3]);
        store_words(matrix.data + begin + 4, word[4], word[5], word[6], word[7]);
    }
}
template <bool kWide> __device__ __forceinline__ void store_group(const FlatMatrix<bf16>& matrix, int64_t begin, int count, const Bf16x8& x) {
    if constexpr (!kWide) {
        bf16 elements[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) elements[k] = x[k];
        store8(matrix, begin, count, elements);
    } else if (count > 0) {
        store_words(matrix.data + begin, x.word[0], x.word[1], x.word[2], x.word[3]);
    }
}

// The whole warp calls this together: absmax is a reduction over its 256 elements.
template <bool kWide, MomentFormat F>
__device__ void store_moment(const Moment<F>& moment, int64_t begin, int count, const DynamicMap& map, const float (&x)[8], const RoundingSource& source) {
    if constexpr (F == MomentFormat::int8) {
        float a = 0.0f;
#pragma unroll
        for (int k = 0; k < 8; ++k) a = fmaxf(a, k < count ? fabsf(x[k]) : 0.0f);
#pragma unroll
        for (int lane = 16; lane; lane /= 2) a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, lane));
        const float inverse = reciprocal_or_zero(a);
        if (threadIdx.x % 32 == 0) moment.absmax[begin / kAdamBlock] = inverse > 0.0f ? a : 0.0f;
        uint8_t code[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) code[k] = moment_code(map, x[k], inverse);
        if constexpr (kWide) {
            const uint32_t low = code[0] | code[1] << 8 | code[2] << 16 | uint32_t(code[3]) << 24;
            const uint32_t high = code[4] | code[5] << 8 | code[6] << 16 | uint32_t(code[7]) << 24;
            if (count > 0) *reinterpret_cast<uint2*>(moment.data + begin) = make_uint2(low, high);
        } else {
            store8(moment.matrix(), begin, count, code);
        }
    } else if constexpr (F == MomentFormat::bf16_stochastic) {
        store_group<kWide>(moment.matrix(), begin, count, round_stochastic(x, source.draws(begin / 8)));
    } else if constexpr (F == MomentFormat::bf16_nearest) {
        store_group<kWide>(moment.matrix(), begin, count, round_nearest(x));
    } else {
        store_group<kWide>(moment.matrix(), begin, count, x);
    }
}

template <bool kWide, class P> __device__ void load_param(const FlatMatrix<P>& p, const int16_t* correction, int64_t begin, int count, float (&x)[8]) {
    load_group<kWide>(p, begin, count, x);
    if constexpr (std::is_same_v<P, bf16>) {
        if (!correction) return;
#pragma unroll
        for (int k = 0; k < 8; ++k)
            if (k < count) x[k] = join_master(to_bf16(x[k]), correction[begin + k]);
    }
}

template <bool kWide, class P> __device__ void store_param(const FlatMatrix<P>& p, int16_t* correction, int64_t begin, int count, const float (&x)[8], const AdamConstants& c) {
    if constexpr (std::is_same_v<P, bf16>) {
        if (correction) {
            Bf16x8 high{};
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                bf16 rounded_up;
                int16_t low;
                split_master(x[k], rounded_up, low);
                high.word[k / 2] |= uint32_t(rounded_up.bits) << (k % 2 * 16);
                if (k < count) correction[begin + k] = low;
            }
            store_group<kWide>(p, begin, count, high);
        } else if (c.rounding == ParamRounding::stochastic) {
            store_group<kWide>(p, begin, count, round_stochastic(x, rounding_draws(c.seed, uint64_t(begin / 8), rounding_stream(c.stream, kParamStream), c.step)));
        } else {
            store_group<kWide>(p, begin, count, round_nearest(x));
        }
    } else {
        store_group<kWide>(p, begin, count, x);
    }
}

// Calls body(begin, count) for this thread's groups, the whole warp together (count = 0 past the end).
template <class Body> __device__ void for_each_group(int64_t numel, Body body) {
    const int64_t warp_elements = 256, warps = int64_t(gridDim.x) * (kThreads / 32);
    for (int64_t block = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; block * warp_elements < numel; block += warps) {
        const int64_t begin = block * warp_elements + threadIdx.x % 32 * 8;
        body(begin, int(min(int64_t(8), max(int64_t(0), numel - begin))));
    }
}

template <MomentFormat F, class P, class G, bool kWide>
__global__ void __launch_bounds__(kThreads)
    adam_kernel(FlatMatrix<P> p, FlatMatrix<const G> g, Moment<F> first, Moment<F> second, int16_t* correction, AdamConstants c,
                RoundingSource first_source, RoundingSource second_source, int32_t* nonfinite) {
    __shared__ SharedMaps<F> maps;
    maps.fill();
    const DynamicMap &map1 = maps.map[0], &map2 = maps.map[F == MomentFormat::int8 ? 1 : 0];
    const bool round_p = std::is_same_v<P, bf16> && c.rounding == ParamRounding::nearest;
    for_each_group(p.numel, [&](int64_t begin, int count) {
        float pf[8], gf[8], m[8], v[8];
        load_param<kWide>(p, correction, begin, count, pf);
        load_group<kWide>(g, begin, count, gf);
        load_moment<kWide>(first, begin, count, map1, m);
        load_moment<kWide>(second, begin, count, map2, v);
        int bad = 0;
#pragma unroll
        for (int k = 0; k < 8; ++k) bad += !adam_element<F>(c, pf[k], m[k], v[k], gf[k] * c.grad_scale, round_p);
        store_param<kWide>(p, correction, begin, count, pf, c);
        store_moment<kWide>(first, begin, count, map1, m, first_source);
        store_moment<kWide>(second, begin, count, map2, v, second_source);
        if (bad && count > 0 && nonfinite) atomicAdd(nonfinite, bad);
    });
}

template <MomentFormat F> __global__ void __launch_bounds__(kThreads) load_moment_kernel(FlatMatrix<float> dst, Moment<F> moment) {
    __shared__ SharedMaps<F> maps;
    maps.fill();
    const DynamicMap& map = maps.map[F == MomentFormat::int8 && moment.second ? 1 : 0];
    for_each_group(dst.numel, [&](int64_t begin, int count) {
        float x[8];
        load_moment<false>(moment, begin, count, map, x);
        store8(dst, begin, count, x);
    });
}

template <MomentFormat F> __global__ void __launch_bounds__(kThreads) store_moment_kernel(Moment<F> moment, FlatMatrix<const float> src, RoundingSource source) {
    __shared__ SharedMaps<F> maps;
    maps.fill();
    const DynamicMap& map = maps.map[F == MomentFormat::int8 && moment.second ? 1 : 0];
    for_each_group(src.numel, [&](int64_t begin, int count) {
        float x[8];
        load8(src, begin, count, x);
        store_moment<false>(moment, begin, count, map, x, source);
    });
}

// Enough thread blocks to fill the GPU a few times; more would only reload the maps.
unsigned grid_for(const CudaContext& cuda, int64_t numel) {
    return unsigned(std::min(ceil_div(numel, 8 * kThreads), int64_t(cuda.properties.multiProcessorCount) * 8));
}

bool contiguous_aligned(const Tensor& t) { return t.contiguous() && reinterpret_cast<uintptr_t>(t.data) % 16 == 0; }

template <MomentFormat F, class P, class G>
void adam_cuda(CudaContext& cuda, Tensor p, Tensor g, const AdamState& state, const AdamConstants& c, int32_t* nonfinite) {
    auto kernel = adam_kernel<F, P, G, false>;
    if constexpr (std::is_same_v<P, bf16>) {  // with fp32 parameters the other form is the faster one, by 12 % on an H200
        const bool wide = p.numel() % 8 == 0 && contiguous_aligned(p) && contiguous_aligned(g) && contiguous_aligned(state.m) && contiguous_aligned(state.v);
        if (wide) kernel = adam_kernel<F, P, G, true>;
    }
    kernel<<<grid_for(cuda, p.numel()), kThreads, 0, cuda.stream>>>(FlatMatrix<P>(p), FlatMatrix<const G>(g), Moment<F>(state, false), Moment<F>(state, true),
                                                                   correction_of(state, p, c.rounding), c, moment_source(c, false), moment_source(c, true),
                                                                   nonfinite);
    LAUNCH_CHECK();
}

template <MomentFormat F> void load_cuda(CudaContext& cuda, Tensor dst, const AdamState& state, bool second) {
    load_moment_kernel<F><<<grid_for(cuda, dst.numel()), kThreads, 0, cuda.stream>>>(FlatMatrix<float>(dst), Moment<F>(state, second));
    LAUNCH_CHECK();
}

template <MomentFormat F> void store_cuda(CudaContext& cuda, const AdamState& state, bool second, Tensor src, const RoundingSource& source) {
    store_moment_kernel<F><<<grid_for(cuda, src.numel()), kThreads, 0, cuda.stream>>>(Moment<F>(state, second), FlatMatrix<const float>(src), source);
    LAUNCH_CHECK();
}

}  // namespace

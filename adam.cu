// AdamW with moments in fp32, bf16 or 8 bits. See adam.h.
//
// Every product that feeds a sum is an explicit fmaf, so neither compiler is left to choose where to contract: CPU and GPU do the
// same arithmetic, and a bf16 parameter with its correction takes exactly the steps of an fp32 one.
#include "adam.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "dynamic_map.h"
#include "flat_matrix.h"
#include "ops/row_kernels.h"
#include "runtime/philox.h"
#include "runtime/profile.h"

MomentFormat effective_format(MomentFormat wanted, int64_t numel) {
    return wanted == MomentFormat::int8 && numel < kAdam8bitMinimum ? MomentFormat::fp32 : wanted;
}

namespace {

// What one step needs, rounded once from double.
struct AdamConstants {
    float beta1, one_minus_beta1, beta2, one_minus_beta2;
    float step_size, eps_c2;         // lr·c2/c1 and eps·c2
    float c2, eps, torch_step_size;  // bf16_nearest keeps torch's form: lr/c1 · m/(sqrt(v)/c2 + eps)
    float decay, grad_scale;
    ParamRounding rounding;
    uint64_t seed;
    uint32_t stream, step;

    explicit AdamConstants(const AdamStep& s) {
        double c1 = 1 - std::pow(s.beta1, double(s.t)), root = std::sqrt(1 - std::pow(s.beta2, double(s.t)));
        beta1 = float(s.beta1), one_minus_beta1 = float(1 - s.beta1);
        beta2 = float(s.beta2), one_minus_beta2 = float(1 - s.beta2);
        step_size = float(s.lr * root / c1), eps_c2 = float(s.eps * root);
        c2 = float(root), eps = float(s.eps), torch_step_size = float(s.lr / c1);
        decay = float(1 - s.lr * s.weight_decay), grad_scale = s.grad_scale;
        rounding = s.rounding, seed = s.seed, stream = s.stream, step = s.step;
    }
};

// Philox streams of one tensor: the parameter and its moments draw separately.
enum RoundingStream : uint32_t { kParamStream = 0, kFirstStream = 1, kSecondStream = 2 };
HOST_DEVICE uint32_t rounding_stream(uint32_t stream, uint32_t part) { return stream * 4 + part; }

// x as the nearest bf16.
HOST_DEVICE float rounded(float x) {
#ifdef __CUDA_ARCH__
    return float_of_bits(pack_bf16x2(0.0f, x));
#else
    return to_float(to_bf16(x));
#endif
}

// One element. g is already scaled. Returns false (p, m, v kept) if g or its square is not finite.
// round_p: bf16 parameters rounded to nearest, which torch does after the decay and after the step.
template <MomentFormat F> HOST_DEVICE bool adam_element(const AdamConstants& c, float& p, float& m, float& v, float g, bool round_p) {
    const bool finite = g * g <= FLT_MAX;
    const float old_p = p, old_m = m, old_v = v;
    if (F == MomentFormat::bf16_nearest) {
        // torch's sequence for bf16 tensors: mul_(p, 1 − lr·wd); lerp_(m, g, 1 − β1); mul_(v, β2); addcmul_(v, g, g, 1 − β2);
        // d = sqrt(v); div_(d, c2); add_(d, eps); addcdiv_(p, m, d, −lr/c1): fp32 inside each, rounded to bf16 after each.
        g = rounded(g);
        p *= c.decay;
        if (round_p) p = rounded(p);
        m = rounded(fmaf(c.one_minus_beta1, g - m, m));
        v = rounded(v * c.beta2);
        v = rounded(fmaf(c.one_minus_beta2 * g, g, v));
        float d = rounded(rounded(rounded(sqrtf(v)) / c.c2) + c.eps);
        p = fmaf(-c.torch_step_size, m / d, p);
    } else {
        m = fmaf(c.beta1, m, c.one_minus_beta1 * g);
        v = fmaf(c.beta2, v, c.one_minus_beta2 * g * g);
        p = fmaf(-c.step_size, m / (sqrtf(v) + c.eps_c2), p) * c.decay;
    }
    // Chosen afterwards: branches around the arithmetic would cost more than the arithmetic.
    p = finite ? p : old_p, m = finite ? m : old_m, v = finite ? v : old_v;
    return finite;
}

// An fp32 parameter split into bf16 and a 16-bit correction. Ties go away from zero: the correction is then in −32768..32767.
HOST_DEVICE float join_master(bf16 p, int16_t correction) { return float_of_bits((uint32_t(p.bits) << 16) + uint32_t(int32_t(correction))); }
HOST_DEVICE void split_master(float x, bf16& p, int16_t& correction) {
    p.bits = uint16_t((bits_of_float(x) + 0x8000u) >> 16);
    correction = int16_t(bits_of_float(x) - (uint32_t(p.bits) << 16));
}

// 1/a, or 0 where that would overflow: a block of zeros (or subnormals) has absmax 0 and the codes of 0.
HOST_DEVICE float reciprocal_or_zero(float a) { return a >= FLT_MIN ? 1.0f / a : 0.0f; }

// The 8-bit code of a moment x. The signed map has only a +0; as in bitsandbytes a negative m never becomes 0, so a tiny negative
// moment keeps its sign.
HOST_DEVICE uint8_t moment_code(const DynamicMap& map, float x, float inverse) {
    int code = dynamic_code(map, x * inverse);
    if (x < 0.0f && inverse > 0.0f && code == map.zero) --code;
    return uint8_t(code);
}

// Storage of one moment in format F.
template <MomentFormat F> struct MomentType { using type = bf16; };
template <> struct MomentType<MomentFormat::fp32> { using type = float; };
template <> struct MomentType<MomentFormat::int8> { using type = uint8_t; };

template <MomentFormat F> struct Moment {
    using T = typename MomentType<F>::type;
    T* data;
    float* absmax;
    bool second;
    int64_t numel;

    Moment(const AdamState& state, bool second_moment) : second(second_moment) {
        const Tensor& t = second ? state.v : state.m;
        data = t.as<T>();
        absmax = F == MomentFormat::int8 ? (second ? state.v_absmax : state.m_absmax).as<float>() : nullptr;
        numel = t.numel();
    }
    HOST_DEVICE FlatMatrix<T> matrix() const { return FlatMatrix<T>(data, numel); }
};

// Where stochastic rounding takes its draws from: group of eight elements → 128 bits.
struct RoundingSource {
    uint64_t seed;
    uint32_t stream, step;
    HOST_DEVICE Philox4 draws(int64_t group) const { return rounding_draws(seed, uint64_t(group), stream, step); }
};

RoundingSource moment_source(const AdamConstants& c, bool second) { return {c.seed, rounding_stream(c.stream, second ? kSecondStream : kFirstStream), c.step}; }

// ---- CPU ----------------------------------------------------------------------------------------------------------------------
// Works on blocks of 256 elements, unpacked to fp32.

struct Block {
    int64_t begin;
    int count;
};

template <MomentFormat F> void load_moment_cpu(const Moment<F>& moment, Block block, float* x) {
    if constexpr (F == MomentFormat::int8) {
        const DynamicMap& map = moment.second ? kUnsignedMap : kSignedMap;
        for (int k = 0; k < block.count; ++k) x[k] = map.value[moment.data[block.begin + k]] * moment.absmax[block.begin / kAdamBlock];
    } else {
        for (int k = 0; k < block.count; ++k) x[k] = to_float(moment.data[block.begin + k]);
    }
}

template <class Store> void for_each_draw(const RoundingSource& source, Block block, Store store_one) {
    for (int k = 0; k < block.count; k += 8) {
        Philox4 draws = source.draws((block.begin + k) / 8);
        for (int i = 0; i < 8 && k + i < block.count; ++i) store_one(k + i, rounding_draw16(draws, i));
    }
}

template <MomentFormat F> void store_moment_cpu(const Moment<F>& moment, Block block, const float* x, const RoundingSource& source) {
    auto* data = moment.data + block.begin;
    if constexpr (F == MomentFormat::int8) {
        const DynamicMap& map = moment.second ? kUnsignedMap : kSignedMap;
        float a = 0.0f;
        for (int k = 0; k < block.count; ++k) a = std::max(a, std::fabs(x[k]));
        float inverse = reciprocal_or_zero(a);
        moment.absmax[block.begin / kAdamBlock] = inverse > 0.0f ? a : 0.0f;
        for (int k = 0; k < block.count; ++k) data[k] = moment_code(map, x[k], inverse);
    } else if constexpr (F == MomentFormat::bf16_stochastic) {
        for_each_draw(source, block, [&](int k, uint32_t draw) { data[k] = to_bf16_stochastic(x[k], draw); });
    } else {
        for (int k = 0; k < block.count; ++k) store(data[k], x[k]);
    }
}

template <class P> void load_param_cpu(const FlatMatrix<P>& p, const int16_t* correction, Block block, float* x) {
    FlatCursor<P> cursor(p, block.begin);
    for (int k = 0; k < block.count; ++k, ++cursor) {
        if constexpr (std::is_same_v<P, bf16>) x[k] = correction ? join_master(*cursor, correction[block.begin + k]) : to_float(*cursor);
        else x[k] = *cursor;
    }
}

template <class P> void store_param_cpu(const FlatMatrix<P>& p, int16_t* correction, Block block, const float* x, const AdamConstants& c) {
    FlatCursor<P> cursor(p, block.begin);
    if constexpr (std::is_same_v<P, bf16>) {
        if (correction) {
            for (int k = 0; k < block.count; ++k, ++cursor) split_master(x[k], *cursor, correction[block.begin + k]);
            return;
        }
        if (c.rounding == ParamRounding::stochastic) {
            for_each_draw({c.seed, rounding_stream(c.stream, kParamStream), c.step}, block, [&](int k, uint32_t draw) {
                *cursor = to_bf16_stochastic(x[k], draw);
                ++cursor;
            });
            return;
        }
    }
    for (int k = 0; k < block.count; ++k, ++cursor) store(*cursor, x[k]);
}

// The correction is used for bf16 parameters with ParamRounding::master only.
int16_t* correction_of(const AdamState& state, const Tensor& p, ParamRounding rounding) {
    return p.dtype == DType::bf16 && rounding == ParamRounding::master ? state.correction.as<int16_t>() : nullptr;
}

template <MomentFormat F, class P, class G> void adam_cpu(Tensor p, Tensor g, const AdamState& state, const AdamConstants& c, int32_t* nonfinite) {
    const FlatMatrix<P> parameter(p);
    const FlatMatrix<const G> gradient(g);
    const Moment<F> first(state, false), second(state, true);
    int16_t* correction = correction_of(state, p, c.rounding);
    const bool round_p = std::is_same_v<P, bf16> && c.rounding == ParamRounding::nearest;
    const int64_t numel = p.numel(), blocks = ceil_div(numel, kAdamBlock);
    int64_t bad = 0;
#pragma omp parallel for reduction(+ : bad) if (blocks > 16)  // waking threads costs more than a few blocks
    for (int64_t b = 0; b < blocks; ++b) {
        const Block block{b * kAdamBlock, int(std::min(kAdamBlock, numel - b * kAdamBlock))};
        float pf[kAdamBlock], m[kAdamBlock], v[kAdamBlock];
        load_param_cpu(parameter, correction, block, pf);
        load_moment_cpu(first, block, m);
        load_moment_cpu(second, block, v);
        FlatCursor<const G> cursor(gradient, block.begin);
        for (int k = 0; k < block.count; ++k, ++cursor) bad += !adam_element<F>(c, pf[k], m[k], v[k], to_float(*cursor) * c.grad_scale, round_p);
        store_param_cpu(parameter, correction, block, pf, c);
        store_moment_cpu(first, block, m, moment_source(c, false));
        store_moment_cpu(second, block, v, moment_source(c, true));
    }
    if (nonfinite) *nonfinite += int32_t(bad);
}

template <MomentFormat F> void load_cpu(Tensor dst, const AdamState& state, bool second) {
    const Moment<F> moment(state, second);
    float* x = dst.as<float>();
#pragma omp parallel for
    for (int64_t b = 0; b < ceil_div(moment.numel, kAdamBlock); ++b)
        load_moment_cpu(moment, Block{b * kAdamBlock, int(std::min(kAdamBlock, moment.numel - b * kAdamBlock))}, x + b * kAdamBlock);
}

template <MomentFormat F> void store_cpu(const AdamState& state, bool second, Tensor src, const RoundingSource& source) {
    const Moment<F> moment(state, second);
    const float* x = src.as<float>();
#pragma omp parallel for
    for (int64_t b = 0; b < ceil_div(moment.numel, kAdamBlock); ++b)
        store_moment_cpu(moment, Block{b * kAdamBlock, int(std::min(kAdamBlock, moment.numel - b * kAdamBlock))}, x + b * kAdamBlock, source);
}

// ---- CUDA ---------------------------------------------------------------------------------------------------------------------
#ifdef WITH_CUDA
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
#endif

// ---- dispatch -----------------------------------------------------------------------------------------------------------------

template <MomentFormat F> using Format = std::integral_constant<MomentFormat, F>;

// Calls body(Format<F>()) with the format as a compile-time constant.
template <class Body> void with_format(MomentFormat format, Body body) {
    switch (format) {
        case MomentFormat::fp32: return body(Format<MomentFormat::fp32>());
        case MomentFormat::bf16_stochastic: return body(Format<MomentFormat::bf16_stochastic>());
        case MomentFormat::bf16_nearest: return body(Format<MomentFormat::bf16_nearest>());
        case MomentFormat::int8: return body(Format<MomentFormat::int8>());
    }
}

template <class Body> void with_float_type(DType dtype, Body body) {
    CHECK_INTERNAL(dtype == DType::f32 || dtype == DType::bf16, "AdamW on %s", safetensors_name(dtype));
    if (dtype == DType::f32) body(float());
    else body(bf16());
}

void check_state(const AdamState& state, int64_t numel) {
    CHECK_INTERNAL(state.m.numel() == numel && state.v.numel() == numel, "moments of %lld elements for a tensor of %lld", (long long)state.m.numel(), (long long)numel);
    if (state.format == MomentFormat::int8)
        CHECK_INTERNAL(state.m_absmax.numel() == ceil_div(numel, kAdamBlock) && state.v_absmax.numel() == ceil_div(numel, kAdamBlock),
                       "%lld absmax values for %lld 8-bit moments", (long long)state.m_absmax.numel(), (long long)numel);
}

double moment_bytes(const AdamState& state, bool second) {
    return second ? double(state.v.bytes() + state.v_absmax.bytes()) : double(state.m.bytes() + state.m_absmax.bytes());
}

}  // namespace

void adam_update(Device& device, Tensor p, Tensor g, const AdamState& state, const AdamStep& step, int32_t* nonfinite) {
    check_state(state, p.numel());
    CHECK_INTERNAL(g.rows == p.rows && g.cols == p.cols, "gradient %lld × %lld of a parameter %lld × %lld", (long long)g.rows, (long long)g.cols,
                   (long long)p.rows, (long long)p.cols);
    CHECK_INTERNAL(step.t >= 1, "Adam step %lld: the first is 1", (long long)step.t);
    const bool master = step.rounding == ParamRounding::master && p.dtype == DType::bf16;
    if (master)
        CHECK_INTERNAL(state.correction.numel() == p.numel(), "%lld corrections for %lld parameters", (long long)state.correction.numel(), (long long)p.numel());
    if (p.numel() == 0) return;
    const AdamConstants constants(step);
    OperationTimer timer(device, "adam_update", 0, 2 * (moment_bytes(state, false) + moment_bytes(state, true)) +
                         double(p.numel()) * double(2 * (size_of(p.dtype) + (master ? 2 : 0)) + size_of(g.dtype)));
    with_format(state.format, [&](auto format) {
        with_float_type(p.dtype, [&](auto p_type) {
            with_float_type(g.dtype, [&](auto g_type) {
                constexpr MomentFormat F = decltype(format)::value;
                using P = decltype(p_type);
                using G = decltype(g_type);
                ON_DEVICE(device, (adam_cuda<F, P, G>(device.cuda(), p, g, state, constants, nonfinite)),
                          (adam_cpu<F, P, G>(p, g, state, constants, nonfinite)));
            });
        });
    });
}

void adam_load_moment(Device& device, Tensor dst, const AdamState& state, bool second) {
    check_state(state, dst.numel());
    if (dst.numel() == 0) return;
    OperationTimer timer(device, "adam_load_moment", 0, moment_bytes(state, second) + double(dst.bytes()));
    with_format(state.format, [&](auto format) {
        constexpr MomentFormat F = decltype(format)::value;
        ON_DEVICE(device, load_cuda<F>(device.cuda(), dst, state, second), load_cpu<F>(dst, state, second));
    });
}

void adam_store_moment(Device& device, const AdamState& state, bool second, Tensor src, uint64_t seed, uint32_t stream, uint32_t step) {
    check_state(state, src.numel());
    if (src.numel() == 0) return;
    OperationTimer timer(device, "adam_store_moment", 0, moment_bytes(state, second) + double(src.bytes()));
    const RoundingSource source{seed, rounding_stream(stream, second ? kSecondStream : kFirstStream), step};
    with_format(state.format, [&](auto format) {
        constexpr MomentFormat F = decltype(format)::value;
        ON_DEVICE(device, store_cuda<F>(device.cuda(), state, second, src, source), store_cpu<F>(state, second, src, source));
    });
}

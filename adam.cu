// AdamW with moments in fp32, bf16 or 8 bits: plain loops, and what is public. See adam.h.
#include "adam.h"

#include <algorithm>

#include "adam_element.h"
#include "runtime/profile.h"
#ifdef WITH_CUDA
#include "adam_kernels.cuh"
#endif

MomentFormat effective_format(MomentFormat wanted, int64_t numel) {
    return wanted == MomentFormat::int8 && numel < kAdam8bitMinimum ? MomentFormat::fp32 : wanted;
}

namespace {


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

// Sums of gradients over micro-batches; see gradient_sum.h.
//
// The one product that feeds a sum is an explicit fmaf, so neither compiler is left to choose: CPU and GPU give the same bits.
#include "ops/gradient_sum.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "flat_matrix.h"
#include "ops/elementwise.h"
#include "ops/row_kernels.h"
#include "runtime/profile.h"

namespace {

// The scale of a block from the bits of its largest magnitude. As integers the magnitudes are in order, Inf and NaN last.
HOST_DEVICE float block_scale(uint32_t largest) {
    if (largest >= 0x7f800000u) return float_of_bits(0x7fc00000u);
    const float scale = float_of_bits(largest) / 127.0f;
    return scale >= FLT_MIN ? scale : 0.0f;
}
HOST_DEVICE float inverse_scale(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

// x/scale rounded down after adding (draw + ½)/2¹⁶, as a signed byte. The ½ leaves whole numbers alone, even with the last bits wrong that the
// inverse may get wrong, and makes the rounding unbiased for fractions that are no multiple of 2⁻¹⁶.
HOST_DEVICE uint32_t stochastic_code(float x, float inverse, uint32_t draw16) {
    float y = x * inverse;
    y = y >= -127.0f ? (y <= 127.0f ? y : 127.0f) : -127.0f;  // NaN: −127, whose value is NaN
    y += float_of_bits(0x3f800040u | draw16 << 7) - 1.0f;
#ifdef __CUDA_ARCH__
    return bits_of_float(__fadd_rd(y, 12582912.0f)) & 0xffu;  // the last bits of 3·2²² + ⌊y⌋; converting would cost several times as much
#else
    return uint8_t(int8_t(std::floor(y)));
#endif
}

// ---- CPU ----------------------------------------------------------------------------------------------------------------------

// Elements begin .. begin + count − 1 of a block and their new sums.
struct NewSums {
    int64_t begin;
    int count;
    float x[kGradientBlock];
};

// store_one(k, draw) for every element.
template <class Store> void for_each_draw(const NewSums& block, const RoundingDraws& draws, Store store_one) {
    for (int k = 0; k < block.count; k += 8) {
        const Philox4 group = draws.of_group((block.begin + k) / 8);
        for (int i = 0; i < 8 && k + i < block.count; ++i) store_one(k + i, rounding_draw16(group, i));
    }
}

void add_block_cpu(const FlatMatrix<bf16>& values, NewSums& block, bool first, const RoundingDraws& draws) {
    FlatCursor<bf16> old(values, block.begin), out(values, block.begin);
    if (!first)
        for (int k = 0; k < block.count; ++k, ++old) block.x[k] += to_float(*old);
    for_each_draw(block, draws, [&](int k, uint32_t draw) {
        *out = to_bf16_stochastic(block.x[k], draw);
        ++out;
    });
}

void add_block_cpu(uint8_t* codes, float& scale, NewSums& block, bool first, const RoundingDraws& draws) {
    if (!first)
        for (int k = 0; k < block.count; ++k) block.x[k] = fmaf(float(int8_t(codes[k])), scale, block.x[k]);
    uint32_t largest = 0;
    for (int k = 0; k < block.count; ++k) largest = std::max(largest, bits_of_float(block.x[k]) & 0x7fffffffu);
    scale = block_scale(largest);
    const float inverse = inverse_scale(scale);
    for_each_draw(block, draws, [&](int k, uint32_t draw) { codes[k] = uint8_t(stochastic_code(block.x[k], inverse, draw)); });
}

void add_cpu(const GradientSum& sum, Tensor g, bool first, const RoundingDraws& draws) {
    const FlatMatrix<const float> gradient(g);
#pragma omp parallel for
    for (int64_t b = 0; b < ceil_div(g.numel(), kGradientBlock); ++b) {
        NewSums block;
        block.begin = b * kGradientBlock, block.count = int(std::min(kGradientBlock, g.numel() - block.begin));
        FlatCursor<const float> cursor(gradient, block.begin);
        for (int k = 0; k < block.count; ++k, ++cursor) block.x[k] = *cursor;
        if (sum.values.dtype == DType::bf16) add_block_cpu(FlatMatrix<bf16>(sum.values), block, first, draws);
        else add_block_cpu(sum.values.as<uint8_t>() + block.begin, sum.scales.as<float>()[b], block, first, draws);
    }
}

void load_codes_cpu(Tensor g, const GradientSum& sum) {
    const FlatMatrix<float> out(g);
#pragma omp parallel for
    for (int64_t b = 0; b < sum.scales.cols; ++b) {
        const int64_t begin = b * kGradientBlock, end = std::min(begin + kGradientBlock, g.numel());
        FlatCursor<float> cursor(out, begin);
        for (int64_t i = begin; i < end; ++i, ++cursor) *cursor = float(int8_t(sum.values.as<uint8_t>()[i])) * sum.scales.as<float>()[b];
    }
}

// ---- CUDA ---------------------------------------------------------------------------------------------------------------------
#ifdef WITH_CUDA
// One thread owns a group of eight consecutive elements (one Philox call), one warp a block of 256 (one scale). kWide: all groups are whole
// and aligned, as in contiguous matrices of a multiple of eight elements. Otherwise: any layout, element by element where it must be.
constexpr int kThreads = 256;

unsigned blocks_for(int64_t numel) { return unsigned(ceil_div(numel, 8 * kThreads)); }

// A thread's group; count = 0 past the end.
struct Group {
    int64_t begin;
    int count;
    __device__ explicit Group(int64_t numel) : begin((int64_t(blockIdx.x) * kThreads + threadIdx.x) * 8), count(int(min(int64_t(8), max(int64_t(0), numel - begin)))) {}
};

template <bool kWide, class T> __device__ __forceinline__ void load_group(const FlatMatrix<T>& matrix, Group group, float (&x)[8]) {
    if constexpr (kWide) load_n(matrix.data + group.begin, x);
    else load8(matrix, group.begin, group.count, x);
}

// Eight codes in memory order; those past the end are 0.
struct Codes8 {
    uint32_t word[2] = {0, 0};

    template <bool kWide> __device__ __forceinline__ void load(const uint8_t* codes, Group group) {
        if (kWide || (group.count == 8 && Pack8<uint8_t>::aligned(codes + group.begin))) {
            const uint2 both = *reinterpret_cast<const uint2*>(codes + group.begin);
            word[0] = both.x, word[1] = both.y;
        } else {
#pragma unroll
            for (int k = 0; k < 8; ++k)
                if (k < group.count) word[k / 4] |= uint32_t(codes[group.begin + k]) << (k % 4 * 8);
        }
    }
    template <bool kWide> __device__ __forceinline__ void store(uint8_t* codes, Group group) const {
        if (kWide || (group.count == 8 && Pack8<uint8_t>::aligned(codes + group.begin))) {
            *reinterpret_cast<uint2*>(codes + group.begin) = make_uint2(word[0], word[1]);
        } else {
#pragma unroll
            for (int k = 0; k < 8; ++k)
                if (k < group.count) codes[group.begin + k] = uint8_t(word[k / 4] >> (k % 4 * 8));
        }
    }
    // Code k: the byte code + 128 below the exponent of 2²³ is the fp32 number 2²³ + code + 128.
    __device__ __forceinline__ float operator[](int k) const {
        return float_of_bits(__byte_perm(word[k / 4] ^ 0x80808080u, 0x4b000000u, 0x7550 | (k % 4))) - 8388736.0f;
    }
};

template <bool kWide>
__global__ void __launch_bounds__(kThreads) add_bf16_kernel(FlatMatrix<bf16> values, FlatMatrix<const float> g, bool first, RoundingDraws draws) {
    const Group group(g.numel);
    if (group.count == 0) return;
    float x[8], old[8];
    load_group<kWide>(g, group, x);
    if (!first) {
        load_group<kWide>(values, group, old);
#pragma unroll
        for (int k = 0; k < 8; ++k) x[k] += old[k];
    }
    const Bf16x8 rounded = round_stochastic(x, draws.of_group(group.begin / 8));
    if constexpr (kWide) {
        store_words(values.data + group.begin, rounded.word[0], rounded.word[1], rounded.word[2], rounded.word[3]);
    } else {
        bf16 elements[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) elements[k] = rounded[k];
        store8(values, group.begin, group.count, elements);
    }
}

template <bool kWide>
__global__ void __launch_bounds__(kThreads) add_codes_kernel(uint8_t* codes, float* scales, FlatMatrix<const float> g, bool first, RoundingDraws draws) {
    const Group group(g.numel);
    const int64_t block = group.begin / kGradientBlock;
    if (block * kGradientBlock >= g.numel) return;  // the whole warp
    float x[8] = {};
    if (group.count > 0) {
        load_group<kWide>(g, group, x);
        if (!first) {
            Codes8 old;
            old.load<kWide>(codes, group);
            const float scale = scales[block];
#pragma unroll
            for (int k = 0; k < 8; ++k)
                if (kWide || k < group.count) x[k] = fmaf(old[k], scale, x[k]);
        }
    }
    uint32_t largest = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) largest = max(largest, bits_of_float(x[k]) & 0x7fffffffu);
    const float scale = block_scale(__reduce_max_sync(0xffffffffu, largest)), inverse = inverse_scale(scale);
    if (threadIdx.x % kWarp == 0) scales[block] = scale;
    if (group.count == 0) return;
    const Philox4 bits = draws.of_group(group.begin / 8);
    Codes8 rounded;
#pragma unroll
    for (int k = 0; k < 8; ++k) rounded.word[k / 4] |= stochastic_code(x[k], inverse, rounding_draw16(bits, k)) << (k % 4 * 8);
    rounded.store<kWide>(codes, group);
}

template <bool kWide> __global__ void __launch_bounds__(kThreads) load_codes_kernel(FlatMatrix<float> g, const uint8_t* codes, const float* scales) {
    const Group group(g.numel);
    if (group.count == 0) return;
    Codes8 old;
    old.load<kWide>(codes, group);
    const float scale = scales[group.begin / kGradientBlock];
    float x[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] = old[k] * scale;
    if constexpr (kWide) store_n(g.data + group.begin, x);
    else store8(g, group.begin, group.count, x);
}

// Whether t can be read in groups of eight elements from its first to its last.
bool wide(const Tensor& t) { return t.contiguous() && t.numel() % 8 == 0 && reinterpret_cast<uintptr_t>(t.data) % std::min<int64_t>(16, 8 * size_of(t.dtype)) == 0; }

void add_cuda(CudaContext& cuda, const GradientSum& sum, Tensor g, bool first, const RoundingDraws& draws) {
    if (g.numel() == 0) return;
    const bool all_wide = wide(sum.values) && wide(g);
    if (sum.values.dtype == DType::bf16) {
        auto kernel = all_wide ? add_bf16_kernel<true> : add_bf16_kernel<false>;
        kernel<<<blocks_for(g.numel()), kThreads, 0, cuda.stream>>>(FlatMatrix<bf16>(sum.values), FlatMatrix<const float>(g), first, draws);
    } else {
        auto kernel = all_wide ? add_codes_kernel<true> : add_codes_kernel<false>;
        kernel<<<blocks_for(g.numel()), kThreads, 0, cuda.stream>>>(sum.values.as<uint8_t>(), sum.scales.as<float>(), FlatMatrix<const float>(g), first, draws);
    }
    LAUNCH_CHECK();
}

void load_codes_cuda(CudaContext& cuda, Tensor g, const GradientSum& sum) {
    if (g.numel() == 0) return;
    auto kernel = wide(sum.values) && wide(g) ? load_codes_kernel<true> : load_codes_kernel<false>;
    kernel<<<blocks_for(g.numel()), kThreads, 0, cuda.stream>>>(FlatMatrix<float>(g), sum.values.as<uint8_t>(), sum.scales.as<float>());
    LAUNCH_CHECK();
}
#endif

void check_shapes(const GradientSum& sum, const Tensor& g) {
    const Tensor& v = sum.values;
    CHECK_INTERNAL(g.dtype == DType::f32, "gradient of %s", safetensors_name(g.dtype));
    if (v.dtype == DType::bf16) {
        CHECK_INTERNAL(v.rows == g.rows && v.cols == g.cols, "sum %lld × %lld, gradient %lld × %lld", (long long)v.rows, (long long)v.cols, (long long)g.rows,
                       (long long)g.cols);
        return;
    }
    CHECK_INTERNAL(v.dtype == DType::u8 && sum.scales.dtype == DType::f32, "sum in %s, scales in %s", safetensors_name(v.dtype), safetensors_name(sum.scales.dtype));
    CHECK_INTERNAL(v.rows == 1 && v.cols == g.numel() && sum.scales.rows == 1 && sum.scales.cols == ceil_div(g.numel(), kGradientBlock),
                   "%lld × %lld codes, %lld × %lld scales, gradient %lld × %lld", (long long)v.rows, (long long)v.cols, (long long)sum.scales.rows,
                   (long long)sum.scales.cols, (long long)g.rows, (long long)g.cols);
}

double sum_bytes(const GradientSum& sum) { return double(sum.values.numel()) * size_of(sum.values.dtype) + double(sum.scales.numel()) * 4; }

}  // namespace

void add_to_gradient_sum(Device& device, const GradientSum& sum, Tensor g, bool first, const RoundingDraws& draws) {
    check_shapes(sum, g);
    CHECK_INTERNAL(draws.begin % 8 == 0, "draws from %lld on", (long long)draws.begin);
    OperationTimer timer(device, "add_to_gradient_sum", 0, double(g.numel()) * 4 + sum_bytes(sum) * (first ? 1 : 2));
    ON_DEVICE(device, add_cuda(device.cuda(), sum, g, first, draws), add_cpu(sum, g, first, draws));
}

void load_gradient_sum(Device& device, Tensor g, const GradientSum& sum) {
    check_shapes(sum, g);
    OperationTimer timer(device, "load_gradient_sum", 0, double(g.numel()) * 4 + sum_bytes(sum));
    if (sum.values.dtype == DType::bf16) return convert(device, g, sum.values);
    ON_DEVICE(device, load_codes_cuda(device.cuda(), g, sum), load_codes_cpu(g, sum));
}

// Sums of gradients in bf16 and 8 bits: each add against fp64, unbiasedness, the error of many adds against theory, special values, layouts.
#include <omp.h>

#include <algorithm>
#include <cfloat>

#include "ops/gradient_sum.h"
#include "test/padding.h"

namespace {

constexpr DType kTypes[] = {DType::bf16, DType::u8};

RoundingDraws draws_of(uint64_t seed, uint32_t step, uint64_t begin = 0) { return {seed, 77, step, begin}; }

// A sum in device memory, poisoned, with some memory behind it. shift: elements by which its values lie off a 16-byte boundary.
class SumOnDevice {
  public:
    GradientSum sum;
    SumOnDevice(Device& device, DType type, int64_t rows, int64_t cols, int64_t pad = 0, int64_t shift = 0)
        : device_(device),
          rows_(rows),
          cols_(cols),
          shift_(shift),
          memory_(device, type, 1, (type == DType::bf16 ? rows * (cols + pad) : rows * cols) + shift + 16),
          scales_(device, DType::f32, 1, ceil_div(rows * cols, kGradientBlock)) {
        sum.values = type == DType::bf16 ? Tensor{memory_.t.at(0, shift), type, rows, cols, cols + pad} : Tensor{memory_.t.at(0, shift), type, 1, rows * cols, rows * cols};
        if (type == DType::u8) sum.scales = scales_;
    }
    void add(Tensor g, bool first, const RoundingDraws& draws) { add_to_gradient_sum(device_, sum, g, first, draws); }
    void add(const std::vector<float>& g, bool first, const RoundingDraws& draws) {
        OnDevice g_(device_, DType::f32, rows_, cols_, g);
        add(g_, first, draws);
    }
    std::vector<float> load() const {
        OnDevice out(device_, DType::f32, rows_, cols_);
        load_gradient_sum(device_, out, sum);
        return out.read();
    }
    std::vector<float> scales() const { return scales_.read(); }
    // Everything in memory, as bytes.
    std::vector<uint8_t> bytes() const {
        std::vector<uint8_t> all = memory_.raw<uint8_t>(), scales = scales_.raw<uint8_t>();
        if (sum.scales) all.insert(all.end(), scales.begin(), scales.end());
        return all;
    }
    // Memory before, between and behind the rows is as it was.
    void check_padding() const {
        const std::vector<uint8_t> all = memory_.raw<uint8_t>();
        const int64_t size = size_of(sum.values.dtype);
        int64_t touched = 0;
        for (int64_t byte = 0; byte < int64_t(all.size()); ++byte) {
            const int64_t i = byte / size - shift_, row = i / sum.values.ld;
            touched += (i < 0 || row >= sum.values.rows || i % sum.values.ld >= sum.values.cols) && all[byte] != 0xff;
        }
        CHECK(touched == 0);
    }

  private:
    Device& device_;
    int64_t rows_, cols_, shift_;
    OnDevice memory_, scales_;
};

// The bf16 numbers below and above x.
std::pair<double, double> bf16_neighbours(double x) {
    const float nearest = to_float(to_bf16(float(x)));
    uint32_t bits = bits_of_float(nearest);
    if (double(nearest) == x) return {x, x};
    const bool away = std::fabs(double(nearest)) < std::fabs(x);
    const float other = float_of_bits(away ? bits + 0x10000 : bits - 0x10000);
    return std::minmax<double>(nearest, other);
}

// Elements whose new sum is neither of the two representable numbers around old + g, in fp64. fp32 arithmetic may be off by a few ulp.
int64_t not_neighbours(DType type, const SumOnDevice& sum, const std::vector<float>& old, const std::vector<float>& g) {
    const std::vector<float> got = sum.load(), scales = sum.scales();
    int64_t wrong = 0;
    std::vector<double> x(g.size()), largest(scales.size(), 0.0);
    for (size_t i = 0; i < x.size(); ++i) {
        x[i] = double(old[i]) + double(g[i]);
        largest[i / kGradientBlock] = std::max(largest[i / kGradientBlock], std::fabs(x[i]));
    }
    for (size_t i = 0; i < x.size(); ++i) {
        const double ulps = 3e-7 * (std::fabs(double(old[i])) + std::fabs(double(g[i])));
        if (type == DType::bf16) {
            const auto low = bf16_neighbours(x[i] - ulps), high = bf16_neighbours(x[i] + ulps);
            wrong += !(got[i] >= low.first && got[i] <= high.second);
        } else {
            const double scale = largest[i / kGradientBlock] / 127, y = x[i] / scale, slack = 1e-4;
            const double code = got[i] / scale;
            wrong += !(code >= std::floor(y - slack) - slack && code <= std::ceil(y + slack) + slack);
            wrong += !(std::fabs(scales[i / kGradientBlock] - scale) <= 1e-6 * scale);
        }
    }
    return wrong;
}

struct Shape {
    int64_t rows, cols, pad_sum, pad_g, shift;
};
const Shape kShapes[] = {{1, 1, 0, 0, 0},   {1, 255, 0, 0, 0}, {3, 7, 2, 5, 1},    {2, 256, 0, 0, 0},   {5, 257, 0, 0, 0},  {16, 64, 0, 0, 3},
                         {40, 104, 8, 24, 0}, {64, 96, 0, 8, 0}, {33, 1000, 1, 0, 0}, {100, 1024, 0, 0, 0}, {7, 8, 0, 0, 8}, {9, 33, 0, 0, 0}};

// One and a second add: neighbours only, the old contents are read just when they should be, nothing beside the matrix is written, the
// same draws give the same bits, others do not.
void check_adds(Device& device) {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (DType type : kTypes)
        for (const Shape& s : kShapes) {
            INFO(safetensors_name(type) << " " << s.rows << " × " << s.cols << ", padded by " << s.pad_sum << " and " << s.pad_g << ", shifted by " << s.shift);
            const int64_t n = s.rows * s.cols;
            auto g = random_normal(rng, n), h = random_normal(rng, n, 0.3f);
            OnDevice g_(device, DType::f32, s.rows, s.cols, g, s.cols + s.pad_g), h_(device, DType::f32, s.rows, s.cols, h, s.cols + s.pad_g);
            SumOnDevice sum(device, type, s.rows, s.cols, s.pad_sum, s.shift), again(device, type, s.rows, s.cols, s.pad_sum, s.shift);
            SumOnDevice other(device, type, s.rows, s.cols, s.pad_sum, s.shift);
            sum.add(g_, true, draws_of(seed, 1));
            CHECK(not_neighbours(type, sum, std::vector<float>(n, 0.0f), g) == 0);
            const auto old = sum.load();
            if (type == DType::bf16) {  // the draws are those of the row-major element numbers
                std::vector<float> expected(n);
                for (int64_t i = 0; i < n; ++i)
                    expected[i] = to_float(to_bf16_stochastic(g[i], rounding_draw16(rounding_draws(seed, uint64_t(i / 8), 77, 1), int(i % 8))));
                CHECK(old == expected);
            }
            sum.add(h_, false, draws_of(seed, 2));
            CHECK(not_neighbours(type, sum, old, h) == 0);
            sum.check_padding();

            OnDevice out(device, DType::f32, s.rows, s.cols, s.cols + s.pad_g);  // load into a padded matrix
            load_gradient_sum(device, out, sum.sum);
            CHECK(out.read() == sum.load());
            CHECK(padding_untouched(out));
            CHECK(padding_untouched(g_));

            again.add(g_, true, draws_of(seed, 1)), again.add(h_, false, draws_of(seed, 2));
            CHECK(again.bytes() == sum.bytes());
            other.add(g_, true, draws_of(seed, 1)), other.add(h_, false, draws_of(seed, 3));
            if (n > 100) CHECK(other.bytes() != sum.bytes());
            if (type == DType::bf16 && s.rows % 2 == 0 && s.cols * s.rows / 2 % 8 == 0) {  // in two slabs of rows, with the draws of the whole
                SumOnDevice slabs(device, type, s.rows, s.cols, s.pad_sum, s.shift);
                for (int64_t begin : {s.rows / 2, int64_t(0)}) {
                    const GradientSum slab{slabs.sum.values.row_slice(begin, s.rows / 2), {}};
                    add_to_gradient_sum(device, slab, g_.t.row_slice(begin, s.rows / 2), true, draws_of(seed, 1, begin * s.cols));
                    add_to_gradient_sum(device, slab, h_.t.row_slice(begin, s.rows / 2), false, draws_of(seed, 2, begin * s.cols));
                }
                CHECK(slabs.bytes() == sum.bytes());
            }
        }
}

// Every row of a matrix is the same gradient, rounded by other draws: the mean over the rows is that gradient, after one add and after two.
// At 5.2σ for each of 512 columns there is one false alarm in some thousand runs.
void check_unbiased(Device& device) {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    const int64_t n = 2 * kGradientBlock, rows = 4000;
    const std::vector<std::vector<float>> gradients = {random_normal(rng, n), random_normal(rng, n, 0.05f)};
    for (DType type : kTypes) {
        SumOnDevice sum(device, type, rows, n);
        std::vector<double> exact(n, 0.0);
        for (int add = 0; add < 2; ++add) {
            INFO(safetensors_name(type) << ", add " << add + 1);
            std::vector<float> all;
            for (int64_t r = 0; r < rows; ++r) all.insert(all.end(), gradients[add].begin(), gradients[add].end());
            sum.add(all, add == 0, draws_of(seed, uint32_t(add)));
            for (int64_t c = 0; c < n; ++c) exact[c] += gradients[add][c];
            const std::vector<float> got = sum.load();
            double total = 0, total_variance = 0;
            int64_t biased = 0;
            for (int64_t c = 0; c < n; ++c) {
                double mean = 0, square = 0;
                for (int64_t r = 0; r < rows; ++r) {
                    const double error = got[r * n + c] - exact[c];
                    mean += error / rows, square += error * error / rows;
                }
                // A fraction that should round one way once in 4000 times may do so never or twice: some steps of slack.
                const double step = type == DType::bf16 ? std::fabs(exact[c]) / 128 : 4.5 / 127, slack = 8 * step / rows;
                biased += !(std::fabs(mean) <= 5.2 * std::sqrt(square / rows) + slack);
                total += mean, total_variance += square / rows;
            }
            CHECK(biased == 0);
            CHECK(std::fabs(total) <= 4.5 * std::sqrt(total_variance));
            CHECK(total_variance > 0);
        }
    }
}

// 512 adds of 0.001 to sums between 1 and 1.4: rounding to nearest loses every one in bf16, stochastic rounding keeps 0.512 on average.
void check_small_gradients(Device& device) {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    const int64_t n = 4096, adds = 512;
    std::vector<float> start(n);
    for (float& x : start) x = to_float(to_bf16(1 + 0.4f * std::uniform_real_distribution<float>()(rng)));
    OnDevice small(device, DType::f32, 1, n, std::vector<float>(n, 0.001f));
    auto mean_gain = [&](const std::vector<float>& x) {
        double gain = 0;
        for (int64_t i = 0; i < n; ++i) gain += (double(x[i]) - start[i]) / double(n);
        return gain;
    };
    for (DType type : kTypes) {
        INFO(safetensors_name(type));
        SumOnDevice sum(device, type, 1, n);
        sum.add(start, true, draws_of(seed, 0));
        for (int64_t i = 1; i <= adds; ++i) sum.add(small, false, draws_of(seed, uint32_t(i)));
        // One rounding errs by half a step in rms at most; steps are 2⁻⁷ in bf16, under 2/127 in 8 bits.
        const double sigma = (type == DType::bf16 ? 1.0 / 256 : 1.0 / 127) * std::sqrt(double(adds + 1) / double(n));
        CHECK(std::fabs(mean_gain(sum.load()) - 0.001 * adds) < 4.5 * sigma);
    }
    std::vector<float> nearest = start;
    for (int64_t k = 0; k < adds; ++k)
        for (float& x : nearest) x = to_float(to_bf16(x + 0.001f));
    CHECK(mean_gain(nearest) == 0);
}

// The relative error of a sum of standard normal gradients, against theory: a number at the fraction f between two representable ones a step
// apart is rounded with variance step²·f(1 − f), step²/6 on average, and the errors of all adds are independent.
void check_error_of_many_adds(Device& device) {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    const int64_t n = 1 << 13;
    for (DType type : kTypes) {
        SumOnDevice sum(device, type, 1, n);
        std::vector<double> exact(n, 0.0), nearest(n, 0.0);
        double variance = 0;
        for (int add = 1; add <= 512; ++add) {
            const auto g = random_normal(rng, n);
            sum.add(g, add == 1, draws_of(seed, uint32_t(add)));
            for (int64_t i = 0; i < n; ++i) exact[i] += g[i], nearest[i] = to_float(to_bf16(float(nearest[i]) + g[i]));
            for (int64_t begin = 0; begin < n; begin += kGradientBlock) {
                double largest = 0, squares = 0;  // of the block's magnitudes; of its steps in bf16
                for (int64_t i = begin; i < begin + kGradientBlock; ++i)
                    largest = std::max(largest, std::fabs(exact[i])), squares += std::pow(std::ldexp(1.0, std::ilogb(exact[i]) - 7), 2);
                variance += (type == DType::bf16 ? squares : kGradientBlock * std::pow(largest / 127, 2)) / 6;
            }
            if (add != 1 && add != 16 && add != 64 && add != 512) continue;
            double norm = 0;
            for (double x : exact) norm += x * x;
            const double error = relative_error(sum.load(), exact), theory = std::sqrt(variance / norm);
            INFO(safetensors_name(type) << ", " << add << " adds: error " << error << ", theory " << theory << ", bf16 to nearest " << relative_error(nearest, exact));
            CHECK(std::fabs(error / theory - 1) < 0.06);
            if (type == DType::u8 && add == 1) CHECK(theory == Approx(std::sqrt(1.0 / 6) * 3.05 / 127).epsilon(0.1));  // 3.05σ: the largest of 256, rms
        }
    }
}

// NaN, Inf, zero, numbers at both ends of the range, whole numbers.
void check_special_values(Device& device) {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    const int64_t n = 4 * kGradientBlock + 100, bad = kGradientBlock + rng() % kGradientBlock;
    for (DType type : kTypes)
        for (float value : {NAN, INFINITY, -INFINITY}) {
            INFO(safetensors_name(type) << " " << value << " at " << bad);
            auto g = random_normal(rng, n);
            g[bad] = value;
            SumOnDevice sum(device, type, 1, n);
            sum.add(g, true, draws_of(seed, 1));
            sum.add(random_normal(rng, n), false, draws_of(seed, 2));
            const auto x = sum.load();
            int64_t wrong = 0;
            for (int64_t i = 0; i < n; ++i) {
                const bool lost = type == DType::bf16 ? i == bad : i / kGradientBlock == 1;
                wrong += lost ? !(std::isnan(x[i]) || (type == DType::bf16 && x[i] == value)) : !std::isfinite(x[i]);
            }
            CHECK(wrong == 0);
            sum.add(std::vector<float>(n, 1.0f), true, draws_of(seed, 3));  // a new sum forgets it
            CHECK(sum.load() == std::vector<float>(n, 1.0f));
        }

    SumOnDevice codes(device, DType::u8, 1, n), halves(device, DType::bf16, 1, n);
    codes.add(std::vector<float>(n, 0.0f), true, draws_of(seed, 4));
    auto bytes = codes.bytes();
    bytes.erase(bytes.begin() + n, bytes.begin() + n + 16);  // the memory behind the codes
    CHECK(bytes == std::vector<uint8_t>(bytes.size(), 0));
    CHECK(codes.load() == std::vector<float>(n, 0.0f));
    codes.add(std::vector<float>(n, -126 * FLT_MIN), true, draws_of(seed, 4));  // its scale would be subnormal
    CHECK(codes.load() == std::vector<float>(n, 0.0f));
    codes.add(std::vector<float>(n, -128 * FLT_MIN), true, draws_of(seed, 4));
    CHECK(relative_error(codes.load(), std::vector<float>(n, -128 * FLT_MIN)) < 1e-6);
    codes.add(std::vector<float>(n, -FLT_MAX / 1.5f), true, draws_of(seed, 4));
    CHECK(relative_error(codes.load(), std::vector<float>(n, -FLT_MAX / 1.5f)) < 1e-6);
    codes.add(std::vector<float>(n, -FLT_MAX / 1.5f), false, draws_of(seed, 4));  // overflows
    CHECK(std::isnan(codes.load()[n - 1]));
    halves.add(std::vector<float>(n, FLT_MAX), true, draws_of(seed, 4));
    CHECK(halves.load() == std::vector<float>(n, float_of_bits(0x7f7f0000u)));

    // Multiples of the step stay as they are whatever the draws, also when zero is added to them. A step need not be a power of 2.
    std::vector<float> whole(n), zero(n, 0.0f);
    for (float& x : whole) x = float(int64_t(rng() % 255) - 127);
    for (int64_t i = 0; i < n; i += 100) whole[i] = rng() % 2 ? 127.0f : -127.0f;
    for (float step : {1.0f, 0.25f, 3.0f}) {
        auto g = whole;
        for (float& x : g) x *= step;
        for (uint32_t d = 0; d < 20; ++d) {
            codes.add(g, true, draws_of(seed, 10 + d));
            REQUIRE(codes.load() == g);
            codes.add(zero, false, draws_of(seed, 40 + d));
            REQUIRE(codes.load() == g);
        }
    }
    for (float& x : whole) x = float(int64_t(rng() % 257) - 128);  // bf16 numbers
    for (uint32_t d = 0; d < 20; ++d) {
        halves.add(whole, true, draws_of(seed, 10 + d));
        REQUIRE(halves.load() == whole);
    }
}

}  // namespace

TEST_CASE("gradient sums round to a neighbour, write nothing else and repeat", "[gradient_sum]") { check_adds(*test_device("cpu")); }
TEST_CASE("gradient sums on the GPU: neighbours, layouts, repetition", "[gradient_sum][gpu]") { check_adds(*test_device("cuda")); }
TEST_CASE("gradient sums are unbiased", "[gradient_sum]") { check_unbiased(*test_device("cpu")); }
TEST_CASE("gradient sums on the GPU are unbiased", "[gradient_sum][gpu]") { check_unbiased(*test_device("cuda")); }
TEST_CASE("gradient sums keep small gradients", "[gradient_sum]") { check_small_gradients(*test_device("cpu")); }
TEST_CASE("gradient sums on the GPU keep small gradients", "[gradient_sum][gpu]") { check_small_gradients(*test_device("cuda")); }
TEST_CASE("the error of many adds is what theory says", "[gradient_sum]") { check_error_of_many_adds(*test_device("cpu")); }
TEST_CASE("the error of many adds on the GPU", "[gradient_sum][gpu]") { check_error_of_many_adds(*test_device("cuda")); }
TEST_CASE("gradient sums of special values", "[gradient_sum]") { check_special_values(*test_device("cpu")); }
TEST_CASE("gradient sums of special values on the GPU", "[gradient_sum][gpu]") { check_special_values(*test_device("cuda")); }

TEST_CASE("gradient sums do not depend on the number of threads", "[gradient_sum]") {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    auto device = test_device("cpu");
    const auto g = random_normal(rng, 37 * 501);
    const int threads = omp_get_max_threads();
    for (DType type : kTypes) {
        std::vector<uint8_t> bytes;
        for (int count : {1, 2, 5}) {
            omp_set_num_threads(count);
            SumOnDevice sum(*device, type, 37, 501);
            sum.add(g, true, draws_of(seed, 1)), sum.add(g, false, draws_of(seed, 2));
            if (count == 1) bytes = sum.bytes();
            CHECK(bytes == sum.bytes());
        }
        omp_set_num_threads(threads);
    }
}

TEST_CASE("gradient sums have the same bits on CPU and GPU", "[gradient_sum][gpu]") {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    auto cpu = test_device("cpu"), gpu = test_device("cuda");
    std::vector<Shape> shapes(std::begin(kShapes), std::end(kShapes));
    shapes.push_back({1000, 1024, 0, 0, 0}), shapes.push_back({1000, 1023, 0, 0, 0}), shapes.push_back({500, 1024, 8, 16, 0});
    for (DType type : kTypes)
        for (const Shape& s : shapes) {
            INFO(safetensors_name(type) << " " << s.rows << " × " << s.cols << ", padded by " << s.pad_sum << " and " << s.pad_g << ", shifted by " << s.shift);
            SumOnDevice on_cpu(*cpu, type, s.rows, s.cols, s.pad_sum, s.shift), on_gpu(*gpu, type, s.rows, s.cols, s.pad_sum, s.shift);
            for (uint32_t add = 0; add < 5; ++add) {
                auto g = random_normal(rng, s.rows * s.cols, float(std::pow(10, 3 * random_normal(rng, 1)[0])));  // all sorts of sizes
                for (int64_t i = 0; i < kGradientBlock && s.rows > 16; ++i) g[i] *= 1e-38f;
                if (type == DType::u8 && add == 4) g[rng() % g.size()] = NAN;
                const RoundingDraws draws = draws_of(seed, add, (uint64_t(1) << 36) + 8 * add);
                on_cpu.add(OnDevice(*cpu, DType::f32, s.rows, s.cols, g, s.cols + s.pad_g), add == 0, draws);
                on_gpu.add(OnDevice(*gpu, DType::f32, s.rows, s.cols, g, s.cols + s.pad_g), add == 0, draws);
                REQUIRE(on_cpu.bytes() == on_gpu.bytes());
                if (add < 4) REQUIRE(on_cpu.load() == on_gpu.load());
            }
        }
}

TEST_CASE("gradient sums of nothing, on a dry device, of shapes that do not fit", "[gradient_sum]") {
    auto device = test_device("cpu");
    for (DType type : kTypes) {
        SumOnDevice empty(*device, type, 0, 5);
        empty.add(std::vector<float>{}, true, RoundingDraws{});
        CHECK(empty.load().empty());
    }
    auto dry = Device::open_dry(DeviceKind::cuda);
    const Tensor g{nullptr, DType::f32, 10, 64, 64}, codes{nullptr, DType::u8, 1, 640, 640}, scales{nullptr, DType::f32, 1, 3, 3}, halves{nullptr, DType::bf16, 10, 64, 72};
    for (const GradientSum& sum : {GradientSum{codes, scales}, GradientSum{halves, {}}}) {
        add_to_gradient_sum(*dry, sum, g, false, RoundingDraws{});
        load_gradient_sum(*dry, g, sum);
        CHECK_THROWS_AS(add_to_gradient_sum(*dry, sum, g.row_slice(0, 9), false, RoundingDraws{}), InternalError);
        CHECK_THROWS_AS(load_gradient_sum(*dry, g.row_slice(0, 9), sum), InternalError);
        CHECK_THROWS_AS(add_to_gradient_sum(*dry, sum, g, false, draws_of(1, 1, 4)), InternalError);  // begin is no multiple of 8
    }
    CHECK_THROWS_AS(add_to_gradient_sum(*dry, GradientSum{codes, {}}, g, false, RoundingDraws{}), InternalError);
    CHECK(dry->scratch_high_water() == 0);
}

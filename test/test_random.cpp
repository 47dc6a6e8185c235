// Philox, stochastic rounding, round to nearest, normal draws.
#include <algorithm>
#include <array>

#include "ops/random.h"
#include "runtime/philox.h"
#include "test/support.h"

namespace {

bool same(const Philox4& p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return p.x[0] == a && p.x[1] == b && p.x[2] == c && p.x[3] == d; }

// Value of a bf16 bit pattern in fp64; the pattern of infinity counts as 2^128, where the next number would be.
double grid_value(uint32_t bits) {
    double magnitude = (bits & 0x7fff) == 0x7f80 ? std::ldexp(1.0, 128) : std::fabs(double(float_of_bits(bits << 16)));
    return (bits & 0x8000) ? -magnitude : magnitude;
}

}  // namespace

TEST_CASE("philox4x32-10 known answers", "[random]") {
    CHECK(same(philox4x32(0, 0, 0, 0, 0, 0), 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8));
    const uint32_t ones = 0xffffffff;
    CHECK(same(philox4x32(ones, ones, ones, ones, ones, ones), 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd));
    CHECK(same(philox4x32(0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0), 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1));
}

TEST_CASE("rounding draws: counter and key layout, halves of words", "[random]") {
    const uint64_t seed = 0x299f31d0a4093822, group = 0x85a308d3243f6a88;
    Philox4 p = rounding_draws(seed, group, 0x13198a2e, 0x03707344);
    const uint32_t expected[8] = {0xfe09, 0xd16c, 0xcceb, 0x94fd, 0xe420, 0x5001, 0x6ea1, 0x2412};
    for (int i = 0; i < 8; ++i) CHECK(rounding_draw16(p, i) == expected[i]);
}

TEST_CASE("uniform01 is in (0, 1]", "[random]") {
    CHECK(uniform01(0) > 0.0f);
    CHECK(uniform01(0xffffffff) == 1.0f);
    CHECK(uniform01(0x80000000) == Approx(0.5).margin(1e-6));
}

TEST_CASE("to_bf16 rounds to nearest, ties to even, for every upper half", "[random]") {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    // The rounding of a given upper half depends only on where the lower half lies, so its edges and a few inner points suffice.
    int64_t wrong = 0;
    for (uint32_t high = 0; high < 65536; ++high) {
        const bool finite = (high & 0x7f80) != 0x7f80;
        for (uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu, uint32_t(rng() & 0xffff), uint32_t(rng() & 0xffff)}) {
            const float x = float_of_bits(high << 16 | low);
            const uint32_t got = to_bf16(x).bits;
            if (std::isnan(x)) {
                wrong += !std::isnan(to_float(bf16{uint16_t(got)}));
            } else if (!finite) {
                wrong += got != high;
            } else {
                const double below = std::fabs(double(x) - grid_value(high)), above = std::fabs(grid_value(high + 1) - double(x));
                const uint32_t expected = below < above || (below == above && high % 2 == 0) ? high : high + 1;
                wrong += got != expected;
            }
        }
    }
    CHECK(wrong == 0);
}

TEST_CASE("stochastic rounding: expectation exact over all draws, values are the two neighbours", "[random]") {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (int trial = 0; trial < 40; ++trial) {
        // Random bits: all signs and exponents, below the largest bf16.
        uint32_t bits = uint32_t(rng());
        if (trial == 0) bits = 0;
        if (trial == 1) bits = 0x00000001;  // the smallest subnormal
        if ((bits & 0x7fffffff) > 0x7f7f0000) bits &= 0x807fffff;
        const float x = float_of_bits(bits);
        const double down = to_float(bf16{uint16_t(bits >> 16)});
        const double up = bits & 0xffff ? grid_value((bits >> 16) + 1) : down;
        int64_t ups = 0, strays = 0;
        for (uint32_t draw = 0; draw < 65536; ++draw) {
            double y = to_float(to_bf16_stochastic(x, draw));
            ups += y == up, strays += y != up && y != down;
        }
        INFO("x " << x);
        CHECK(strays == 0);
        if (up != down) CHECK(down + (up - down) * (double(ups) / 65536) == double(x));  // exact in fp64
    }
    for (float x : {INFINITY, -INFINITY}) CHECK(to_float(to_bf16_stochastic(x, 0xffff)) == x);
    CHECK(std::isnan(to_float(to_bf16_stochastic(NAN, 0xffff))));
    for (uint32_t draw : {0u, 0x8000u, 0xffffu}) {
        CHECK(std::isfinite(to_float(to_bf16_stochastic(3.4028234e38f, draw))));
        CHECK(std::isfinite(to_float(to_bf16_stochastic(-3.4028234e38f, draw))));
    }
}

TEST_CASE("stochastic rounding with Philox draws is unbiased", "[random]") {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    const int64_t n = 1 << 14;
    double pooled = 0;
    const int values = 50;
    for (int v = 0; v < values; ++v) {
        uint32_t bits = (uint32_t(rng()) & 0x807fffff) | 0x3f000000;  // ±[0.5, 1)
        bits = (bits & 0xffff0000) | (0x0800 + uint32_t(rng()) % 0xf000);  // between neighbours, away from them
        const float x = float_of_bits(bits);
        const double p = (bits & 0xffff) / 65536.0, gap = 1.0 / 256, sigma = gap * std::sqrt(p * (1 - p));
        double sum = 0;
        for (int64_t i = 0; i < n; ++i) {
            double y = to_float(to_bf16_stochastic(x, rounding_draw16(rounding_draws(seed, uint64_t(i) / 8, uint32_t(v), 7), int(i % 8))));
            REQUIRE(std::fabs(y - double(x)) < gap);
            sum += y - double(x);
        }
        const double z = sum / n / (sigma / std::sqrt(double(n)));
        INFO("x " << x << " z " << z);
        CHECK(std::fabs(z) < 5.5);
        pooled += z;
    }
    INFO("pooled z " << pooled / std::sqrt(double(values)));
    CHECK(std::fabs(pooled) / std::sqrt(double(values)) <= 4);
}

TEST_CASE("normal draws have the moments and the distribution of N(0, 1)", "[random]") {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    const int64_t n = 100000;
    std::vector<double> x(n);
    double m1 = 0, m2 = 0, m3 = 0, m4 = 0, pair = 0;
    for (int64_t i = 0; i < n; ++i) {
        x[i] = normal_draw(seed, 3, i);
        m1 += x[i], m2 += x[i] * x[i], m3 += std::pow(x[i], 3), m4 += std::pow(x[i], 4);
        if (i % 2) pair += x[i] * x[i - 1];
    }
    const double root = std::sqrt(double(n));  // five standard deviations of each moment
    CHECK(std::fabs(m1 / n) < 5 / root);
    CHECK(std::fabs(m2 / n - 1) < 5 * std::sqrt(2.0) / root);
    CHECK(std::fabs(m3 / n) < 5 * std::sqrt(15.0) / root);
    CHECK(std::fabs(m4 / n - 3) < 5 * std::sqrt(96.0) / root);
    CHECK(std::fabs(pair / (n / 2)) < 5 / std::sqrt(double(n / 2)));
    std::sort(x.begin(), x.end());
    double distance = 0;  // Kolmogorov–Smirnov
    for (int64_t i = 0; i < n; ++i) distance = std::max(distance, std::fabs(0.5 * std::erfc(-x[i] / std::sqrt(2.0)) - (i + 0.5) / n));
    CHECK(distance * root < 2.6);
    CHECK(normal_draw(seed, 3, 17) == normal_draw(seed, 3, 17));
    CHECK(normal_draw(seed, 3, 17) != normal_draw(seed, 4, 17));
    CHECK(normal_draw(seed, 3, 17) != normal_draw(seed + 1, 3, 17));
}

TEST_CASE("the logarithm and the circle of normal draws agree with the library to the last bits of fp64", "[random]") {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    double worst = 0;
    for (int i = 0; i < 200000; ++i) {
        uint32_t u = i < 100 ? uint32_t(i) : i < 200 ? ~uint32_t(i - 100) : i < 300 ? (uint32_t(i) << 29) + uint32_t(i % 3) - 1 : uint32_t(rng());
        long double x = ((long double)u + 1) / 4294967296.0L, angle = 6.283185307179586476925L * ((long double)u / 4294967296.0L), log = std::log(x);
        worst = std::max(worst, double(std::fabs((long double)portable_log(double(x)) - log) / std::max(1e-300L, std::fabs(log))));
        worst = std::max(worst, double(std::fabs((long double)portable_cos_turns(u, 0) - std::cos(angle))));
        worst = std::max(worst, double(std::fabs((long double)portable_cos_turns(u, 3) - std::sin(angle))));
    }
    CHECK(worst < 4e-16);
    CHECK(portable_log(1.0) == 0.0);
}

namespace {

void check_fill(Device& device) {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    for (uint64_t begin : {uint64_t(0), uint64_t(1), uint64_t(7), (uint64_t(1) << 33) + 5})
        for (auto [rows, cols, ld] : {std::array<int64_t, 3>{1, 1, 1}, {1, 2, 2}, {3, 5, 5}, {7, 33, 40}, {64, 100, 100}}) {
            OnDevice x(device, DType::f32, rows, cols, ld);
            fill_normal(device, x, 0.5f, seed, 9, begin);
            std::vector<float> values = x.read();
            int64_t wrong = 0;
            for (int64_t i = 0; i < rows * cols; ++i) wrong += values[i] != 0.5f * normal_draw(seed, 9, begin + uint64_t(i));
            INFO(rows << " x " << cols << " ld " << ld << " from " << begin);
            CHECK(wrong == 0);
            fill(device, x, 3.0f);
            CHECK(x.read() == std::vector<float>(rows * cols, 3.0f));
            std::vector<uint32_t> raw = x.raw<uint32_t>();  // padding is left alone
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t c = cols; c < ld; ++c) REQUIRE(raw[r * ld + c] == 0xffffffffu);
        }
}

}  // namespace

TEST_CASE("fill_normal is normal_draw element by element", "[random]") { check_fill(*test_device("cpu")); }
TEST_CASE("fill_normal on the GPU has the bits of the CPU", "[random][gpu]") {
    auto gpu = test_device("cuda"), cpu = test_device("cpu");
    check_fill(*gpu);
    OnDevice a(*gpu, DType::f32, 1000, 2001), b(*cpu, DType::f32, 1000, 2001);
    uint64_t seed = fresh_seed();
    fill_normal(*gpu, a, 0.02f, seed, 5, 3);
    fill_normal(*cpu, b, 0.02f, seed, 5, 3);
    CHECK(a.read() == b.read());
}

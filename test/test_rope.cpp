#include <complex>

#include "ops/rope.h"
#include "test/padding.h"

namespace {

struct Shape {
    int64_t batch, seq, heads, kv_heads, head_dim, extra_cols, pad;
};
const Shape kShapes[] = {{1, 1, 1, 1, 2, 0, 0}, {2, 5, 3, 1, 6, 0, 1}, {3, 7, 2, 2, 16, 0, 0}, {2, 33, 8, 8, 64, 0, 8}, {1, 50, 6, 2, 128, 8, 0}, {2, 9, 4, 4, 64, 0, 3}, {3, 4, 5, 5, 48, 1, 0}};

void check_rope(Device& device) {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (const Shape& s : kShapes) {
        const int64_t rows = s.batch * s.seq, cols = (s.heads + 2 * s.kv_heads) * s.head_dim + s.extra_cols, half = s.head_dim / 2;
        const double base = 10000;
        INFO("seq " << s.seq << " heads " << s.heads << "/" << s.kv_heads << " of " << s.head_dim << " pad " << s.pad);
        auto x = as_activation(device, random_normal(rng, rows * cols));
        OnDevice table(device, DType::f32, s.seq + 3, s.head_dim, rope_table(s.seq + 3, s.head_dim, base));
        OnDevice qkv(device, device.activation_dtype(), rows, cols, x, cols + s.pad);
        // Pair (j, j + half) of each q and k head is a complex number turned by pos·base^(−2j/d).
        for (bool inverse : {false, true}) {
            std::vector<double> expected(x.begin(), x.end());
            for (int64_t t = 0; t < rows; ++t)
                for (int64_t head = 0; head < s.heads + s.kv_heads; ++head)
                    for (int64_t j = 0; j < half; ++j) {
                        const int64_t at = t * cols + head * s.head_dim + j;
                        const double angle = double(t % s.seq) / std::pow(base, double(j) / double(half));
                        auto z = std::complex<double>(x[at], x[at + half]) * std::polar(1.0, inverse ? -angle : angle);
                        expected[at] = z.real(), expected[at + half] = z.imag();
                    }
            qkv.write(x);
            rope_inplace(device, qkv, table, s.seq, s.heads, s.kv_heads, s.head_dim, inverse);
            auto got = qkv.read();
            CHECK(relative_error(got, expected) < (device.is_cuda() ? 2.5e-3 : 3e-7));
            int64_t changed = 0;  // the v heads and what follows them
            for (int64_t t = 0; t < rows; ++t)
                for (int64_t c = (s.heads + s.kv_heads) * s.head_dim; c < cols; ++c) changed += got[t * cols + c] != x[t * cols + c];
            CHECK(changed == 0);
            CHECK(padding_untouched(qkv));
        }
        rope_inplace(device, qkv, table, s.seq, s.heads, s.kv_heads, s.head_dim, false);  // undoes the inverse
        CHECK(relative_error(qkv.read(), x) < (device.is_cuda() ? 4e-3 : 5e-7));
    }
}

}  // namespace

TEST_CASE("rope table is the fp64 angle rounded once", "[rope]") {
    const int64_t positions = 2048, d = 64;
    auto table = rope_table(positions, d, 10000);
    REQUIRE(int64_t(table.size()) == positions * d);
    double worst = 0;
    for (int64_t p : {int64_t(0), int64_t(1), int64_t(77), positions - 1})
        for (int64_t j = 0; j < d / 2; ++j) {
            const long double angle = p * std::exp(-std::log(10000.0L) * j / (d / 2));
            worst = std::max({worst, std::fabs(double(table[p * d + j] - std::cos(angle))), std::fabs(double(table[p * d + d / 2 + j] - std::sin(angle)))});
        }
    CHECK(worst < 6.1e-8);  // half an ulp of fp32 below 1
    CHECK(table[d] == float(std::cos(1.0)));
}

TEST_CASE("rope rotates q and k by position and leaves v", "[rope]") { check_rope(*test_device("cpu")); }
TEST_CASE("rope on the GPU", "[rope][gpu]") { check_rope(*test_device("cuda")); }

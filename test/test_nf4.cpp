// NF4: tables, bitsandbytes' own results, error statistics of N(0, 1), and properties on odd and padded shapes.
#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>

#include "dynamic_map.h"
#include "nf4.h"
#include "test/fixture.h"
#include "test/support.h"

namespace {

struct QuantizedOnDevice {
    OnDevice codes, absmax, codes8, scale2, offset;
    Nf4Tensor q;
    QuantizedOnDevice(Device& device, int64_t rows, int64_t cols, bool nested)
        : codes(device, DType::u8, 1, (rows * cols + 1) / 2),
          absmax(device, DType::f32, 1, ceil_div(rows * cols, kNf4Block)),
          codes8(device, DType::u8, 1, ceil_div(rows * cols, kNf4Block)),
          scale2(device, DType::f32, 1, ceil_div(ceil_div(rows * cols, kNf4Block), kNestedBlock)),
          offset(device, DType::f32, 1, 1) {
        q.rows = rows, q.cols = cols, q.nested = nested;
        q.codes = codes;
        if (nested) q.codes8 = codes8, q.scale2 = scale2, q.offset = offset;
        else q.absmax = absmax;
    }
    std::vector<int> unpacked() const {
        std::vector<uint8_t> bytes = codes.raw<uint8_t>();
        std::vector<int> out;
        for (int64_t e = 0; e < q.numel(); ++e) out.push_back((bytes[e / 2] >> (e % 2 ? 0 : 4)) & 15);
        return out;
    }
    // The scales dequantization will use, two roundings each.
    std::vector<float> scales() const {
        if (!q.nested) return absmax.read();
        std::vector<float> s2 = scale2.read(), out;
        std::vector<uint8_t> c8 = codes8.raw<uint8_t>();
        for (size_t b = 0; b < c8.size(); ++b) {
            volatile float product = dynamic_map_signed()[c8[b]] * s2[b / kNestedBlock];
            out.push_back(product + offset.read()[0]);
        }
        return out;
    }
};

uint32_t crc32(const void* data, size_t n) {
    uint32_t crc = ~0u;
    for (size_t i = 0; i < n; ++i) {
        crc ^= static_cast<const uint8_t*>(data)[i];
        for (int k = 0; k < 8; ++k) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    }
    return ~crc;
}

int64_t ulps(float a, float b) { return std::llabs(int64_t(int32_t(bits_of_float(a))) - int64_t(int32_t(bits_of_float(b)))); }

int code_by_counting(float z) {
    int code = 0;
    for (int i = 0; i < 15; ++i) code += z > nf4_threshold(i);
    return code;
}

int dynamic_code_by_counting(const float* value, float z) {
    int code = 0;
    for (int k = 0; k < 255; ++k) code += z > float((double(value[k]) + double(value[k + 1])) / 2);
    return code;
}

void compare_with_bitsandbytes(Device& device) {
    auto fixtures = read_fixtures("test/fixtures/nf4.bin");
    int cases = 0;
    for (auto& [key, shape] : fixtures) {
        if (key.size() < 6 || key.substr(key.size() - 6) != ".shape") continue;
        ++cases;
        std::string name = key.substr(0, key.size() - 6);
        INFO(name);
        const Fixture& x = fixtures.at(name + ".x");
        int64_t rows = int64_t(shape.floats()[0]), cols = int64_t(shape.floats()[1]), numel = rows * cols;
        // Also in padded memory: the blocks must follow the logical order.
        for (int64_t ld : {cols, cols + 11, round_up(cols, 8) + 8}) {
            OnDevice w(device, x.dtype, rows, cols, x.floats(), ld);
            QuantizedOnDevice single(device, rows, cols, false), nested(device, rows, cols, true);
            nf4_quantize(device, single.q, w, nullptr);
            nf4_quantize(device, nested.q, w, nullptr);

            REQUIRE(single.absmax.read() == fixtures.at(name + ".absmax").floats());
            std::vector<uint8_t> ours = single.codes.raw<uint8_t>(), theirs = fixtures.at(name + ".codes").as<uint8_t>();
            REQUIRE(ours.size() == theirs.size());
            int64_t flips = 0;
            for (size_t i = 0; i < ours.size(); ++i) flips += (ours[i] >> 4 != theirs[i] >> 4) + ((ours[i] & 15) != (theirs[i] & 15));
            // fp32: x·(1/a) against x/a flips about 5e-8 of the codes.
            REQUIRE(flips <= (x.dtype == DType::bf16 ? 0 : 1 + numel / 1000000));
            REQUIRE(nested.codes.raw<uint8_t>() == ours);

            REQUIRE(ulps(nested.offset.read()[0], fixtures.at(name + ".offset").floats()[0]) <= 2);
            std::vector<uint8_t> codes8 = nested.codes8.raw<uint8_t>(), their_codes8 = fixtures.at(name + ".codes8").as<uint8_t>();
            std::vector<float> scale2 = nested.scale2.read(), their_scale2 = fixtures.at(name + ".scale2").floats();
            REQUIRE(codes8.size() == their_codes8.size());
            REQUIRE(scale2.size() == their_scale2.size());
            float offset = fixtures.at(name + ".offset").floats()[0];
            std::vector<float> scales = nested.scales();
            int64_t moved = 0;
            for (size_t b = 0; b < codes8.size(); ++b) {
                if (scale2[b / kNestedBlock] == 0) continue;  // all absmax equal: bitsandbytes divides 0 by 0, any code will do
                moved += codes8[b] != their_codes8[b];
                REQUIRE(std::abs(codes8[b] - their_codes8[b]) <= 1);
                if (codes8[b] != their_codes8[b]) continue;
                float theirs_reconstructed = dynamic_map_signed()[their_codes8[b]] * their_scale2[b / kNestedBlock] + offset;
                // A difference of ulps in the larger of the two terms, which may cancel in the sum.
                float large = std::max(std::fabs(offset), their_scale2[b / kNestedBlock]);
                REQUIRE(std::fabs(scales[b] - theirs_reconstructed) <= 4 * FLT_EPSILON * large);
            }
            REQUIRE(moved <= 1 + int64_t(codes8.size()) / 200);

            if (!fixtures.count(name + ".single")) continue;
            OnDevice back(device, x.dtype, rows, cols, ld);
            nf4_dequantize(device, back, single.q);
            if (flips == 0) REQUIRE(back.read() == fixtures.at(name + ".single").floats());
            nf4_dequantize(device, back, nested.q);
            if (moved == 0 && name == "bf16_square") REQUIRE(relative_error(back.read(), fixtures.at(name + ".nested").floats()) < 1e-4);
        }
    }
    REQUIRE(cases == 8);
}

void check_properties(Device& device) {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    const int64_t shapes[][3] = {{1, 1, 1},      {1, 63, 63},     {3, 5, 7},        {64, 64, 64},    {7, 129, 136},  {16, 1376, 1408},
                                 {5, 2736, 2752}, {3, 5461, 5504}, {2, 5461, 5461}, {4, 5461, 5463}, {67, 100, 101}, {130, 1030, 1032}};
    for (auto& [rows, cols, ld] : shapes)
        for (DType dtype : {DType::f32, DType::bf16}) {
            INFO(rows << " × " << cols << ", ld " << ld << ", " << safetensors_name(dtype));
            std::vector<float> x = random_normal(rng, rows * cols, float(std::exp(std::normal_distribution<double>(0, 4)(rng))));
            if (dtype == DType::bf16) x = round_to_bf16(x);
            OnDevice w(device, dtype, rows, cols, x, ld);
            QuantizedOnDevice single(device, rows, cols, false);
            nf4_quantize(device, single.q, w, nullptr);

            // The definition, element by element.
            std::vector<int> codes = single.unpacked();
            std::vector<float> absmax = single.absmax.read();
            int64_t wrong_codes = 0;
            for (int64_t b = 0; b < single.q.blocks(); ++b) {
                int64_t begin = b * kNf4Block, end = std::min(rows * cols, begin + kNf4Block);
                float a = 0;
                bool extreme = false;
                for (int64_t e = begin; e < end; ++e) a = std::max(a, std::fabs(x[e])), extreme |= codes[e] == 0 || codes[e] == 15;
                REQUIRE(absmax[b] == a);
                REQUIRE(extreme);
                for (int64_t e = begin; e < end; ++e) wrong_codes += codes[e] != code_by_counting(x[e] * (1.0f / a));
            }
            REQUIRE(wrong_codes == 0);
            if (rows * cols % 2) REQUIRE((single.codes.raw<uint8_t>().back() & 15) == 7);

            for (bool nested : {false, true})
                for (DType out : {DType::f32, DType::bf16}) {
                    QuantizedOnDevice q(device, rows, cols, nested);
                    nf4_quantize(device, q.q, w, nullptr);
                    OnDevice back(device, out, rows, cols, ld);
                    nf4_dequantize(device, back, q.q);
                    std::vector<float> y = back.read(), scales = q.scales();
                    int64_t wrong = 0, wrong_signs = 0, overwritten = 0;
                    for (int64_t e = 0; e < rows * cols; ++e) {
                        float expected = kNf4Code[codes[e]] * scales[e / kNf4Block];
                        if (out == DType::bf16) expected = to_float(to_bf16(expected));
                        wrong += !(y[e] == expected);
                        wrong_signs += (y[e] < 0 && x[e] >= 0) || (y[e] > 0 && x[e] <= 0);
                    }
                    REQUIRE(wrong == 0);
                    if (!nested) REQUIRE(wrong_signs == 0);  // the nested scale of a small block may be ≤ 0
                    std::vector<uint8_t> memory = back.raw<uint8_t>();
                    for (int64_t r = 0; r < rows; ++r)  // the padding still holds the poison
                        for (int64_t c = cols; c < ld; ++c)
                            for (int64_t byte = 0; byte < size_of(out); ++byte)
                                overwritten += memory[(r * ld + c) * size_of(out) + byte] != 0xff;
                    REQUIRE(overwritten == 0);
                    if (nested) continue;
                    QuantizedOnDevice again(device, rows, cols, false);
                    nf4_quantize(device, again.q, back, nullptr);
                    REQUIRE(again.unpacked() == codes);
                }
        }
}

void check_special_values(Device& device) {
    // Blocks: zeros; subnormals; NaN and Inf among ordinary numbers; the largest finite numbers; the smallest normal ones.
    std::vector<float> x(5 * 64, 0.0f);
    for (int k = 0; k < 64; ++k) {
        x[64 + k] = 1e-40f * float(k - 32);
        x[128 + k] = float(k + 1) / 64;
        x[192 + k] = k % 2 ? FLT_MAX : -FLT_MAX / 3;
        x[256 + k] = k % 2 ? FLT_MIN : -FLT_MIN;
    }
    x[130] = NAN, x[140] = INFINITY, x[150] = -INFINITY;
    OnDevice w(device, DType::f32, 5, 64, x);
    OnDevice counter(device, DType::i32, 1, 1, std::vector<float>{2});
    QuantizedOnDevice q(device, 5, 64, false);
    nf4_quantize(device, q.q, w, counter.t.as<int32_t>());
    REQUIRE(counter.read()[0] == 5);  // added to what was there
    std::vector<int> codes = q.unpacked();
    REQUIRE(std::all_of(codes.begin(), codes.begin() + 128, [](int c) { return c == 7; }));
    REQUIRE(q.absmax.read() == std::vector<float>{0, 0, 1, FLT_MAX, FLT_MIN});
    for (int k = 0; k < 64; ++k) {
        if (k % 2) REQUIRE(codes[192 + k] == 15);
        REQUIRE(codes[256 + k] == (k % 2 ? 15 : 0));
    }
    for (bool nested : {false, true}) {
        QuantizedOnDevice n(device, 5, 64, nested);
        nf4_quantize(device, n.q, w, nullptr);
        OnDevice back(device, DType::f32, 5, 64);
        nf4_dequantize(device, back, n.q);
        for (float v : back.read()) REQUIRE(std::isfinite(v));
        if (!nested)
            for (int e = 0; e < 128; ++e) REQUIRE(back.read()[e] == 0);
    }
    // Exactly on a threshold: the lower code.
    std::vector<float> ties(16, 1.0f);
    for (int i = 0; i < 15; ++i) ties[i] = nf4_threshold(i);
    OnDevice on_threshold(device, DType::f32, 1, 16, ties);
    QuantizedOnDevice t(device, 1, 16, false);
    nf4_quantize(device, t.q, on_threshold, nullptr);
    for (int i = 0; i < 16; ++i) REQUIRE(t.unpacked()[i] == i);

    OnDevice zeros(device, DType::bf16, 3, 77, std::vector<float>(231, 0.0f)), back(device, DType::bf16, 3, 77);
    QuantizedOnDevice n(device, 3, 77, true);
    nf4_quantize(device, n.q, zeros, nullptr);
    nf4_dequantize(device, back, n.q);
    for (float v : back.read()) REQUIRE(v == 0);
}

// Every code against counting, where the search could go wrong: around thresholds and around the sixteenths that its cells begin at.
void check_codes(Device& device) {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    std::vector<float> x;
    auto add = [&](float z) {
        if (x.size() % 64 == 0) x.push_back(1.0f);  // absmax of its block, so that z is what is searched for
        if (std::fabs(z) <= 1.0f) x.push_back(z);
    };
    for (int i = 0; i < 15; ++i)
        for (int64_t ulp = -40; ulp <= 40; ++ulp) add(float_of_bits(uint32_t(bits_of_float(nf4_threshold(i)) + ulp)));
    for (int c = -160; c <= 160; ++c)
        for (double offset : {-0.5, 0.0, 0.5})
            for (int64_t ulp = -20; ulp <= 20; ++ulp) add(float((c + offset) / 128.0) * (1.0f + float(ulp) * 1.2e-7f));
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    while (x.size() < 100000 || x.size() % 64) add(uniform(rng));
    OnDevice w(device, DType::f32, int64_t(x.size()) / 64, 64, x);
    QuantizedOnDevice q(device, int64_t(x.size()) / 64, 64, false);
    nf4_quantize(device, q.q, w, nullptr);
    std::vector<int> codes = q.unpacked();
    int64_t wrong = 0;
    for (size_t i = 0; i < x.size(); ++i) wrong += codes[i] != code_by_counting(x[i]);
    CHECK(wrong == 0);
}

void check_normal_statistics(Device& device) {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    const int64_t n = 1 << 20;
    std::vector<float> x = random_normal(rng, n);
    OnDevice w(device, DType::f32, 1024, 1024, x), back(device, DType::f32, 1024, 1024);
    for (bool nested : {false, true}) {
        QuantizedOnDevice q(device, 1024, 1024, nested);
        nf4_quantize(device, q.q, w, nullptr);
        nf4_dequantize(device, back, q.q);
        std::vector<float> y = back.read();
        double absolute = 0, square = 0, bias = 0, frequency[16] = {};
        for (int64_t e = 0; e < n; ++e) {
            double error = double(y[e]) - double(x[e]);
            absolute += std::fabs(error), square += error * error, bias += error;
        }
        CHECK(absolute / n == Approx(nested ? 0.07287 : 0.0727955).margin(4e-4));
        CHECK(std::sqrt(square / n) == Approx(nested ? 0.09201 : 0.0919786).epsilon(0.005));
        CHECK(bias / n == Approx(7e-4).margin(4 * 0.092 / 1024));
        if (nested) continue;
        double sum = 0, sum2 = 0;
        for (float a : q.absmax.read()) sum += a, sum2 += double(a) * a;
        double blocks = double(q.q.blocks()), mean = sum / blocks;
        CHECK(mean == Approx(2.59611).margin(5 * 0.41726 / std::sqrt(blocks)));
        CHECK(std::sqrt(sum2 / blocks - mean * mean) == Approx(0.41726).margin(0.015));
        for (int c : q.unpacked()) frequency[c] += 1.0 / n;
        const double expected[16] = {.01858, .04378, .05851, .07094, .08083, .08802, .0924,  .08798,
                                     .08111, .07817, .07332, .06663, .05818, .04802, .03628, .01726};
        for (int c = 0; c < 16; ++c) CHECK(frequency[c] == Approx(expected[c]).margin(0.0015));
    }
}

// Codes and matrices that begin at addresses which allow no wide accesses, against those that do.
void check_unaligned(Device& device) {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (bool nested : {false, true})
        for (DType dtype : {DType::f32, DType::bf16})
            for (auto [rows, cols, ld] : {std::array<int64_t, 3>{1, 7, 7}, {67, 64, 64}, {33, 344, 352}, {130, 333, 336}}) {
                INFO(rows << " x " << cols << " ld " << ld << " " << safetensors_name(dtype) << (nested ? " nested" : ""));
                std::vector<float> x = round_to_bf16(random_normal(rng, rows * cols, 0.02f));
                OnDevice w(device, dtype, rows, cols, x, ld), back(device, dtype, rows, cols, ld);
                QuantizedOnDevice aligned(device, rows, cols, nested), shifted(device, rows, cols, nested);
                nf4_quantize(device, aligned.q, w, nullptr);
                nf4_dequantize(device, back, aligned.q);

                OnDevice codes(device, DType::u8, 1, aligned.q.codes.cols + 1), matrix(device, dtype, rows + 1, ld);
                shifted.q.codes = codes.t.col_slice(1, aligned.q.codes.cols);
                Tensor moved{matrix.t.at(0, 1), dtype, rows, cols, ld};
                for (int64_t r = 0; r < rows; ++r) device.copy(moved.at(r, 0), w.t.at(r, 0), cols * size_of(dtype));
                nf4_quantize(device, shifted.q, moved, nullptr);
                std::vector<uint8_t> bytes = codes.raw<uint8_t>();
                CHECK(std::vector<uint8_t>(bytes.begin() + 1, bytes.end()) == aligned.codes.raw<uint8_t>());
                CHECK(bytes[0] == 0xff);
                nf4_dequantize(device, moved, shifted.q);
                std::vector<char> one(cols * size_of(dtype)), other(one);
                for (int64_t r = 0; r < rows; ++r) {
                    device.download(one.data(), back.t.at(r, 0), int64_t(one.size()));
                    device.download(other.data(), moved.at(r, 0), int64_t(other.size()));
                    REQUIRE(one == other);
                }
            }
}

// w − deq(q) and its squared norm against what dequantization and fp64 say, with and without padding, to both types and to none.
void check_residual(Device& device) {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (bool nested : {false, true})
        for (auto [rows, cols, pad_w, pad_r] : {std::array<int64_t, 4>{1, 1, 0, 0}, {3, 5, 0, 3}, {7, 64, 0, 0}, {37, 171, 5, 0}, {130, 344, 8, 8}, {301, 217, 7, 7}}) {
            INFO(rows << " x " << cols << " pads " << pad_w << " " << pad_r << (nested ? " nested" : ""));
            std::vector<float> x = random_normal(rng, rows * cols, 0.02f), other = random_normal(rng, rows * cols, 0.02f);
            OnDevice w(device, DType::f32, rows, cols, x, cols + pad_w), values(device, DType::f32, rows, cols), source(device, DType::f32, rows, cols, other);
            OnDevice sums(device, DType::f64, 1, 3);
            QuantizedOnDevice q(device, rows, cols, nested);
            nf4_quantize(device, q.q, source, nullptr);
            nf4_dequantize(device, values, q.q);
            std::vector<float> deq = values.read(), expected(rows * cols);
            double squares = 0;
            for (size_t i = 0; i < x.size(); ++i) expected[i] = x[i] - deq[i], squares += (double(x[i]) - deq[i]) * (double(x[i]) - deq[i]);
            double alone = 0;
            for (DType dtype : {DType::f32, DType::bf16}) {
                OnDevice residual(device, dtype, rows, cols, cols + pad_r);
                nf4_residual(device, residual, w, q.q, sums.t.as<double>(), 1);
                CHECK(residual.read() == (dtype == DType::f32 ? expected : round_to_bf16(expected)));
                CHECK(sums.raw<double>()[1] == Approx(squares).epsilon(1e-6));
                if (dtype == DType::bf16) {
                    std::vector<uint16_t> raw = residual.raw<uint16_t>();
                    for (int64_t r = 0; r < rows; ++r)
                        for (int64_t c = cols; c < cols + pad_r; ++c) REQUIRE(raw[r * (cols + pad_r) + c] == 0xffff);
                }
                double previous = alone;
                nf4_residual(device, Tensor{}, w, q.q, sums.t.as<double>(), 2);
                alone = sums.raw<double>()[2];
                CHECK(alone == Approx(squares).epsilon(1e-6));
                CHECK((previous == 0 || previous == alone));
                CHECK(std::isnan(sums.raw<double>()[0]));
            }
        }
    // NaN in w shows in the sum.
    std::vector<float> bad(200, 1.0f);
    OnDevice w(device, DType::f32, 2, 100, bad), sums(device, DType::f64, 1, 1);
    QuantizedOnDevice q(device, 2, 100, true);
    nf4_quantize(device, q.q, w, nullptr);
    bad[150] = NAN;
    w.write(bad);
    nf4_residual(device, Tensor{}, w, q.q, sums.t.as<double>(), 0);
    CHECK(std::isnan(sums.raw<double>()[0]));
}

}  // namespace

TEST_CASE("NF4 thresholds are the rounded midpoints of the codes", "[nf4]") {
    const uint32_t codes[16] = {0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x00000000,
                                0x3da2faff, 0x3e24cae3, 0x3e7c04dd, 0x3ead033a, 0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000};
    const uint32_t thresholds[15] = {0xbf591cd8, 0xbf1c5270, 0xbeeb8480, 0xbeadea76, 0xbe703cec, 0xbe0d38bc, 0xbd3a7871, 0x3d22faff,
                                     0x3df64862, 0x3e5067e0, 0x3e9582d4, 0x3ec753f9, 0x3f006d04, 0x3f248daf, 0x3f5c89da};
    for (int i = 0; i < 16; ++i) CHECK(bits_of_float(kNf4Code[i]) == codes[i]);
    for (int i = 0; i < 15; ++i) CHECK(bits_of_float(nf4_threshold(i)) == thresholds[i]);
}

TEST_CASE("dynamic maps have the known checksums and indices", "[nf4]") {
    const float *s = dynamic_map_signed(), *u = dynamic_map_unsigned();
    CHECK(crc32(s, 1024) == 0xb66387bau);
    CHECK(crc32(u, 1024) == 0x603f8c47u);
    double sum_s = 0, squares_s = 0, sum_u = 0;
    for (int k = 0; k < 256; ++k) {
        sum_s += s[k], squares_s += double(s[k]) * s[k], sum_u += u[k];
        if (k) CHECK((s[k - 1] < s[k] && u[k - 1] < u[k]));
    }
    CHECK(sum_s == Approx(1.0).margin(1e-6));
    CHECK(squares_s == Approx(48.595837).epsilon(1e-7));
    CHECK(sum_u == Approx(75.105263).epsilon(1e-7));
    CHECK(s[0] == -0.99296875f);
    CHECK((s[127] == 0 && s[255] == 1 && u[0] == 0 && u[255] == 1));
}

TEST_CASE("dynamic_code is the number of midpoints below", "[nf4]") {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (const DynamicMap* map : {&kSignedMap, &kUnsignedMap}) {
        bool is_signed = map == &kSignedMap;
        int64_t wrong = 0;
        auto check = [&](float z) {
            if (std::isnan(z) || (!is_signed && z < 0)) return;
            wrong += dynamic_code(*map, z) != dynamic_code_by_counting(map->value, z);
        };
        // Around every midpoint, value and decade limit, then everywhere.
        for (const float* table : {map->midpoint, map->value})
            for (int k = 0; k < 255; ++k)
                for (int64_t ulp = -20; ulp <= 20; ++ulp) {
                    check(float_of_bits(uint32_t(bits_of_float(table[k]) + ulp)));
                    check(table[k] + float(ulp) * 1e-5f * table[k]);
                }
        for (uint32_t bits = uint32_t(rng() % 9973); bits <= bits_of_float(1.0f) + 4; bits += 9973) check(float_of_bits(bits)), check(-float_of_bits(bits));
        for (float z : {0.0f, -0.0f, 1.0f, -1.0f, 1.0000001f, -1.0000001f, 1e-45f, -1e-45f}) check(z);
        CHECK(wrong == 0);
    }
}

TEST_CASE("NF4 agrees with bitsandbytes", "[nf4]") { compare_with_bitsandbytes(*test_device("cpu")); }
TEST_CASE("NF4 round trips on odd and padded shapes", "[nf4]") { check_properties(*test_device("cpu")); }
TEST_CASE("NF4 of zeros, subnormals and non-finite numbers", "[nf4]") { check_special_values(*test_device("cpu")); }
TEST_CASE("NF4 codes are the number of thresholds below", "[nf4]") { check_codes(*test_device("cpu")); }
TEST_CASE("NF4 at unaligned addresses", "[nf4]") { check_unaligned(*test_device("cpu")); }
TEST_CASE("NF4 residuals and their norm", "[nf4]") { check_residual(*test_device("cpu")); }
TEST_CASE("NF4 error on normal numbers", "[nf4]") { check_normal_statistics(*test_device("cpu")); }

TEST_CASE("a dry NF4 quantization counts its scratch", "[nf4]") {
    int64_t peak[2];
    for (int dry = 0; dry < 2; ++dry) {
        auto device = dry ? Device::open_dry(DeviceKind::cpu) : test_device("cpu");
        Nf4Tensor q;
        q.rows = 1000, q.cols = 333;
        OnDevice codes(*device, DType::u8, 1, (q.numel() + 1) / 2), codes8(*device, DType::u8, 1, q.blocks());
        OnDevice scale2(*device, DType::f32, 1, 21), offset(*device, DType::f32, 1, 1), w(*device, DType::f32, q.rows, q.cols);
        q.codes = codes, q.codes8 = codes8, q.scale2 = scale2, q.offset = offset;
        nf4_quantize(*device, q, w, nullptr);
        nf4_dequantize(*device, w, q);
        OnDevice sums(*device, DType::f64, 1, 1);
        nf4_residual(*device, Tensor{}, w, q, sums.t.as<double>(), 0);
        peak[dry] = device->scratch_high_water();
    }
    CHECK(peak[0] > 0);
    CHECK(peak[0] == peak[1]);
}

TEST_CASE("NF4 on the GPU agrees with bitsandbytes", "[nf4][gpu]") { compare_with_bitsandbytes(*test_device("cuda")); }
TEST_CASE("NF4 on the GPU round trips on odd and padded shapes", "[nf4][gpu]") { check_properties(*test_device("cuda")); }
TEST_CASE("NF4 on the GPU of zeros, subnormals and non-finite numbers", "[nf4][gpu]") { check_special_values(*test_device("cuda")); }
TEST_CASE("NF4 codes on the GPU are the number of thresholds below", "[nf4][gpu]") { check_codes(*test_device("cuda")); }
TEST_CASE("NF4 on the GPU at unaligned addresses", "[nf4][gpu]") { check_unaligned(*test_device("cuda")); }
TEST_CASE("NF4 residuals on the GPU", "[nf4][gpu]") { check_residual(*test_device("cuda")); }
TEST_CASE("NF4 error on normal numbers on the GPU", "[nf4][gpu]") { check_normal_statistics(*test_device("cuda")); }

TEST_CASE("NF4 on the GPU equals the CPU bit for bit", "[nf4][gpu]") {
    auto cpu = test_device("cpu"), gpu = test_device("cuda");
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (auto [rows, cols, ld] : {std::array<int64_t, 3>{1000, 1376, 1376}, {700, 2736, 2752}, {301, 5461, 5504}, {97, 5461, 5461}}) {
        std::vector<float> x = round_to_bf16(random_normal(rng, rows * cols, 0.02f));
        OnDevice a(*cpu, DType::bf16, rows, cols, x, ld), b(*gpu, DType::bf16, rows, cols, x, ld);
        QuantizedOnDevice qa(*cpu, rows, cols, true), qb(*gpu, rows, cols, true);
        nf4_quantize(*cpu, qa.q, a, nullptr);
        nf4_quantize(*gpu, qb.q, b, nullptr);
        CHECK(qa.codes.raw<uint8_t>() == qb.codes.raw<uint8_t>());
        CHECK(ulps(qa.offset.read()[0], qb.offset.read()[0]) <= 1);
        if (qa.offset.read() == qb.offset.read()) {
            CHECK(qa.codes8.raw<uint8_t>() == qb.codes8.raw<uint8_t>());
            CHECK(qa.scale2.read() == qb.scale2.read());
        }
    }
}

// Matrix products against fp64 loops on the same (rounded) inputs.
#ifdef _OPENMP
#include <omp.h>
#endif

#include "ops/matmul.h"
#include "test/support.h"

namespace {

// A rows × cols tensor inside a wider one that is filled with NaN: `before` columns to the left, `after` to the right.
struct Embedded {
    OnDevice whole;
    Tensor t;
    int64_t before;
    Embedded(Device& device, DType dtype, int64_t rows, int64_t cols, int64_t before, int64_t after, const std::vector<float>* values)
        : whole(device, dtype, rows, cols + before + after), t(whole.t.col_slice(before, cols)), before(before) {
        if (!values) return;
        std::vector<float> wide(whole.t.numel(), NAN);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < cols; ++c) wide[r * whole.t.cols + before + c] = (*values)[r * cols + c];
        whole.write(wide);
    }
    std::vector<float> read() const {
        std::vector<float> wide = whole.read(), out;
        for (int64_t r = 0; r < t.rows; ++r) out.insert(out.end(), &wide[r * whole.t.cols + before], &wide[r * whole.t.cols + before] + t.cols);
        return out;
    }
    bool padding_untouched() const {
        std::vector<float> wide = whole.read();
        for (int64_t r = 0; r < t.rows; ++r)
            for (int64_t c = 0; c < whole.t.cols; ++c)
                if ((c < before || c >= before + t.cols) && !std::isnan(wide[r * whole.t.cols + c])) return false;
        return true;
    }
};

struct Case {
    int64_t m, n, k, before, after;  // before, after: padding columns of every operand
    float alpha, beta;
    bool separate_c;
};

void check_product(Device& device, std::mt19937_64& rng, const Case& s, Op op_a, Op op_b, DType in, DType out) {
    INFO("m " << s.m << " n " << s.n << " k " << s.k << " padding " << s.before << "+" << s.after << " alpha " << s.alpha << " beta " << s.beta
              << " op " << int(op_a) << int(op_b) << " C " << (s.separate_c ? "apart" : "= D") << " " << safetensors_name(in) << "→" << safetensors_name(out));
    bool ta = op_a == Op::transpose, tb = op_b == Op::transpose;
    std::vector<float> a = random_normal(rng, s.m * s.k), b = random_normal(rng, s.k * s.n), c = random_normal(rng, s.m * s.n);
    if (in == DType::bf16) a = round_to_bf16(a), b = round_to_bf16(b);
    if (out == DType::bf16) c = round_to_bf16(c);
    Embedded da(device, in, ta ? s.k : s.m, ta ? s.m : s.k, s.before, s.after, &a), db(device, in, tb ? s.n : s.k, tb ? s.k : s.n, s.before, s.after, &b);
    bool c_in_d = s.beta != 0 && !s.separate_c;
    Embedded dc(device, out, s.m, s.n, s.before + 1, s.after, &c), dd(device, out, s.m, s.n, s.before, s.after, c_in_d ? &c : nullptr);

    if (s.separate_c) matmul(device, dd.t, s.alpha, da.t, op_a, db.t, op_b, s.beta, dc.t);
    else matmul(device, dd.t, s.alpha, da.t, op_a, db.t, op_b, s.beta);

    std::vector<float> d = dd.read();
    // Large products: a sample of rows.
    const int64_t step = std::max<int64_t>(1, s.m * s.n * s.k / 20'000'000);
    std::vector<double> expected;
    std::vector<float> found;
    bool close = true;
    for (int64_t i = 0; i < s.m; i += step)
        for (int64_t j = 0; j < s.n; ++j) {
            double sum = 0, magnitude = 0;
            for (int64_t l = 0; l < s.k; ++l) {
                double term = double(a[ta ? l * s.m + i : i * s.k + l]) * double(b[tb ? j * s.k + l : l * s.n + j]);
                sum += term, magnitude += std::fabs(term);
            }
            double old = s.beta == 0 ? 0.0 : double(s.beta) * double(c[i * s.n + j]);
            double x = double(s.alpha) * sum + old;
            expected.push_back(x), found.push_back(d[i * s.n + j]);
            double limit = 2e-6 * (std::fabs(s.alpha) * magnitude + std::fabs(old)) + (out == DType::bf16 ? std::fabs(x) / 256 : 0.0);
            close = close && std::fabs(double(d[i * s.n + j]) - x) <= limit;
        }
    CHECK(close);
    if (s.m * s.n >= 256 && s.k > 0) CHECK(relative_error(found, expected) < (out == DType::bf16 ? 2.5e-3 : 2e-6));
    CHECK(dd.padding_untouched());
    if (s.separate_c) CHECK(dc.read() == c);
}

void check_products(Device& device, DType in, DType out) {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    const Case cases[] = {{1, 1, 1, 0, 0, 1, 0, false},       {1, 7, 5, 0, 3, 1, 1, false},      {17, 1, 9, 1, 0, -0.5f, 0, false},
                          {33, 65, 129, 0, 0, 1, 1, true},    {64, 64, 64, 0, 0, 0.25f, 1, true}, {64, 128, 96, 8, 8, 1, 0, false},
                          {257, 300, 70, 0, 5, 2, -0.5f, true}, {100, 333, 517, 3, 2, 1, 1, false}, {8, 16, 1024, 0, 0, 1, 0.5f, true},
                          {300, 520, 40, 0, 0, 1, 0, false},  {40, 1100, 30, 0, 0, 1, 1, true}};
    for (const Case& s : cases)
        for (Op op_a : {Op::none, Op::transpose})
            for (Op op_b : {Op::none, Op::transpose}) check_product(device, rng, s, op_a, op_b, in, out);
    for (const Case& s : {Case{0, 5, 3, 0, 0, 1, 0, false}, Case{5, 0, 3, 0, 0, 1, 1, true}, Case{5, 3, 0, 0, 2, 1, 0, false}, Case{5, 3, 0, 1, 2, 1, 0.5f, true},
                          Case{5, 3, 0, 0, 2, 1, 0.5f, false}})
        check_product(device, rng, s, Op::none, Op::none, in, out);
}

}  // namespace

TEST_CASE("matmul equals fp64 for all ops, paddings, alpha, beta and C apart from D", "[matmul]") {
    auto device = test_device("cpu");
    check_products(*device, DType::f32, DType::f32);
}

TEST_CASE("matmul on the CPU does not depend on the thread count", "[matmul]") {
#ifdef _OPENMP
    auto device = test_device("cpu");
    std::mt19937_64 rng(fresh_seed());
    int threads = omp_get_max_threads();
    OnDevice a(*device, DType::f32, 300, 700, random_normal(rng, 300 * 700)), b(*device, DType::f32, 700, 530, random_normal(rng, 700 * 530));
    std::vector<float> first;
    for (int count : {1, 2, 3, 5}) {
        omp_set_num_threads(count);
        OnDevice d(*device, DType::f32, 300, 530);
        matmul(*device, d, 1.0f, a, Op::none, b, Op::none);
        if (first.empty()) first = d.read();
        CHECK(d.read() == first);
    }
    omp_set_num_threads(threads);
#endif
}

TEST_CASE("matmul rejects shapes and types that do not fit, naming them", "[matmul]") {
    auto device = test_device("cpu");
    OnDevice a(*device, DType::f32, 4, 6), b(*device, DType::f32, 5, 3), d(*device, DType::f32, 4, 3), half(*device, DType::bf16, 4, 3);
    std::string message;
    try {
        matmul(*device, d, 1.0f, a, Op::none, b, Op::none);
    } catch (const InternalError& error) {
        message = error.what();
    }
    CHECK(message.find("4×6") != std::string::npos);
    CHECK(message.find("5×3") != std::string::npos);
    CHECK_THROWS_AS(matmul(*device, half, 1.0f, a, Op::none, d, Op::transpose), InternalError);
}

TEST_CASE("matmul on the GPU equals fp64 for bf16 and true fp32", "[matmul][gpu]") {
    auto device = test_device("cuda");
    check_products(*device, DType::bf16, DType::bf16);
    check_products(*device, DType::bf16, DType::f32);
    check_products(*device, DType::f32, DType::f32);
}

TEST_CASE("matmul on the GPU gives the same bits every time, from every device", "[matmul][gpu]") {
    std::mt19937_64 rng(fresh_seed());
    // A long sum with a small result invites split-K; from 1e9 FLOPs on the algorithm is chosen by timing.
    const int64_t shapes[][3] = {{64, 64, 16384}, {512, 512, 4096}, {1376, 128, 2048}, {100, 333, 517}, {512, 128, 32768}, {4096, 1376, 512}};
    for (auto& s : shapes)
        for (DType type : {DType::bf16, DType::f32}) {
            INFO(s[0] << " " << s[1] << " " << s[2] << " " << safetensors_name(type));
            std::vector<float> a = random_normal(rng, s[0] * s[2]), b = random_normal(rng, s[2] * s[1]), first;
            for (int open = 0; open < 2; ++open) {
                auto device = test_device("cuda");
                OnDevice da(*device, type, s[0], s[2], a), db(*device, type, s[2], s[1], b), d(*device, type, s[0], s[1]);
                for (int run = 0; run < 3; ++run) {
                    matmul(*device, d, 1.0f, da, Op::none, db, Op::none);
                    if (first.empty()) first = d.read();
                    CHECK(d.read() == first);
                }
            }
        }
}

TEST_CASE("matmul of fp32 in TF32 has TF32's error, and bf16 inputs do not care", "[matmul][gpu]") {
    auto device = test_device("cuda");
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    const int64_t m = 192, n = 130, k = 517;
    std::vector<float> a = random_normal(rng, m * k), b = random_normal(rng, k * n), c = random_normal(rng, m * n);
    auto error_of = [&](DType type, const std::vector<float>& x, const std::vector<float>& y) {
        std::vector<double> expected(m * n);
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < n; ++j) {
                expected[i * n + j] = c[i * n + j];
                for (int64_t l = 0; l < k; ++l) expected[i * n + j] += double(x[i * k + l]) * double(y[l * n + j]);
            }
        OnDevice da(*device, type, m, k, x), db(*device, type, k, n, y), d(*device, DType::f32, m, n, c);
        matmul(*device, d, 1.0f, da, Op::none, db, Op::none, 1.0f, Fp32Products::tf32);
        return relative_error(d.read(), expected);
    };
    double tf32 = error_of(DType::f32, a, b);
    CHECK(tf32 < 5e-4);
    CHECK(tf32 > 2e-5);  // else it was not TF32
    CHECK(error_of(DType::bf16, round_to_bf16(a), round_to_bf16(b)) < 2e-6);
    CHECK(error_of(DType::f32, round_to_bf16(a), round_to_bf16(b)) < 2e-6);  // exact in TF32
}

TEST_CASE("matmul keeps its bits and C when it chooses an algorithm by timing", "[matmul][gpu]") {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    check_product(*test_device("cuda"), rng, {1100, 904, 600, 8, 8, 0.5f, 1, false}, Op::transpose, Op::none, DType::bf16, DType::f32);
    check_product(*test_device("cuda"), rng, {1100, 904, 600, 0, 0, 1, 1, true}, Op::none, Op::transpose, DType::bf16, DType::bf16);

    // Zeros say nothing about the order of sums: a device that saw them first gives the bits of one that did not.
    const int64_t m = 512, n = 256, k = 16384;
    std::vector<float> a = random_normal(rng, m * k), b = random_normal(rng, k * n), c = random_normal(rng, m * n), results[2];
    for (int zeros_first = 0; zeros_first < 2; ++zeros_first) {
        auto device = test_device("cuda");
        OnDevice da(*device, DType::bf16, m, k, a), db(*device, DType::bf16, k, n, b), zero(*device, DType::bf16, k, n, std::vector<float>(k * n, 0.0f)),
            d(*device, DType::f32, m, n, c);
        if (zeros_first) {
            matmul(*device, d, 1.0f, da, Op::none, zero, Op::none, 1.0f);
            CHECK(d.read() == c);
        }
        for (int run = 0; run < 3; ++run) matmul(*device, d, 1.0f, da, Op::none, db, Op::none, 1.0f);
        results[zeros_first] = d.read();
    }
    CHECK(results[0] == results[1]);
}

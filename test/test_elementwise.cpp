#include <omp.h>

#include "ops/elementwise.h"
#include "test/padding.h"

namespace {

struct Shape {
    int64_t rows, cols, dst_pad, src_pad;
};
const Shape kShapes[] = {{1, 1, 0, 0}, {3, 5, 0, 0}, {7, 16, 0, 0}, {5, 24, 8, 16}, {4, 24, 0, 8}, {6, 10, 1, 3}, {65, 130, 0, 0}, {1, 70001, 0, 0}, {200, 512, 0, 0}, {1, 80000, 8, 0}};
const DType kTypes[] = {DType::f32, DType::bf16};

std::vector<float> as_type(DType type, std::vector<float> x) { return type == DType::bf16 ? round_to_bf16(std::move(x)) : x; }

void check_maps(Device& device) {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (const Shape& s : kShapes)
        for (DType d : kTypes)
            for (DType t : kTypes) {
                INFO(s.rows << " × " << s.cols << " pads " << s.dst_pad << " " << s.src_pad << " " << safetensors_name(d) << " from " << safetensors_name(t));
                const int64_t n = s.rows * s.cols;
                auto x = as_type(t, random_normal(rng, n)), old = as_type(d, random_normal(rng, n));
                OnDevice src(device, t, s.rows, s.cols, x, s.cols + s.src_pad), dst(device, d, s.rows, s.cols, s.cols + s.dst_pad);
                convert(device, dst, src);
                CHECK(dst.read() == as_type(d, x));
                CHECK(padding_untouched(dst));

                const double limit = d == DType::bf16 ? 1.0 / 256 : 1e-6;
                const float a = 0.75f, b = -1.7f;
                auto check = [&](auto expected_of) {
                    auto got = dst.read();
                    int64_t wrong = 0;
                    for (int64_t i = 0; i < n; ++i) {
                        const double expected = expected_of(i);
                        wrong += !(std::fabs(got[i] - expected) <= limit * std::fabs(expected) + 2e-7 * (std::fabs(x[i]) + std::fabs(old[i])));
                    }
                    CHECK(wrong == 0);
                    CHECK(padding_untouched(dst));
                };
                dst.write(old);
                axpby(device, dst, a, src, b);
                check([&](int64_t i) { return double(a) * x[i] + double(b) * old[i]; });
                dst.write(std::vector<float>(n, NAN));  // not read with b = 0
                axpby(device, dst, a, src, 0);
                check([&](int64_t i) { return double(a) * x[i]; });
                square(device, dst, src);
                check([&](int64_t i) { return double(x[i]) * x[i]; });
            }
}

void check_sums(Device& device) {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    const int64_t slots = 3;
    OnDevice sums(device, DType::f64, 1, slots);
    double* out = static_cast<double*>(sums.t.data);
    auto check = [&](int64_t rows, int64_t cols, int64_t pad, DType type) {
        INFO(rows << " × " << cols << " pad " << pad << " " << safetensors_name(type));
        auto x = as_type(type, random_normal(rng, rows * cols));
        for (float& v : x) v += 0.5f;
        x = as_type(type, x);
        OnDevice x_(device, type, rows, cols, x, cols + pad);
        long double sum_x = 0, sum_xx = 0, sum_abs = 0;
        for (float v : x) sum_x += v, sum_xx += (long double)v * v, sum_abs += std::fabs(v);
        sums.raw_write(std::vector<double>{-1, -1, -1});
        sum(device, out, 1, x_);
        sum_of_squares(device, out, 2, x_);
        auto first = sums.raw<double>();
        CHECK(first[0] == -1);
        CHECK(std::fabs(first[1] - double(sum_x)) <= 1e-13 * double(sum_abs));
        CHECK(std::fabs(first[2] - double(sum_xx)) <= 1e-13 * double(sum_xx));
        sum(device, out, 1, x_);
        sum_of_squares(device, out, 2, x_);
        CHECK(sums.raw<double>() == first);
    };
    for (const Shape& s : kShapes)
        for (DType type : kTypes) check(s.rows, s.cols, s.src_pad, type);
    check(1, 3000000, 0, DType::bf16);
    check(1, 2999999, 0, DType::f32);
    check(3000, 264, 8, DType::f32);
    check(40000, 8, 8, DType::bf16);
    check(0, 8, 0, DType::f32);
    for (float special : {NAN, INFINITY}) {
        std::vector<float> x(100, 1.0f);
        x[57] = special;
        OnDevice x_(device, DType::bf16, 10, 10, x);
        sum_of_squares(device, out, 0, x_);
        const double got = sums.raw<double>()[0];
        CHECK((std::isnan(special) ? std::isnan(got) : got == INFINITY));
    }
}

// A list longer than one launch takes, of all kinds of tensors, empty ones too: each sum as if alone.
void check_sums_of_lists(Device& device) {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (int64_t count : {0, 1, 64, 65, 150}) {
        std::vector<std::unique_ptr<OnDevice>> held;
        std::vector<Tensor> tensors;
        std::vector<double> expected;
        for (int64_t i = 0; i < count; ++i) {
            const DType type = kTypes[rng() % 2];
            const int64_t rows = int64_t(rng() % 4), cols = rng() % 5 == 0 ? 20000 + int64_t(rng() % 30000) : 1 + int64_t(rng() % 100), pad = int64_t(rng() % 2) * 8;
            const auto x = as_type(type, random_normal(rng, rows * cols));
            held.push_back(std::make_unique<OnDevice>(device, type, rows, cols, x, cols + pad));
            tensors.push_back(*held.back());
            expected.push_back(0);
            for (float v : x) expected.back() += double(v) * v;
        }
        OnDevice sums(device, DType::f64, 1, count + 1), alone(device, DType::f64, 1, count + 1);
        sums_of_squares(device, static_cast<double*>(sums.t.data), tensors);
        for (int64_t i = 0; i < count; ++i) sum_of_squares(device, static_cast<double*>(alone.t.data), i, tensors[i]);
        const auto got = sums.raw<double>();
        for (int64_t i = 0; i < count; ++i) CHECK(std::fabs(got[i] - expected[i]) <= 1e-12 * expected[i]);
        CHECK(sums.raw<uint8_t>() == alone.raw<uint8_t>());  // the last slot still holds the NaN of both
    }
}

}  // namespace

TEST_CASE("convert, axpby and square", "[elementwise]") { check_maps(*test_device("cpu")); }
TEST_CASE("sum and sum of squares", "[elementwise]") { check_sums(*test_device("cpu")); }
TEST_CASE("convert, axpby and square on the GPU", "[elementwise][gpu]") { check_maps(*test_device("cuda")); }
TEST_CASE("sum and sum of squares on the GPU", "[elementwise][gpu]") { check_sums(*test_device("cuda")); }

TEST_CASE("sums of squares of many tensors", "[elementwise]") { check_sums_of_lists(*test_device("cpu")); }
TEST_CASE("sums of squares of many tensors on the GPU", "[elementwise][gpu]") { check_sums_of_lists(*test_device("cuda")); }

TEST_CASE("sums do not depend on the thread count", "[elementwise]") {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    auto device = test_device("cpu");
    const int64_t n = 1000001;
    OnDevice x(*device, DType::f32, 1, n, random_normal(rng, n)), sums(*device, DType::f64, 1, 2);
    const int threads = omp_get_max_threads();
    int slot = 0;
    for (int count : {1, 3}) {
        omp_set_num_threads(count);
        sum_of_squares(*device, static_cast<double*>(sums.t.data), slot++, x);
    }
    omp_set_num_threads(threads);
    CHECK(sums.raw<double>()[0] == sums.raw<double>()[1]);
}

// Attention against fp64 loops that hold the whole T×T matrix; the loops' own gradient is checked by finite differences.
#include "ops/attention.h"

#include <algorithm>

#include "ops/rope.h"
#include "test/support.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

using Vector = std::vector<double>;

struct Reference {
    AttentionShape s;
    Vector qkv, o, lse, d_qkv;

    Reference(const AttentionShape& shape, Vector qkv_values) : s(shape), qkv(std::move(qkv_values)) {}

    size_t q(int64_t b, int64_t t, int64_t h) const { return (b * s.seq + t) * s.qkv_cols() + h * s.head_dim; }
    size_t k(int64_t b, int64_t t, int64_t h) const { return q(b, t, s.heads + h / (s.heads / s.kv_heads)); }
    size_t v(int64_t b, int64_t t, int64_t h) const { return k(b, t, h) + s.kv_heads * s.head_dim; }
    size_t out(int64_t b, int64_t t, int64_t h) const { return ((b * s.seq + t) * s.heads + h) * s.head_dim; }

    static double dot(const double* x, const double* y, int64_t n) {
        double sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
        return sum;
    }
    // The weights of query (b, i, h) over keys 0..i; returns the log-sum-exp.
    double weights(int64_t b, int64_t i, int64_t h, Vector& p) const {
        p.resize(i + 1);
        double max = -INFINITY, sum = 0;
        for (int64_t j = 0; j <= i; ++j) {
            p[j] = dot(&qkv[q(b, i, h)], &qkv[k(b, j, h)], s.head_dim) / std::sqrt(double(s.head_dim));
            max = std::max(max, p[j]);
        }
        for (double& x : p) sum += x = std::exp(x - max);
        for (double& x : p) x /= sum;
        return max + std::log(sum);
    }
    void forward_row(int64_t b, int64_t i, int64_t h, double* row, double& row_lse) const {
        Vector p;
        row_lse = weights(b, i, h, p);
        std::fill(row, row + s.head_dim, 0.0);
        for (int64_t j = 0; j <= i; ++j)
            for (int64_t d = 0; d < s.head_dim; ++d) row[d] += p[j] * qkv[v(b, j, h) + d];
    }
    void forward() {
        o.assign(s.batch * s.seq * s.heads * s.head_dim, 0);
        lse.assign(s.batch * s.heads * s.seq, 0);
        for (int64_t b = 0; b < s.batch; ++b)
            for (int64_t h = 0; h < s.heads; ++h)
                for (int64_t i = 0; i < s.seq; ++i) forward_row(b, i, h, &o[out(b, i, h)], lse[(b * s.heads + h) * s.seq + i]);
    }
    // out_values: the output that rowsum(dO∘O) is taken of; the exact one gives the true gradient, a rounded one isolates the
    // backward pass from the rounding of its inputs.
    void backward(const Vector& d_o, const Vector& out_values) {
        d_qkv.assign(qkv.size(), 0);
        const double scale = 1 / std::sqrt(double(s.head_dim));
        Vector p;
        for (int64_t b = 0; b < s.batch; ++b)
            for (int64_t h = 0; h < s.heads; ++h)
                for (int64_t i = 0; i < s.seq; ++i) {
                    weights(b, i, h, p);
                    const double* grad = &d_o[out(b, i, h)];
                    double row_sum = dot(grad, &out_values[out(b, i, h)], s.head_dim);
                    for (int64_t j = 0; j <= i; ++j) {
                        double ds = scale * p[j] * (dot(grad, &qkv[v(b, j, h)], s.head_dim) - row_sum);
                        for (int64_t d = 0; d < s.head_dim; ++d) {
                            d_qkv[q(b, i, h) + d] += ds * qkv[k(b, j, h) + d];
                            d_qkv[k(b, j, h) + d] += ds * qkv[q(b, i, h) + d];
                            d_qkv[v(b, j, h) + d] += p[j] * grad[d];
                        }
                    }
                }
    }
};

Vector widen(const std::vector<float>& x) { return Vector(x.begin(), x.end()); }

double frobenius(const Vector& x) {
    double sum = 0;
    for (double v : x) sum += v * v;
    return std::sqrt(sum);
}

// Columns [begin, begin+count) of a matrix.
Vector columns(const Vector& x, int64_t cols, int64_t begin, int64_t count) {
    Vector out;
    for (size_t r = 0; r < x.size() / cols; ++r) out.insert(out.end(), &x[r * cols + begin], &x[r * cols + begin] + count);
    return out;
}

// ‖a − b‖ / ‖b‖, where a ‖b‖ below 5 % of `floor` counts as that much: dQ and dK cancel in short sequences (to exactly 0 for one token).
double error_above(const Vector& a, const Vector& b, double floor) {
    Vector difference(a);
    for (size_t i = 0; i < a.size(); ++i) difference[i] -= b[i];
    return frobenius(difference) / std::max(frobenius(b), 0.05 * floor);
}

// The operation on tensors of its own, padded by `pad` columns.
struct Run {
    AttentionShape s;
    Device& device;
    OnDevice qkv, o, lse, d_o, d_qkv;

    Run(Device& dev, const AttentionShape& shape, const std::vector<float>& qkv_values, const std::vector<float>& d_o_values, int64_t pad)
        : s(shape), device(dev), qkv(dev, dev.activation_dtype(), s.batch * s.seq, s.qkv_cols(), qkv_values, s.qkv_cols() + pad),
          o(dev, dev.activation_dtype(), s.batch * s.seq, s.heads * s.head_dim, s.heads * s.head_dim + pad),
          lse(dev, DType::f32, 1, s.batch * s.heads * s.seq),
          d_o(dev, dev.activation_dtype(), s.batch * s.seq, s.heads * s.head_dim, d_o_values, s.heads * s.head_dim + 2 * pad),
          d_qkv(dev, dev.activation_dtype(), s.batch * s.seq, s.qkv_cols(), s.qkv_cols() + pad) {}
    void forward() { attention_forward(device, o, lse, qkv, s); }
    void backward(Tensor rope = {}) { attention_backward(device, d_qkv, d_o, qkv, o, lse, s, rope); }
};

struct Limits {
    double o, lse, gradient;
};
constexpr Limits kCpuLimits{1e-6, 1e-5, 1e-5}, kGpuLimits{4e-3, 1e-5, 6e-3};

void compare(Device& device, const AttentionShape& s, uint64_t seed, Limits limits) {
    INFO("seed " << seed << " batch " << s.batch << " seq " << s.seq << " heads " << s.heads << "/" << s.kv_heads << " head_dim " << s.head_dim);
    std::mt19937_64 rng(seed);
    const int64_t tokens = s.batch * s.seq, hd = s.head_dim, q_cols = s.heads * hd, kv_cols = s.kv_heads * hd;
    auto qkv = round_to_bf16(random_normal(rng, tokens * s.qkv_cols())), d_o = round_to_bf16(random_normal(rng, tokens * q_cols));
    Run run(device, s, qkv, d_o, rng() % 2 ? 8 : 0);
    run.forward();

    Reference reference(s, widen(qkv));
    reference.forward();
    Vector o = widen(run.o.read()), lse = widen(run.lse.read());
    CHECK(relative_error(o, reference.o) < limits.o);
    double lse_error = 0;
    for (size_t i = 0; i < lse.size(); ++i) lse_error = std::isnan(lse[i]) ? INFINITY : std::max(lse_error, std::abs(lse[i] - reference.lse[i]));
    CHECK(lse_error < limits.lse);

    run.backward();
    Vector d_qkv = widen(run.d_qkv.read());
    const double floor = frobenius(widen(d_o));
    auto check_gradient = [&](double limit) {
        Vector dq = columns(d_qkv, s.qkv_cols(), 0, q_cols), dq_want = columns(reference.d_qkv, s.qkv_cols(), 0, q_cols);
        Vector dk = columns(d_qkv, s.qkv_cols(), q_cols, kv_cols), dk_want = columns(reference.d_qkv, s.qkv_cols(), q_cols, kv_cols);
        Vector dv = columns(d_qkv, s.qkv_cols(), q_cols + kv_cols, kv_cols), dv_want = columns(reference.d_qkv, s.qkv_cols(), q_cols + kv_cols, kv_cols);
        CHECK(error_above(dq, dq_want, floor) < limit);
        CHECK(error_above(dk, dk_want, floor) < limit);
        CHECK(error_above(dv, dv_want, floor) < limit);
    };
    reference.backward(widen(d_o), o);
    check_gradient(limits.gradient);
    // The true gradient too, where no single cancelling row can dominate the norm.
    if (s.seq >= 64) {
        reference.backward(widen(d_o), reference.o);
        check_gradient(limits.gradient);
    }

    // The same bits again, whatever the number of threads.
    auto o_bits = run.o.raw<uint16_t>(), lse_bits = run.lse.raw<uint16_t>(), d_qkv_bits = run.d_qkv.raw<uint16_t>();
#ifdef _OPENMP
    const int threads = omp_get_max_threads();
    omp_set_num_threads(1 + int(rng() % 3));
#endif
    run.forward();
    run.backward();
#ifdef _OPENMP
    omp_set_num_threads(threads);
#endif
    CHECK(run.o.raw<uint16_t>() == o_bits);
    CHECK(run.lse.raw<uint16_t>() == lse_bits);
    CHECK(run.d_qkv.raw<uint16_t>() == d_qkv_bits);
}

// Every length of the list once, the rest drawn; `work` bounds batch·heads·seq²·head_dim, most of which the fp64 loops spend.
void compare_random_shapes(Device& device, std::vector<int64_t> head_dims, double work, Limits limits) {
    const uint64_t seed = fresh_seed();
    std::mt19937_64 rng(seed);
    const int64_t heads[4][2] = {{1, 1}, {4, 4}, {4, 2}, {4, 1}};
    for (int64_t seq : {1, 2, 7, 63, 64, 65, 100, 128, 129, 256, 300, 1024}) {
        AttentionShape s;
        for (int attempt = 0; attempt < 100; ++attempt) {
            const int64_t* h = heads[rng() % 4];
            s = {1 + int64_t(rng() % 3), seq, h[0], h[1], head_dims[rng() % head_dims.size()]};
            if (double(s.batch * s.heads * s.head_dim) * double(seq * seq) <= work) break;
            s = {1, seq, 1, 1, head_dims[0]};
        }
        compare(device, s, rng(), limits);
    }
}

// Scores of thousands: nothing overflows, and one key takes nearly all the weight.
void compare_large_scores(Device& device, int64_t head_dim, Limits limits) {
    const uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    const AttentionShape s{1, 130, 2, 1, head_dim};
    const int64_t q_cols = s.heads * head_dim, kv_cols = s.kv_heads * head_dim;
    auto qkv = random_normal(rng, s.seq * s.qkv_cols()), d_o = round_to_bf16(random_normal(rng, s.seq * q_cols));
    for (int64_t t = 0; t < s.seq; ++t)
        for (int64_t c = 0; c < q_cols + kv_cols; ++c) qkv[t * s.qkv_cols() + c] *= 30;
    qkv = round_to_bf16(qkv);
    Run run(device, s, qkv, d_o, 0);
    run.forward();
    run.backward();
    Reference reference(s, widen(qkv));
    reference.forward();
    Vector o = widen(run.o.read()), d_qkv = widen(run.d_qkv.read()), lse = widen(run.lse.read());
    reference.backward(widen(d_o), o);
    CHECK(*std::max_element(reference.lse.begin(), reference.lse.end()) > 1000);
    CHECK(std::isfinite(frobenius(d_qkv)));
    // fp32 scores of 10³ carry an error near 10⁻⁴, and so do the weights.
    CHECK(relative_error(o, reference.o) < limits.o + 1e-3);
    CHECK(relative_error(lse, reference.lse) < 2e-6);
    CHECK(relative_error(columns(d_qkv, s.qkv_cols(), q_cols + kv_cols, kv_cols), columns(reference.d_qkv, s.qkv_cols(), q_cols + kv_cols, kv_cols)) <
          limits.gradient + 1e-3);
    CHECK(relative_error(d_qkv, reference.d_qkv) < 0.02);
}

// Rotating on the way out gives the bits of rotating afterwards.
void compare_rotated(Device& device, const AttentionShape& s, uint64_t seed) {
    INFO("seed " << seed << " batch " << s.batch << " seq " << s.seq << " heads " << s.heads << "/" << s.kv_heads << " head_dim " << s.head_dim);
    std::mt19937_64 rng(seed);
    auto qkv = random_normal(rng, s.batch * s.seq * s.qkv_cols()), d_o = random_normal(rng, s.batch * s.seq * s.heads * s.head_dim);
    Run run(device, s, qkv, d_o, rng() % 2 ? 8 : 0);
    const int64_t positions = s.seq + int64_t(rng() % 3);
    OnDevice table(device, DType::f32, positions, s.head_dim, rope_table(positions, s.head_dim, 10000), s.head_dim + (rng() % 2 ? 4 : 0));
    run.forward();
    run.backward();
    const auto straight = run.d_qkv.raw<uint16_t>();
    rope_inplace(device, run.d_qkv, table, s.seq, s.heads, s.kv_heads, s.head_dim, true);
    const auto two_steps = run.d_qkv.raw<uint16_t>();
    run.d_qkv.write(std::vector<float>(s.batch * s.seq * s.qkv_cols(), NAN));
    run.backward(table);
    CHECK(run.d_qkv.raw<uint16_t>() == two_steps);
    CHECK((s.seq == 1 || two_steps != straight));
}

// One sequence many times over, more heads than the backward pass has scratch for at once: every copy gives the bits of the one alone.
void compare_copies(Device& device, const AttentionShape& s, uint64_t seed) {
    INFO("seed " << seed << " head_dim " << s.head_dim);
    std::mt19937_64 rng(seed);
    AttentionShape alone = s;
    alone.batch = 1;
    const auto qkv = random_normal(rng, s.seq * s.qkv_cols()), d_o = random_normal(rng, s.seq * s.heads * s.head_dim);
    auto copies = [&](const std::vector<float>& x) {
        std::vector<float> all;
        for (int64_t b = 0; b < s.batch; ++b) all.insert(all.end(), x.begin(), x.end());
        return all;
    };
    Run one(device, alone, qkv, d_o, 0), many(device, s, copies(qkv), copies(d_o), 0);
    for (Run* run : {&one, &many}) run->forward(), run->backward();
    CHECK(many.o.read() == copies(one.o.read()));
    CHECK(many.d_qkv.read() == copies(one.d_qkv.read()));
}

}  // namespace

TEST_CASE("the attention reference's gradient is its finite difference", "[attention]") {
    const uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    const AttentionShape s{2, 9, 4, 2, 6};
    const Vector qkv = widen(random_normal(rng, s.batch * s.seq * s.qkv_cols())), d_o = widen(random_normal(rng, s.batch * s.seq * s.heads * s.head_dim));
    auto loss = [&](const Vector& x) {
        Reference r(s, x);
        r.forward();
        return Reference::dot(r.o.data(), d_o.data(), int64_t(d_o.size()));
    };
    Reference reference(s, qkv);
    reference.forward();
    reference.backward(d_o, reference.o);
    for (int i = 0; i < 200; ++i) {
        const size_t at = rng() % qkv.size();
        const double h = 1e-5;
        Vector up = qkv, down = qkv;
        up[at] += h, down[at] -= h;
        CHECK(std::abs((loss(up) - loss(down)) / (2 * h) - reference.d_qkv[at]) < 1e-7);
    }
}

TEST_CASE("attention on the CPU matches fp64 loops", "[attention]") {
    auto device = test_device("cpu");
    compare_random_shapes(*device, {2, 8, 20, 64, 128}, 3e7, kCpuLimits);
}

TEST_CASE("attention on the CPU survives large scores", "[attention]") {
    auto device = test_device("cpu");
    for (int64_t head_dim : {8, 64}) compare_large_scores(*device, head_dim, kCpuLimits);
}

TEST_CASE("attention's backward on the CPU rotates on the way out", "[attention]") {
    auto device = test_device("cpu");
    const uint64_t seed = fresh_seed();
    compare_rotated(*device, {2, 19, 4, 2, 6}, seed);
    compare_rotated(*device, {3, 33, 2, 2, 64}, seed + 1);
}

TEST_CASE("attention counts its scratch on a dry device", "[attention]") {
    const AttentionShape s{3, 100, 4, 2, 64};
    for (DeviceKind kind : {DeviceKind::cpu, DeviceKind::cuda}) {
        auto device = Device::open_dry(kind);
        auto like = [&](int64_t cols) { return Tensor{nullptr, device->activation_dtype(), 300, cols, cols}; };
        const Tensor lse{nullptr, DType::f32, 1, 1200, 1200};
        attention_forward(*device, like(256), lse, like(512), s);
        CHECK(device->scratch_high_water() == 0);
        attention_backward(*device, like(512), like(256), like(512), like(256), lse, s);
        CHECK(device->scratch_high_water() >= 4800);
        CHECK(device->scratch_mark() == 0);
    }
}

TEST_CASE("attention's scratch beside the row sums is bounded", "[attention]") {
    for (int64_t head_dim : {64, 128})
        for (int64_t seq : {1, 256, 2048, 8192}) {
            auto device = Device::open_dry(DeviceKind::cuda);
            const AttentionShape s{65536 / seq, seq, 16, 16, head_dim};
            auto like = [&](int64_t cols) { return Tensor{nullptr, DType::bf16, s.batch * seq, cols, cols}; };
            const Tensor lse{nullptr, DType::f32, 1, s.batch * seq * s.heads, s.batch * seq * s.heads};
            attention_backward(*device, like(s.qkv_cols()), like(16 * head_dim), like(s.qkv_cols()), like(16 * head_dim), lse, s);
            CHECK(device->scratch_high_water() - lse.bytes() < int64_t(32) << 20);
        }
}

TEST_CASE("attention rejects tensors that do not fit the shape", "[attention]") {
    auto device = test_device("cpu", 1 << 20);
    const AttentionShape s{1, 4, 2, 1, 8};
    OnDevice o(*device, DType::f32, 4, 16), lse(*device, DType::f32, 1, 8), qkv(*device, DType::f32, 4, 24);
    CHECK_THROWS_AS(attention_forward(*device, o, lse, qkv, s), InternalError);
    OnDevice fitting(*device, DType::f32, 4, 32), d_qkv(*device, DType::f32, 4, 32), short_table(*device, DType::f32, 3, 8);
    CHECK_THROWS_AS(attention_backward(*device, d_qkv, o, fitting, o, lse, s, short_table), InternalError);
}

TEST_CASE("attention on the GPU matches fp64 loops", "[attention][gpu]") {
    auto device = test_device("cuda");
    compare_random_shapes(*device, {64, 128}, 3e8, kGpuLimits);
    // Both head sizes at every kind of tile: below, at, above one tile, and several with a tail.
    const uint64_t seed = fresh_seed();
    for (int64_t head_dim : {64, 128})
        for (int64_t seq : {31, 64, 97, 193}) compare(*device, {2, seq, 4, 2, head_dim}, seed + seq, kGpuLimits);
}

TEST_CASE("attention's backward on the GPU rotates on the way out", "[attention][gpu]") {
    auto device = test_device("cuda");
    const uint64_t seed = fresh_seed();
    for (int64_t head_dim : {64, 128})
        for (int64_t seq : {1, 31, 64, 129, 256, 515}) compare_rotated(*device, {2, seq, 4, seq % 2 ? 4 : 2, head_dim}, seed + seq);
}

TEST_CASE("attention's backward on the GPU reuses its scratch", "[attention][gpu]") {
    auto device = test_device("cuda");
    const uint64_t seed = fresh_seed();
    compare_copies(*device, {100, 200, 4, 4, 64}, seed);
    compare_copies(*device, {60, 200, 4, 4, 128}, seed + 1);
    compare_copies(*device, {20, 1100, 8, 4, 128}, seed + 2);
}

TEST_CASE("attention on the GPU survives large scores", "[attention][gpu]") {
    auto device = test_device("cuda");
    for (int64_t head_dim : {64, 128}) compare_large_scores(*device, head_dim, kGpuLimits);
}

// Sampled rows of a long sequence: O and dQ rows directly; dK and dV rows as sums over the queries of their group.
TEST_CASE("attention on the GPU at 4096 tokens", "[attention][gpu]") {
    const uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    auto device = test_device("cuda");
    const AttentionShape s{1, 4096, 2, 1, 128};
    const int64_t hd = s.head_dim;
    const double scale = 1 / std::sqrt(double(hd));
    auto qkv = round_to_bf16(random_normal(rng, s.seq * s.qkv_cols())), d_o = round_to_bf16(random_normal(rng, s.seq * s.heads * hd));
    Run run(*device, s, qkv, d_o, 0);
    run.forward();
    run.backward();
    const Vector o = widen(run.o.read()), lse = widen(run.lse.read()), d_qkv = widen(run.d_qkv.read()), grad = widen(d_o);
    const Reference reference(s, widen(qkv));

    std::vector<int64_t> samples{0, 1, 63, 64, 2047, 2048, 4095};
    for (int i = 0; i < 9; ++i) samples.push_back(int64_t(rng() % s.seq));
    Vector o_got, o_want, dq_got, dq_want, p;
    for (int64_t i : samples)
        for (int64_t h = 0; h < s.heads; ++h) {
            Vector row(hd), dq(hd, 0.0);
            double row_lse;
            reference.forward_row(0, i, h, row.data(), row_lse);
            CHECK(std::abs(lse[h * s.seq + i] - row_lse) < kGpuLimits.lse);
            const double* d_row = &grad[reference.out(0, i, h)];
            const double row_sum = Reference::dot(d_row, &o[reference.out(0, i, h)], hd);
            reference.weights(0, i, h, p);
            for (int64_t j = 0; j <= i; ++j) {
                double ds = scale * p[j] * (Reference::dot(d_row, &reference.qkv[reference.v(0, j, h)], hd) - row_sum);
                for (int64_t d = 0; d < hd; ++d) dq[d] += ds * reference.qkv[reference.k(0, j, h) + d];
            }
            o_want.insert(o_want.end(), row.begin(), row.end());
            dq_want.insert(dq_want.end(), dq.begin(), dq.end());
            o_got.insert(o_got.end(), &o[reference.out(0, i, h)], &o[reference.out(0, i, h)] + hd);
            dq_got.insert(dq_got.end(), &d_qkv[reference.q(0, i, h)], &d_qkv[reference.q(0, i, h)] + hd);
        }
    CHECK(relative_error(o_got, o_want) < kGpuLimits.o);
    CHECK(relative_error(dq_got, dq_want) < kGpuLimits.gradient);

    // All the queries' softmaxes, normalised by the LSE that the forward pass was just checked for.
    Vector dk_got, dk_want, dv_got, dv_want;
    for (int64_t j : samples) {
        Vector dk(hd, 0.0), dv(hd, 0.0);
        for (int64_t h = 0; h < s.heads; ++h)
            for (int64_t i = j; i < s.seq; ++i) {
                const double* d_row = &grad[reference.out(0, i, h)];
                const double* q = &reference.qkv[reference.q(0, i, h)];
                const double weight = std::exp(scale * Reference::dot(q, &reference.qkv[reference.k(0, j, h)], hd) - lse[h * s.seq + i]);
                const double row_sum = Reference::dot(d_row, &o[reference.out(0, i, h)], hd);
                const double ds = scale * weight * (Reference::dot(d_row, &reference.qkv[reference.v(0, j, h)], hd) - row_sum);
                for (int64_t d = 0; d < hd; ++d) dk[d] += ds * q[d], dv[d] += weight * d_row[d];
            }
        dk_want.insert(dk_want.end(), dk.begin(), dk.end());
        dv_want.insert(dv_want.end(), dv.begin(), dv.end());
        dk_got.insert(dk_got.end(), &d_qkv[reference.k(0, j, 0)], &d_qkv[reference.k(0, j, 0)] + hd);
        dv_got.insert(dv_got.end(), &d_qkv[reference.v(0, j, 0)], &d_qkv[reference.v(0, j, 0)] + hd);
    }
    CHECK(relative_error(dk_got, dk_want) < kGpuLimits.gradient);
    CHECK(relative_error(dv_got, dv_want) < kGpuLimits.gradient);
}

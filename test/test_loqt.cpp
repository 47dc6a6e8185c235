// One LinearGroup against fp64 plain loops: y, dx and the gradients of B or W, for left and right matrices, padded and not, alone and fused.
#include <map>

#include "loqt.h"
#include "ops/elementwise.h"
#include "test/support.h"
#include "weight_source.h"

namespace {

using Matrix = std::vector<double>;

// op(a)·op(b), (m, k)·(k, n).
Matrix multiply(const Matrix& a, bool ta, const Matrix& b, bool tb, int64_t m, int64_t k, int64_t n) {
    Matrix d(m * n, 0.0);
    for (int64_t i = 0; i < m; ++i)
        for (int64_t l = 0; l < k; ++l) {
            double x = ta ? a[l * m + i] : a[i * k + l];
            for (int64_t j = 0; j < n; ++j) d[i * n + j] += x * (tb ? b[j * k + l] : b[l * n + j]);
        }
    return d;
}

std::vector<float> logical(const std::vector<float>& padded, int64_t rows, int64_t ld, int64_t begin, int64_t cols) {
    std::vector<float> out;
    for (int64_t r = 0; r < rows; ++r) out.insert(out.end(), padded.begin() + r * ld + begin, padded.begin() + r * ld + begin + cols);
    return out;
}

// T × width values in columns padded with zeros to ld, as activations are.
std::vector<float> activations(std::mt19937_64& rng, int64_t T, const std::vector<int64_t>& widths, bool bf16_values) {
    std::vector<float> out;
    for (int64_t t = 0; t < T; ++t)
        for (int64_t w : widths) {
            std::vector<float> part = random_normal(rng, w);
            part.resize(padded_width(w), 0.0f);
            out.insert(out.end(), part.begin(), part.end());
        }
    return bf16_values ? round_to_bf16(out) : out;
}

struct Case {
    int64_t in;
    std::vector<int64_t> outs;
};

void check_group(Device& device, const Case& shape, const std::string& method, const std::string& effective_weights, double limit, std::mt19937_64& rng) {
    Config c;
    c.train.effective_weights = effective_weights;
    c.method.name = method == "loqt, P in bf16" ? "loqt" : method;
    c.method.quantize_projection = method != "loqt, P in bf16";
    c.method.rank = 8;
    c.method.scale = 0.5;
    c.train.micro_batch = c.train.batch = 1;
    c.optimizer.clip = 1e9;  // merges apart from the backward pass
    bool gpu = device.is_cuda();
    std::vector<LinearGroup::Spec> specs;
    for (size_t i = 0; i < shape.outs.size(); ++i) specs.push_back({"w" + std::to_string(i), shape.outs[i]});
    TensorTable table;
    LinearGroup group;
    group.configure(c, shape.in, specs);
    group.register_tensors(Registration{table, device, c, true});
    table.allocate(device);
    std::map<std::string, std::vector<float>> weights;
    for (const LinearGroup::Spec& spec : specs) weights[spec.name] = round_to_bf16(random_normal(rng, spec.out * shape.in, 0.05f));
    WeightSource source = host_weights([&](const std::string& name, std::vector<float>& values) { values = weights.at(name); });
    group.initialize(device, source);

    const int64_t T = 37;
    std::vector<float> x = activations(rng, T, {shape.in}, gpu), dy = activations(rng, T, shape.outs, gpu);
    DType act = device.activation_dtype();
    OnDevice dx_t(device, act, T, group.in_padded()), x_t(device, act, T, group.in_padded(), x), dy_t(device, act, T, group.out_padded(), dy),
        y_t(device, act, T, group.out_padded()), residual(device, act, T, group.out_padded(), dy);
    // One merge makes P and B non-trivial, then the pass that is checked.
    BackwardPass merging;
    const MethodPolicy policy = method_policy(c);
    merging.merges = policy.adapters && policy.projects;
    MergeStatistics statistics;
    group.input_gradient(device, dx_t, dy_t);
    group.parameter_gradients(device, dy_t, x_t, merging);
    if (merging.merges) {
        group.start_reinitialization(device, 0, &source);
        group.finish_reinitialization(statistics);
        CHECK(statistics.failed == 0);
    }
    for (Linear& l : group.linears())
        if (policy.trains_p) {  // one of them starts as zeros
            for (Parameter* factor : {&l.a, &l.b}) {
                OnDevice values(device, DType::f32, factor->rows, factor->cols, random_normal(rng, factor->rows * factor->cols, 0.1f));
                convert(device, factor->logical(factor->value), values);
            }
        }
    group.invalidate();
    group.forward(device, y_t, x_t);
    group.input_gradient(device, dx_t, dy_t);
    group.parameter_gradients(device, dy_t, x_t, BackwardPass{});

    std::vector<float> y = y_t.read(), dx = dx_t.read();
    Matrix expected_dx(T * shape.in, 0.0), xd;
    for (float v : logical(x, T, group.in_padded(), 0, shape.in)) xd.push_back(v);
    for (Linear& l : group.linears()) {
        INFO(method << " " << effective_weights << " in " << l.in << " out " << l.out << (l.right ? " right" : " left") << " T " << T);
        std::vector<float> effective;
        group.read_effective(device, l, effective);
        Matrix w(effective.begin(), effective.end()), dyd;
        for (float v : logical(dy, T, group.out_padded(), l.row_begin, l.out)) dyd.push_back(v);
        CHECK(relative_error(logical(y, T, group.out_padded(), l.row_begin, l.out), multiply(xd, false, w, true, T, l.in, l.out)) < limit);
        for (float v : logical(y, T, group.out_padded(), l.row_begin + l.out, padded_width(l.out) - l.out)) REQUIRE(v == 0.0f);
        Matrix part = multiply(dyd, false, w, false, T, l.out, l.in);
        for (size_t i = 0; i < part.size(); ++i) expected_dx[i] += part[i];
        Matrix dw = multiply(dyd, true, xd, false, l.out, T, l.in);
        auto read = [&](const Tensor& t) {
            OnDevice wide(device, DType::f32, t.rows, t.cols);
            convert(device, wide, t);
            return wide.read();
        };
        if (policy.trains_w) {
            CHECK(relative_error(read(l.dense.grad), dw) < 1e-5);
            continue;
        }
        std::vector<float> p32;
        if (policy.trains_p) {
            p32 = read(l.a.value);
        } else if (policy.quantized_p) {
            OnDevice p(device, DType::f32, l.rank, l.h());
            nf4_dequantize(device, p, l.p_q);
            p32 = p.read();
        } else {
            p32 = read(l.p);
        }
        Matrix p(p32.begin(), p32.end());
        Matrix db = l.right ? multiply(dw, true, p, true, l.in, l.out, l.rank) : multiply(dw, false, p, true, l.out, l.in, l.rank);
        for (double& v : db) v *= adapter_scale(c);
        CHECK(relative_error(read(l.b.logical(l.b.grad)), db) < limit);
        if (!policy.trains_p) continue;
        std::vector<float> b32 = read(l.b.logical(l.b.value));
        Matrix b(b32.begin(), b32.end()), dp = multiply(b, true, dw, l.right, l.rank, l.n(), l.h());
        for (double& v : dp) v *= adapter_scale(c);
        CHECK(relative_error(read(l.a.grad), dp) < limit);
    }
    CHECK(relative_error(logical(dx, T, group.in_padded(), 0, shape.in), expected_dx) < limit);
    for (float v : logical(dx, T, group.in_padded(), shape.in, group.in_padded() - shape.in)) REQUIRE(v == 0.0f);

    if (shape.outs.size() == 1) {  // the residual stream rides on the product
        group.forward(device, y_t, x_t, residual);
        std::vector<float> with = y_t.read();
        Matrix sum;
        for (size_t i = 0; i < y.size(); ++i) sum.push_back(double(y[i]) + double(dy[i]));
        CHECK(relative_error(with, sum) < (gpu ? 4e-3 : 1e-6));
    }
}

void check_all(Device& device, double limit) {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    const Case cases[] = {{64, {64, 32, 32}}, {64, {171, 171}}, {171, {64}}, {64, {64}}, {128, {344, 344}}, {344, {128}}};
    for (const Case& shape : cases)
        for (const char* method : {"full", "galore", "loqt", "loqt, P in bf16", "loqt-nq", "lora", "qlora"})
            for (const char* way : {"cached", "rebuilt", "factored"})
                if ((std::string(method) != "full" && std::string(method) != "galore") || std::string(way) == "rebuilt") check_group(device, shape, method, way, limit, rng);
}

}  // namespace

TEST_CASE("loqt layer: forward and gradients of every kind of matrix", "[loqt]") {
    auto device = test_device("cpu");
    check_all(*device, 1e-5);
}
TEST_CASE("loqt layer on the GPU: forward and gradients of every kind of matrix", "[loqt][gpu]") {
    auto device = test_device("cuda");
    check_all(*device, 6e-3);
}

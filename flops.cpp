#include "flops.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "method.h"
#include "ops/matmul.h"
#include "runtime/metrics.h"

namespace {

struct Matrix {
    double out, in, rank;
    bool last;  // of its block: its output is the next block's input, which is kept
    bool left() const { return out >= in; }
    double size() const { return out * in; }
};

// The seven of a block.
std::vector<Matrix> matrices(const Config& c) {
    double h = double(c.model.hidden), f = double(c.model.intermediate), kv = double(c.kv_heads() * c.model.head_dim());
    std::vector<Matrix> all;
    for (auto [out, in] : {std::pair<double, double>{h, h}, {kv, h}, {kv, h}, {h, h}, {f, h}, {f, h}, {h, f}})
        all.push_back({out, in, c.low_rank() ? std::min({double(c.method.rank), out, in}) : 0, in == f && all.size() == 6});
    return all;
}

double projected_rank(const Config& c, const Matrix& m) { return std::min({double(c.method.rank), m.out, m.in}); }
double tokens_of(const Config& c) { return double(c.train.micro_batch) * double(c.train.seq_len); }
bool factored(const Config& c) { return c.low_rank() && c.train.effective_weights == "factored"; }
bool cached(const Config& c) { return c.low_rank() && c.train.effective_weights == "cached"; }
bool again(const Config& c) { return c.train.recompute == "block"; }

// How often a micro-batch makes W_eff (factored: W), a use being a forward or a backward pass.
double builds(const Config& c, double uses) { return !c.low_rank() ? 0 : cached(c) ? 1.0 / double(c.micro_batches()) : uses; }
double adapter_flops(const Matrix& m) { return 2 * m.rank * (m.out + m.in); }  // through P and B, a token
double attention_flops(const Config& c) { return 2.0 * double(c.train.seq_len) * double(c.model.hidden); }  // causal half of 4·S·h, a token

// FLOPs per token of one matrix: y, dx and dW; low-rank: y, dx, x·P and dB, plus forming s·P·B for the forward and for the backward pass.
double linear_flops(const Config& c, const Matrix& m) {
    // galore projects the gradient of a step, and its update back.
    if (!c.low_rank()) return 6 * m.size() + (makes_anew(c) ? 4 * projected_rank(c, m) * m.size() / (double(c.train.batch) * double(c.train.seq_len)) : 0);
    // A trained P: dy·B and dP too; dy·B is made apart from what factored needs.
    const double trained_p = method_policy(c).trains_p ? adapter_flops(m) : 0;
    // x·P·B stands beside x·W, dy·B·P beside dy·W; and x·P, if kept, need not be made for dB.
    if (factored(c)) return 4 * m.size() + 3 * adapter_flops(m) - (m.left() ? 2 * m.rank * m.in : 0) + trained_p;
    return 4 * m.size() + adapter_flops(m) + trained_p + builds(c, 2) * 2 * m.rank * m.size() / tokens_of(c);
}

// What a plain forward pass through it costs once more.
double repeated_linear_flops(const Config& c, const Matrix& m) {
    double build = factored(c) ? adapter_flops(m) : cached(c) ? 0 : 2 * m.rank * m.size() / tokens_of(c);
    return 2 * m.size() + build;
}

// Merges as scheduled: 1.9 or 5.8 ns per squared narrow side of every matrix (H200, 1b: 1.3 and 4.1 s). Workers do several at a time.
double merge_cost_per_token(const Config& c, int workers) {
    double cost = 0;
    for (const Matrix& m : matrices(c)) cost += (c.method.projection == "gram" ? 4e6 : 1.3e6) * std::pow(std::min(m.out, m.in), 2);
    double tokens = double(c.train.batch) * double(c.train.seq_len) * double(c.train.steps) / double(merge_steps(c).size());
    return double(c.model.layers) * cost / (1 + workers / 4.0) / tokens;
}

}  // namespace

double training_flops_per_token(const Config& c) {
    double block = 3.5 * attention_flops(c);  // the backward pass is 2.5 times the forward
    for (const Matrix& m : matrices(c)) block += linear_flops(c, m);
    return double(c.model.layers) * block + 6.0 * double(c.model.hidden * c.model.vocab);
}

double machine_flops_per_token(const Config& c) {
    double layers = double(c.model.layers), repeated = attention_flops(c), again_in_backward = 0;
    for (const Matrix& m : matrices(c)) {
        if (factored(c) && m.left() && c.train.recompute != "none") again_in_backward += 2 * m.rank * m.in;
        if (!m.last) repeated += repeated_linear_flops(c, m);
    }
    return training_flops_per_token(c) + layers * again_in_backward + (again(c) ? (layers - 1) * repeated : 0);
}

// Kinds of cost beside merges, each turned into FLOPs:
//   products         as counted.
//   memory traffic   element-wise operations per token; making weights per micro-batch, however few tokens share it. A GPU does some
//                    180 FLOPs while a byte moves (H200: 790 TFLOP/s over 4.3 TB/s; others 76 to 300).
//   beginnings       a product or kernel takes 5 or 6 µs before it runs at full rate, 4e9 FLOPs: at 690 TFLOP/s a product of a 2048 × 2048
//                    matrix then reaches 250 of them with 256 rows (measured: 211), 510 with 1,280 (533), 670 with 16,384 (697).
// A CPU moves its bytes for less and begins at once. The optimizer's step costs the same whatever is chosen.
double cost_per_token(const Config& c, DeviceKind kind, int workers) {
    const bool cuda = kind == DeviceKind::cuda, nf4 = method_policy(c).quantized, trains_p = method_policy(c).trains_p;
    const double per_byte = cuda ? 180 : 5, per_operation = cuda ? 4e9 : 1e5, element = cuda ? 2 : 4;
    const double h = double(c.model.hidden), f = double(c.model.intermediate), kv = double(c.kv_heads() * c.model.head_dim()), layers = double(c.model.layers);
    const double repeated = again(c) ? (layers - 1) / layers : 0;  // share of the forward pass that is run again

    // Elements moved per token and block: norms, rotation, attention, SwiGLU; in the backward pass their inputs written again for the gradients of weights.
    double forward = 4 * h + 2 * (h + kv) + 2 * (h + kv) + 3 * f;
    double backward = 8 * h + 4 * (h + kv) + 5 * f + (c.train.recompute == "none" ? 0 : 2 * h + f);
    double moved = element * (layers * (forward * (1 + repeated) + backward) + 2 * double(c.model.vocab));

    // Bytes moved and operations begun per micro-batch and block. A gradient that more will be added to is read and written, in fewer bits by way of fp32.
    const bool wide_sums = !cuda || c.train.gradients == "fp32";
    const double gradient = c.micro_batches() == 1 ? (wide_sums ? 4 : 2) : wide_sums ? 8 : 12;
    double bytes = 0, begun = 10 + 5 * repeated;  // norms, rotation, attention, SwiGLU
    for (const Matrix& m : matrices(c)) {
        double uses = 2 + (m.last ? 0 : repeated), made = builds(c, uses), wide = std::max(m.out, m.in), narrow = std::min(m.out, m.in);
        begun += uses + 1;
        if (!c.low_rank()) {
            bytes += gradient * m.size();
            continue;
        }
        bytes += gradient * m.rank * wide;
        begun += 2;  // P, and its product with x or dy for the gradient of B
        if (trains_p) bytes += gradient * m.rank * narrow, begun += 2;  // the same with B for the gradient of P
        // NF4 is half a byte and becomes an element; W_eff gets P·B added, to W where that is stored as it is needed.
        if (nf4) bytes += made * (0.516 + element) * (m.size() + (method_policy(c).quantized_p ? m.rank * narrow : 0)), begun += 2 * made;
        if (!factored(c)) bytes += made * (nf4 ? 2 : 4) * element * m.size(), begun += made;
        if (factored(c)) begun += 2 * uses;  // through P, through B
    }
    double per_micro_batch = layers * (per_byte * bytes + per_operation * begun) + 10 * per_operation;
    double merges = method_policy(c).projects ? merge_cost_per_token(c, workers) : 0;
    return machine_flops_per_token(c) + per_byte * moved + per_micro_batch / tokens_of(c) + merges;
}

int64_t parameter_count(const Config& c) {
    int64_t h = c.model.hidden, kv = c.kv_heads() * c.model.head_dim();
    return c.model.layers * (2 * h * h + 2 * kv * h + 3 * h * c.model.intermediate + 2 * h) + 2 * c.model.vocab * h + h;
}

double full_rank_flops_per_token(const Config& config) { return 6.0 * double(parameter_count(config)); }

double data_sheet_flops(const std::string& name) {
    // A part of a GPU, and the many power limits of laptops, are not on data sheets.
    for (const char* variant : {"MIG", "Laptop", "Max-Q", "vGPU", "GRID"})
        if (name.find(variant) != std::string::npos) return 0;
    struct Entry {
        const char* part;
        double teraflops;
    };
    // First match wins: longer names before their prefixes. GeForce: the rate with fp32 accumulation, half of that with fp16.
    static const Entry table[] = {
        {"GB200", 2500}, {"B200", 2250}, {"GH200", 989}, {"H200 NVL", 835}, {"H200", 989}, {"H100 PCIe", 756}, {"H100 NVL", 835}, {"H100", 989}, {"H800 PCIe", 756},
        {"H800", 989}, {"H20", 148}, {"A100", 312}, {"A800", 312}, {"A30", 165}, {"A6000", 155}, {"A40", 150}, {"A10G", 70}, {"A10", 125},
        {"L40S", 362}, {"L40", 181}, {"L4", 121},
        {"RTX 5090 D", 0}, {"RTX 5090", 209}, {"RTX 5080", 113}, {"RTX 5070 Ti", 88}, {"RTX 5070", 62},
        {"RTX 4090 D", 0}, {"RTX 4090", 165}, {"RTX 4080 SUPER", 104}, {"RTX 4080", 97}, {"RTX 4070 Ti SUPER", 88}, {"RTX 4070 Ti", 80},
        {"RTX 4070 SUPER", 71}, {"RTX 4070", 58}, {"RTX 4060 Ti", 44}, {"RTX 4060", 30},
        {"RTX 3090 Ti", 80}, {"RTX 3090", 71}, {"RTX 3080 Ti", 68}, {"RTX 3080", 60}, {"RTX 3070 Ti", 43.5}, {"RTX 3070", 41}, {"RTX 3060 Ti", 32}};
    // Whole words: an "RTX A4000" is no "A40".
    auto in_word = [&](size_t i) { return i < name.size() && std::isalnum(static_cast<unsigned char>(name[i])); };
    for (const Entry& entry : table) {
        size_t at = name.find(entry.part);
        if (at != std::string::npos && !(at > 0 && in_word(at - 1)) && !in_word(at + std::strlen(entry.part))) return entry.teraflops * 1e12;
    }
    return 0;
}

double measure_product_flops(Device& device, int64_t size) {
    const int64_t m = size, n = size, k = 2 * size;
    DType type = device.activation_dtype();
    auto matrix = [&](int64_t rows, int64_t cols) { return Tensor{device.allocate(rows * cols * size_of(type), "measuring the peak"), type, rows, cols, cols}; };
    Tensor a = matrix(m, k), b = matrix(n, k), d = matrix(m, n);
    // Zeros would draw less power and so run faster than training does. One stretch of random values, over and over.
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    std::vector<float> wide(1 << 16);
    for (float& x : wide) x = normal(rng);
    std::vector<bf16> narrow(wide.size());
    std::transform(wide.begin(), wide.end(), narrow.begin(), [](float x) { return to_bf16(x); });
    const char* pool = type == DType::bf16 ? reinterpret_cast<const char*>(narrow.data()) : reinterpret_cast<const char*>(wide.data());
    const int64_t pool_bytes = int64_t(wide.size()) * size_of(type);
    for (const Tensor& t : {a, b})
        for (int64_t begin = 0; begin < t.bytes(); begin += pool_bytes)
            device.upload(static_cast<char*>(t.data) + begin, pool, std::min(pool_bytes, t.bytes() - begin));

    auto seconds_of = [&](int64_t products) {
        device.synchronize();
        double begin = wall_seconds();
        for (int64_t i = 0; i < products; ++i) matmul(device, d, 1.0f, a, Op::none, b, Op::transpose);
        device.synchronize();
        return wall_seconds() - begin;
    };
    seconds_of(1);  // loads the kernel
    int64_t products = std::clamp<int64_t>(int64_t(0.02 / seconds_of(1)), 1, 100);
    double best = seconds_of(products);
    for (int i = 1; i < 5; ++i) best = std::min(best, seconds_of(products));
    for (const Tensor& t : {a, b, d}) device.release(t.data);
    return 2.0 * double(m) * double(n) * double(k) * double(products) / best;
}

PeakFlops peak_flops(Device& device) {
    if (!device.is_cuda() || device.dry()) return {};
    double known = data_sheet_flops(device.name());
    if (known > 0) return {known, "data sheet"};
    int64_t size = 4096;
    while (size > 256 && 10 * size * size * size_of(device.activation_dtype()) > device.allowed_bytes()) size /= 2;
    return {measure_product_flops(device, size), "measured"};
}

#include "flops.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <random>
#include <vector>

#include "ops/matmul.h"
#include "runtime/metrics.h"

namespace {

// FLOPs per token of one (out, in) matrix: y, dx (and dW if W is trained); low-rank: x·P and dB, plus forming s·P·B twice per micro-batch.
double linear_flops(const Config& c, double out, double in) {
    double product = 2.0 * out * in;
    if (!c.low_rank()) return 3 * product;
    double r = std::min({double(c.method.rank), out, in});
    double tokens = double(c.train.micro_batch) * double(c.train.seq_len);
    // x·P and dB need 2r(m + n); so do x·P·B beside x·W, and dy·B·P beside dy·W.
    if (c.train.effective_weights == "factored") return 2 * product + 6.0 * r * (out + in);
    double builds = c.train.effective_weights == "cached" ? 1.0 / double(c.micro_batches()) : 2.0;
    return 2 * product + 2.0 * r * (out + in) + builds * r * product / tokens;
}

}  // namespace

double training_flops_per_token(const Config& c) {
    double h = double(c.model.hidden), f = double(c.model.intermediate), kv = double(c.kv_heads() * c.model.head_dim());
    double linears = linear_flops(c, h, h) + 2 * linear_flops(c, kv, h) + linear_flops(c, h, h) + 2 * linear_flops(c, f, h) + linear_flops(c, h, f);
    double attention = 3.5 * 2.0 * double(c.train.seq_len) * h;  // 2·S·h forward (causal half of 4·S·h), 2.5 times that backward
    return double(c.model.layers) * (linears + attention) + 6.0 * h * double(c.model.vocab);
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
    return {measure_product_flops(device, 4096), "measured"};
}

#include "flops.h"

#include <algorithm>

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

double peak_flops(const std::string& name) {
    struct Entry {
        const char* part;
        double teraflops;
    };
    // First match wins: longer names before their prefixes. Consumer cards: bf16 with fp32 accumulation.
    static const Entry table[] = {{"H200", 989},  {"H100 PCIe", 756}, {"H100 NVL", 835}, {"H100", 989},     {"GH200", 989},   {"A100", 312},
                                  {"A6000", 155}, {"A40", 150},       {"A10G", 70},      {"A10", 125},      {"L40S", 362},    {"L40", 181},
                                  {"L4", 121},    {"RTX 5090", 209},  {"RTX 5080", 113}, {"RTX 4090", 165}, {"RTX 4080", 97}, {"RTX 4070", 58},
                                  {"RTX 3090 Ti", 80}, {"RTX 3090", 71}, {"RTX 3080", 60}, {"RTX 6000 Ada", 182}};
    for (const Entry& entry : table)
        if (name.find(entry.part) != std::string::npos) return entry.teraflops * 1e12;
    return 0;
}

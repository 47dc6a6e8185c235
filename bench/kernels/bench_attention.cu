// Time of the attention kernels on one GPU, after a comparison with the CPU form. Prints the median of 20 runs in ms and TFLOP/s
// by the convention of the FlashAttention papers: 4·batch·heads·seq²·head_dim, halved for causal, backward 2.5 times that.
// bench/peer_attention.py times PyTorch's on the same shapes.
//   make build/bench_attention && build/bench_attention [tokens columns]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "bench/kernels/timing.h"
#include "ops/attention.h"
#include "ops/rope.h"
#include "runtime/cuda_context.h"

namespace {

struct Problem {
    AttentionShape s;
    Tensor qkv, d_qkv, o, d_o, lse, rope;
    Device& device;

    Problem(Device& dev, const AttentionShape& shape) : s(shape), device(dev) {
        auto make = [&](DType dtype, int64_t rows, int64_t cols) {
            return Tensor{device.allocate(rows * cols * size_of(dtype), "bench"), dtype, rows, cols, cols};
        };
        const int64_t tokens = s.batch * s.seq, q_cols = s.heads * s.head_dim;
        qkv = make(device.activation_dtype(), tokens, s.qkv_cols()), d_qkv = make(device.activation_dtype(), tokens, s.qkv_cols());
        o = make(device.activation_dtype(), tokens, q_cols), d_o = make(device.activation_dtype(), tokens, q_cols);
        lse = make(DType::f32, 1, tokens * s.heads), rope = make(DType::f32, s.seq, s.head_dim);
    }
    ~Problem() {
        for (Tensor t : {qkv, d_qkv, o, d_o, lse, rope}) device.release(t.data);
    }
    Problem(const Problem&) = delete;

    // The same bf16-representable values on every device: a million of them, again and again.
    void fill() {
        std::mt19937_64 rng(1);
        std::normal_distribution<float> normal;
        for (Tensor t : {qkv, d_o}) {
            const int64_t count = std::min<int64_t>(t.numel(), 1 << 20);
            std::vector<bf16> narrow(count);
            std::vector<float> wide(count);
            for (int64_t i = 0; i < count; ++i) wide[i] = to_float(narrow[i] = to_bf16(normal(rng)));
            for (int64_t at = 0; at < t.numel(); at += count)
                device.upload(static_cast<char*>(t.data) + at * size_of(t.dtype), device.is_cuda() ? static_cast<void*>(narrow.data()) : wide.data(),
                              std::min(count, t.numel() - at) * size_of(t.dtype));
        }
        const std::vector<float> table = rope_table(s.seq, s.head_dim, 10000);
        device.upload(rope.data, table.data(), rope.bytes());
    }
    void forward() { attention_forward(device, o, lse, qkv, s); }
    void backward(Tensor table = {}) { attention_backward(device, d_qkv, d_o, qkv, o, lse, s, table); }
    std::vector<float> read(Tensor t) {
        std::vector<float> out(t.numel());
        if (t.dtype == DType::f32) {
            device.download(out.data(), t.data, t.bytes());
        } else {
            std::vector<bf16> narrow(t.numel());
            device.download(narrow.data(), t.data, t.bytes());
            for (int64_t i = 0; i < t.numel(); ++i) out[i] = to_float(narrow[i]);
        }
        return out;
    }
};

double relative_error(const std::vector<float>& a, const std::vector<float>& b) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < a.size(); ++i) difference += (double(a[i]) - b[i]) * (double(a[i]) - b[i]), norm += double(b[i]) * b[i];
    return std::sqrt(difference / norm);
}

bool agrees(Device& gpu, Device& cpu, const AttentionShape& s) {
    Problem on_gpu(gpu, s), on_cpu(cpu, s);
    for (Problem* p : {&on_gpu, &on_cpu}) p->fill(), p->forward(), p->backward();
    const double o = relative_error(on_gpu.read(on_gpu.o), on_cpu.read(on_cpu.o)), lse = relative_error(on_gpu.read(on_gpu.lse), on_cpu.read(on_cpu.lse)),
                 gradient = relative_error(on_gpu.read(on_gpu.d_qkv), on_cpu.read(on_cpu.d_qkv));
    const bool good = o < 4e-3 && lse < 1e-5 && gradient < 6e-3;
    std::printf("check  seq %4lld  head_dim %3lld  heads %lld/%lld   relative error: o %.2e  lse %.2e  dqkv %.2e  %s\n", (long long)s.seq,
                (long long)s.head_dim, (long long)s.heads, (long long)s.kv_heads, o, lse, gradient, good ? "ok" : "WRONG");
    return good;
}

}  // namespace

// usage: bench_attention [tokens columns], columns: heads times head_dim
int main(int argc, char** argv) {
    const int64_t tokens = argc > 2 ? std::atoll(argv[1]) : 16384, columns = argc > 2 ? std::atoll(argv[2]) : 2048;
    try {
        auto gpu = Device::open("cuda"), cpu = Device::open("cpu");
        gpu->reserve_scratch(int64_t(256) << 20);
        cpu->reserve_scratch(int64_t(1) << 20);
        bool good = true;
        for (int64_t head_dim : {64, 128})
            for (int64_t seq : {64, 200, 256, 515}) good &= agrees(*gpu, *cpu, {2, seq, 4, 2, head_dim});
        if (!good) return 1;

        std::printf("\n%s, %lld tokens, %lld columns of heads\n"
                    "  seq  head_dim   forward ms  TFLOP/s   backward ms  TFLOP/s   both ms   backward with rotation ms\n",
                    gpu->name().c_str(), (long long)tokens, (long long)columns);
        for (int64_t head_dim : {64, 128})
            for (int64_t seq : {256, 512, 1024, 2048, 4096}) {
                const AttentionShape s{tokens / seq, seq, columns / head_dim, columns / head_dim, head_dim};
                Problem problem(*gpu, s);
                problem.fill();
                const double flops = 2.0 * s.batch * s.heads * double(seq) * double(seq) * head_dim;
                const double forward = median_ms(*gpu, [&] { problem.forward(); }), backward = median_ms(*gpu, [&] { problem.backward(); }),
                             rotating = median_ms(*gpu, [&] { problem.backward(problem.rope); });
                std::printf("%5lld  %8lld   %10.3f  %7.1f   %11.3f  %7.1f   %7.3f   %7.3f\n", (long long)seq, (long long)head_dim, forward,
                            flops / forward * 1e-9, backward, 2.5 * flops / backward * 1e-9, forward + backward, rotating);
            }
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}

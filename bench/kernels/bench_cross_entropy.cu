// Cross-entropy: time and bandwidth on one GPU, see bench.h.
//   make build/bench_cross_entropy && build/bench_cross_entropy
#include "bench/kernels/bench.h"
#include "ops/cross_entropy.h"

int main() {
    return run_bench([](Bench& bench) {
        for (int64_t vocab : {259, 32000, 50257, 128256})
            bench.check("cross_entropy", 5e-3, [&](Tensors& tensors) {
                Tensor logits = tensors.activation(37, vocab, 2.0f), losses = tensors.empty(DType::f32, 1, 37);
                cross_entropy(tensors.device(), losses, logits, tensors.integers(37, -1, int32_t(vocab)), 0.125f, true);
                return std::vector<Tensor>{losses, logits};
            });
        for (int64_t vocab : {32000, 50257, 128256})
            for (int64_t tokens : {512, 2048, 16384}) {
                Tensors tensors(bench.gpu());
                Tensor logits = tensors.activation(tokens, vocab, 2.0f), losses = tensors.empty(DType::f32, 1, tokens);
                const int32_t* targets = tensors.integers(tokens, 0, int32_t(vocab));
                const std::string shape = format("%lld × %lld", (long long)tokens, (long long)vocab);
                bench.time("cross_entropy", shape.c_str(), double(logits.bytes()), [&] { cross_entropy(bench.gpu(), losses, logits, targets, 1.0f, false); });
                bench.time("cross_entropy, gradient", shape.c_str(), 2.0 * double(logits.bytes()),
                           [&] { cross_entropy(bench.gpu(), losses, logits, targets, 1.0f, true); });
            }
    });
}

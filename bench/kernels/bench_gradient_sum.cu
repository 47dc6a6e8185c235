// Sums of gradients over micro-batches: time and bandwidth on one GPU, see bench.h. Matrices of 1B, 7B and 13B models, and a head's slab.
//   make build/bench_gradient_sum && build/bench_gradient_sum
#include "bench/kernels/bench.h"
#include "ops/gradient_sum.h"

namespace {

struct Problem {
    Tensor g;
    GradientSum sum;

    Problem(Tensors& tensors, DType type, int64_t rows, int64_t cols) : g(tensors.random(DType::f32, rows, cols)) {
        if (type == DType::bf16) {
            sum.values = tensors.zeros(type, rows, cols);
        } else {
            sum.values = tensors.zeros(type, 1, rows * cols);
            sum.scales = tensors.zeros(DType::f32, 1, ceil_div(rows * cols, kGradientBlock));
        }
    }
    double bytes(int passes) const { return double(g.bytes()) + passes * double(sum.values.bytes() + sum.scales.bytes()); }
};

}  // namespace

int main() {
    return run_bench([](Bench& bench) {
        for (DType type : {DType::bf16, DType::u8})
            bench.check(safetensors_name(type), 1e-7, [&](Tensors& tensors) {
                Problem problem(tensors, type, 300, 1024);
                for (uint32_t i = 0; i < 3; ++i) add_to_gradient_sum(tensors.device(), problem.sum, problem.g, i == 0, RoundingDraws{42, 1, i});
                load_gradient_sum(tensors.device(), problem.g, problem.sum);
                return std::vector<Tensor>{problem.g};
            });
        const int64_t shapes[][2] = {{5504, 512}, {11008, 1024}, {13824, 1024}, {4000, 5120}, {32000, 5120}};
        for (DType type : {DType::bf16, DType::u8})
            for (const auto& [rows, cols] : shapes) {
                Tensors tensors(bench.gpu());
                Problem problem(tensors, type, rows, cols);
                const std::string shape = format("%lld × %lld", (long long)rows, (long long)cols);
                const std::string name = type == DType::bf16 ? "bf16" : "8 bits";
                const RoundingDraws draws{42, 1, 7};
                bench.time((name + ", first").c_str(), shape.c_str(), problem.bytes(1), [&] { add_to_gradient_sum(bench.gpu(), problem.sum, problem.g, true, draws); });
                bench.time((name + ", add").c_str(), shape.c_str(), problem.bytes(2), [&] { add_to_gradient_sum(bench.gpu(), problem.sum, problem.g, false, draws); });
                bench.time((name + ", load").c_str(), shape.c_str(), problem.bytes(1), [&] { load_gradient_sum(bench.gpu(), problem.g, problem.sum); });
            }
    });
}

// Conversions, sums and the global gradient norm: time and bandwidth on one GPU, see bench.h.
//   make build/bench_elementwise && build/bench_elementwise
#include "bench/kernels/bench.h"
#include "ops/elementwise.h"

int main() {
    return run_bench([](Bench& bench) {
        bench.check("convert, axpby", 5e-3, [](Tensors& tensors) {
            Tensor x = tensors.random(DType::f32, 33, 1000), y = tensors.random(DType::bf16, 33, 1000);
            axpby(tensors.device(), y, 0.5f, x, 0.25f);
            convert(tensors.device(), x, y);
            return std::vector<Tensor>{y, x};
        });
        for (int64_t n : {512 * 128, 2048 * 512, 32000 * 512, 32000 * 4096}) {
            Tensors tensors(bench.gpu());
            Tensor wide = tensors.random(DType::f32, 1, n), narrow = tensors.random(DType::bf16, 1, n);
            double* sums = static_cast<double*>(tensors.empty(DType::f64, 1, 1).data);
            const std::string shape = format("%lld", (long long)n);
            bench.time("convert fp32 to bf16", shape.c_str(), 6.0 * double(n), [&] { convert(bench.gpu(), narrow, wide); });
            bench.time("convert bf16 to fp32", shape.c_str(), 6.0 * double(n), [&] { convert(bench.gpu(), wide, narrow); });
            bench.time("axpby bf16 into fp32", shape.c_str(), 10.0 * double(n), [&] { axpby(bench.gpu(), wide, 0.5f, narrow, 0.5f); });
            bench.time("sum_of_squares fp32", shape.c_str(), 4.0 * double(n), [&] { sum_of_squares(bench.gpu(), sums, 0, wide); });
            bench.time("sum_of_squares bf16", shape.c_str(), 2.0 * double(n), [&] { sum_of_squares(bench.gpu(), sums, 0, narrow); });
        }
        for (const ModelShape& model : kModels) {  // the gradients of a LoQT model: B of seven matrices per block (rank h/4), norms, embedding, head
            const int64_t layers[] = {8, 24, 24, 32}, h = model.hidden, f = model.intermediate, r = h / 4;
            Tensors tensors(bench.gpu());
            std::vector<Tensor> gradients;
            for (int i = 0; i < 2; ++i) gradients.push_back(tensors.random(DType::f32, 32000, h));
            for (int64_t i = 0; i < layers[&model - kModels]; ++i) {
                for (int64_t width : {h, h, h, h, f, f, h}) gradients.push_back(tensors.random(DType::f32, r, width));
                for (int k = 0; k < 2; ++k) gradients.push_back(tensors.random(DType::f32, 1, h));
            }
            double bytes = 0;
            for (const Tensor& g : gradients) bytes += double(g.bytes());
            double* sums = static_cast<double*>(tensors.empty(DType::f64, 1, int64_t(gradients.size())).data);
            bench.time("sums_of_squares, gradients", format("%s: %zu tensors", model.name, gradients.size()).c_str(), bytes,
                       [&] { sums_of_squares(bench.gpu(), sums, gradients); });
        }
    });
}

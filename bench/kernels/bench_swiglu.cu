// SwiGLU: time and bandwidth on one GPU, see bench.h.
//   make build/bench_swiglu && build/bench_swiglu
#include "bench/kernels/bench.h"
#include "ops/swiglu.h"

int main() {
    return run_bench([](Bench& bench) {
        for (int64_t f : {1376, 5504})
            bench.check("swiglu", 5e-3, [&](Tensors& tensors) {
                Tensor gate_up = tensors.activation(333, 2 * f), d_gate_up = tensors.activation(333, 2 * f), a = tensors.activation(333, f);
                Tensor da = tensors.activation(333, f);
                swiglu_forward(tensors.device(), a, gate_up);
                swiglu_backward(tensors.device(), d_gate_up, gate_up, da, da);
                return std::vector<Tensor>{a, d_gate_up, da};
            });
        for (const ModelShape& model : kModels)
            for (int64_t tokens : kTokens) {
                Tensors tensors(bench.gpu());
                Tensor gate_up = tensors.activation(tokens, 2 * model.intermediate), a = tensors.activation(tokens, model.intermediate);
                const double matrix = double(a.bytes());
                const std::string shape = shape_name(model, tokens, model.intermediate);
                bench.time("swiglu_forward", shape.c_str(), 3 * matrix, [&] { swiglu_forward(bench.gpu(), a, gate_up); });
                bench.time("swiglu_backward", shape.c_str(), 5 * matrix, [&] { swiglu_backward(bench.gpu(), gate_up, gate_up, a); });
                bench.time("swiglu_backward, a", shape.c_str(), 6 * matrix, [&] { swiglu_backward(bench.gpu(), gate_up, gate_up, a, a); });
            }
    });
}

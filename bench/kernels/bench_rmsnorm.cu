// RMSNorm: time and bandwidth on one GPU, see bench.h.
//   make build/bench_rmsnorm && build/bench_rmsnorm
#include "bench/kernels/bench.h"
#include "ops/rmsnorm.h"

namespace {

struct Problem {
    Tensor x, y, dy, dx, w, dw, rstd;
    Problem(Tensors& tensors, int64_t rows, int64_t h)
        : x(tensors.activation(rows, h)), y(tensors.activation(rows, h)), dy(tensors.activation(rows, h)), dx(tensors.activation(rows, h)),
          w(tensors.random(DType::f32, 1, h)), dw(tensors.zeros(DType::f32, 1, h)), rstd(tensors.empty(DType::f32, 1, rows)) {}
};

}  // namespace

int main() {
    return run_bench([](Bench& bench) {
        for (int64_t h : {512, 768, 2048, 5120})
            bench.check("rmsnorm", 5e-3, [&](Tensors& tensors) {
                Problem p(tensors, 333, h);
                rmsnorm_forward(tensors.device(), p.y, p.rstd, p.x, p.w, 1e-6f);
                rmsnorm_backward(tensors.device(), p.dx, p.dw, p.dy, p.x, p.w, p.rstd, p.dy);
                return std::vector<Tensor>{p.y, p.rstd, p.dx, p.dw, p.dy};
            });
        for (const ModelShape& model : kModels)
            for (int64_t tokens : kTokens) {
                Tensors tensors(bench.gpu());
                Problem p(tensors, tokens, model.hidden);
                const double matrix = double(p.x.bytes());
                const std::string shape = shape_name(model, tokens, model.hidden);
                bench.time("rmsnorm_forward", shape.c_str(), 2 * matrix, [&] { rmsnorm_forward(bench.gpu(), p.y, p.rstd, p.x, p.w, 1e-6f); });
                bench.time("rmsnorm_backward", shape.c_str(), 4 * matrix, [&] { rmsnorm_backward(bench.gpu(), p.dx, p.dw, p.dy, p.x, p.w, p.rstd); });
                bench.time("rmsnorm_backward, normed", shape.c_str(), 5 * matrix,
                           [&] { rmsnorm_backward(bench.gpu(), p.dx, p.dw, p.dy, p.x, p.w, p.rstd, p.dy); });
            }
    });
}

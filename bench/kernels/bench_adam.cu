// AdamW: time and bandwidth on one GPU, see bench.h. The last lines are the update of all parameters of a model, one call per tensor.
//   make build/bench_adam && build/bench_adam
#include "adam.h"
#include "bench/kernels/bench.h"

namespace {

const AdamStep kStep{1e-3, 0.9, 0.999, 1e-8, 0.01, 10, 1.0f, ParamRounding::stochastic, 42, 3, 10};

struct Problem {
    Tensor p, g;
    AdamState state;

    Problem(Tensors& tensors, DType p_type, MomentFormat wanted, int64_t n) : p(tensors.random(p_type, 1, n)), g(tensors.random(DType::f32, 1, n, 0.1f)) {
        state.format = effective_format(wanted, n);
        const DType type = state.format == MomentFormat::fp32 ? DType::f32 : state.format == MomentFormat::int8 ? DType::u8 : DType::bf16;
        state.m = tensors.zeros(type, 1, n), state.v = tensors.zeros(type, 1, n);
        if (state.format == MomentFormat::int8)
            state.m_absmax = tensors.zeros(DType::f32, 1, ceil_div(n, kAdamBlock)), state.v_absmax = tensors.zeros(DType::f32, 1, ceil_div(n, kAdamBlock));
    }
    double bytes() const { return 2.0 * double(p.bytes() + state.m.bytes() + state.v.bytes() + state.m_absmax.bytes() + state.v_absmax.bytes()) + double(g.bytes()); }
    void update(Device& device) { adam_update(device, p, g, state, kStep, nullptr); }
};

struct Format {
    const char* name;
    DType p_type;
    MomentFormat moments;
};
const Format kFormats[] = {{"fp32, fp32 moments", DType::f32, MomentFormat::fp32},
                           {"bf16, fp32 moments", DType::bf16, MomentFormat::fp32},
                           {"bf16, bf16 moments", DType::bf16, MomentFormat::bf16_stochastic},
                           {"bf16, torch's bf16 moments", DType::bf16, MomentFormat::bf16_nearest},
                           {"bf16, 8-bit moments", DType::bf16, MomentFormat::int8}};

}  // namespace

int main() {
    return run_bench([](Bench& bench) {
        for (const Format& format : kFormats)
            bench.check(format.name, 5e-3, [&](Tensors& tensors) {
                Problem problem(tensors, format.p_type, format.moments, 100008);
                for (int i = 0; i < 3; ++i) problem.update(tensors.device());
                const AdamState& state = problem.state;  // three steps move p by little: what shows a wrong update are the moments
                if (state.format == MomentFormat::int8) return std::vector<Tensor>{problem.p, state.m_absmax, state.v_absmax};
                return std::vector<Tensor>{problem.p, state.m, state.v};
            });
        for (const Format& f : kFormats)
            for (int64_t n : {512 * 128, 2048 * 512, 32000 * 512, 32000 * 4096}) {
                Tensors tensors(bench.gpu());
                Problem problem(tensors, f.p_type, f.moments, n);
                bench.time(f.name, format("%lld", (long long)n).c_str(), problem.bytes(), [&] { problem.update(bench.gpu()); });
            }
        for (const ModelShape& model : kModels) {  // B of seven matrices per block (rank h/4), norms, embedding, head
            const int64_t layers[] = {8, 24, 24, 32}, h = model.hidden, f = model.intermediate, r = h / 4;
            Tensors tensors(bench.gpu());
            std::vector<Problem> problems;
            double bytes = 0;
            auto add = [&](DType type, int64_t n) { problems.emplace_back(tensors, type, MomentFormat::fp32, n), bytes += problems.back().bytes(); };
            for (int i = 0; i < 2; ++i) add(DType::bf16, 32000 * h);
            for (int64_t i = 0; i < layers[&model - kModels]; ++i) {
                for (int64_t width : {h, h, h, h, f, f, h}) add(DType::bf16, r * width);
                for (int k = 0; k < 2; ++k) add(DType::f32, h);
            }
            bench.time("all parameters", format("%s: %zu tensors", model.name, problems.size()).c_str(), bytes, [&] {
                for (Problem& problem : problems) problem.update(bench.gpu());
            });
        }
    });
}

// What a merge costs, on one GPU.
// 1. Per matrix: projection by gram and subspace (cold and warm, with the energy captured relative to gram's) and compensation, medians.
// 2. Blocks of a model: projection and re-initialisation of all their matrices with 0, 2 and 4 workers, and whether all agree to the last bit.
//   bench_merge [quick]      quick: without 350m and 7b
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "compensation.h"
#include "loqt.h"
#include "ops/elementwise.h"
#include "ops/matmul.h"
#include "ops/random.h"
#include "runtime/cuda_context.h"
#include "runtime/metrics.h"
#include "runtime/profile.h"
#include "runtime/workers.h"
#include "weight_source.h"

namespace {

struct Shape {
    const char* model;
    int64_t h, f, r;
    int rounds, layers;
};
constexpr Shape kShapes[] = {{"60m", 512, 1376, 128, 5, 8}, {"350m", 1024, 2736, 256, 5, 24}, {"1b", 2048, 5461, 512, 10, 24}, {"7b", 4096, 11008, 1024, 5, 32}};

class Buffers {
  public:
    explicit Buffers(Device& device) : device_(device) {}
    ~Buffers() {
        for (void* p : held_) device_.release(p);
    }
    Tensor make(DType dtype, int64_t rows, int64_t cols, int64_t ld = 0) {
        ld = ld ? ld : cols;
        held_.push_back(device_.allocate(rows * ld * size_of(dtype), "bench"));
        return Tensor{held_.back(), dtype, rows, cols, ld};
    }
    Nf4Tensor make_nf4(int64_t rows, int64_t cols) {
        Nf4Tensor q;
        q.rows = rows, q.cols = cols;
        q.codes = make(DType::u8, 1, ceil_div(rows * cols, 2)), q.codes8 = make(DType::u8, 1, q.blocks());
        q.scale2 = make(DType::f32, 1, ceil_div(q.blocks(), kNestedBlock)), q.offset = make(DType::f32, 1, 1);
        return q;
    }

  private:
    Device& device_;
    std::vector<void*> held_;
};

template <class F> double median_ms(Device& device, int runs, F&& work) {
    std::vector<double> times;
    for (int i = 0; i < runs + 1; ++i) {
        device.synchronize();
        double begin = wall_seconds();
        work();
        device.synchronize();
        if (i > 0) times.push_back((wall_seconds() - begin) * 1e3);
    }
    std::nth_element(times.begin(), times.begin() + runs / 2, times.end());
    return times[runs / 2];
}

// Singular values falling as i^-0.75, directions of the h side anything but axis-aligned.
void fill_gradient(Device& device, Tensor g, bool right, uint64_t seed) {
    Buffers buffers(device);
    int64_t h = right ? g.rows : g.cols, n = right ? g.cols : g.rows;
    Tensor a = buffers.make(DType::f32, n, h), b = buffers.make(DType::f32, h, h);
    fill_normal(device, a, 1.0f, seed, 1);
    fill_normal(device, b, 1e-4f, seed, 2);
    std::vector<float> rows(h * h);
    device.download(rows.data(), b.data, b.bytes());
    for (int64_t i = 0; i < h; ++i)
        for (int64_t j = 0; j < h; ++j) rows[i * h + j] *= std::pow(float(i + 1), -0.75f);
    device.upload(b.data, rows.data(), b.bytes());
    if (right) matmul(device, g, 1.0f, b, Op::transpose, a, Op::transpose);
    else matmul(device, g, 1.0f, a, Op::none, b, Op::none);
}

void per_matrix(Device& device, const Shape& s, int64_t out, int64_t in) {
    Buffers buffers(device);
    const bool right = out < in;
    const int64_t n = right ? in : out, ld = round_up(in, 8);
    const int runs = s.h >= 4096 ? 3 : 7;
    Tensor g = buffers.make(DType::f32, out, in, ld), noise = buffers.make(DType::f32, out, in, ld), p = buffers.make(DType::f32, s.r, s.h),
           old = buffers.make(DType::f32, s.r, s.h), exact = buffers.make(DType::f32, s.r, s.h), b = buffers.make(DType::bf16, n, s.r);
    Nf4Tensor p_q = buffers.make_nf4(s.r, s.h), q = buffers.make_nf4(out, in);
    fill_gradient(device, g, right, 1);
    fill_gradient(device, noise, right, 2);
    // The gradient one merge earlier shares half of its energy.
    axpby(device, noise, 1.0f, g, 1.0f);
    ProjectionResult result;
    auto project = [&](Tensor to, Tensor from, ProjectionMethod method, Tensor previous) {
        result = leading_singular_vectors(device, to, from, right, method, previous, 1, 7);
        if (!result.ok) std::printf("FAILED ");
    };
    project(old, noise, ProjectionMethod::gram, Tensor{});
    nf4_quantize(device, p_q, old, nullptr);
    nf4_dequantize(device, old, p_q);
    const double gram = median_ms(device, runs, [&] { project(exact, g, ProjectionMethod::gram, Tensor{}); });
    const double best = result.captured_energy;
    const double cold = median_ms(device, runs, [&] { project(p, g, ProjectionMethod::subspace, Tensor{}); }), cold_energy = result.captured_energy / best;
    const double warm = median_ms(device, runs, [&] { project(p, g, ProjectionMethod::subspace, old); }), warm_energy = result.captured_energy / best;
    fill_normal(device, g, 0.02f, 3, 3);
    CompensationResult c{};
    const double compensation = median_ms(device, runs, [&] { c = quantize_with_compensation(device, q, b, g, old, right, 0.5f, s.rounds); });
    std::printf("%-5s %5lld x %5lld r %4lld  %8.2f  %8.2f %.6f  %8.2f %.6f  %8.2f  %.4f -> %.4f (round %d)\n", s.model, (long long)out, (long long)in,
                (long long)s.r, gram, cold, cold_energy, warm, warm_energy, compensation, c.quant_error, c.error, c.best_round);
    std::fflush(stdout);
}

// The four groups of `blocks` transformer blocks.
struct Blocks {
    Config config;
    TensorTable table;
    std::vector<std::unique_ptr<LinearGroup>> groups;
    WeightSource source;

    Blocks(Device& device, const Shape& s, int blocks, const char* projection) {
        config.method.rank = s.r, config.method.compensation_rounds = s.rounds, config.method.projection = projection;
        config.train.micro_batch = config.train.batch = 1;
        config.optimizer.clip = 1;  // merges apart from the backward pass
        for (int i = 0; i < blocks; ++i) {
            std::string name = std::to_string(i);
            add(s.h, {{name + "q", s.h}, {name + "k", s.h}, {name + "v", s.h}});
            add(s.h, {{name + "o", s.h}});
            add(s.h, {{name + "gate", s.f}, {name + "up", s.f}});
            add(s.f, {{name + "down", s.h}});
        }
        for (auto& group : groups) group->register_tensors(Registration{table, device, config, true});
        table.allocate(device);
        source = random_weights(config);
        for (auto& group : groups) group->initialize(device, source);
    }
    void add(int64_t in, const std::vector<LinearGroup::Spec>& specs) {
        groups.push_back(std::make_unique<LinearGroup>());
        groups.back()->configure(config, in, specs);
    }
};

void reinitialize(Device& device, Blocks& model, int64_t step, const WeightSource* source, MergeStatistics& statistics) {
    for (auto& group : model.groups) group->start_reinitialization(device, step, source);
    if (device.workers()) device.workers()->finish();
    for (auto& group : model.groups) group->finish_reinitialization(statistics);
}

// False if the number of workers changes a bit.
bool whole_blocks(Device& device, const Shape& s, const char* projection, int blocks) {
    bool same = true;
    constexpr int64_t kTokens = 8192;
    Buffers buffers(device);
    Tensor x = buffers.make(DType::bf16, kTokens, padded_width(s.f)), dy = buffers.make(DType::bf16, kTokens, 3 * padded_width(s.f)),
           dx = buffers.make(DType::bf16, kTokens, padded_width(s.f));
    {
        Tensor wide = buffers.make(DType::f32, kTokens, 3 * padded_width(s.f));
        fill_normal(device, wide, 1.0f, 1, 1);
        convert(device, x, wide.col_slice(0, x.cols));
        fill_normal(device, wide, 1e-4f, 1, 2);
        convert(device, dy, wide);
    }
    std::vector<char> reference;
    for (int count : {0, 2, 4}) {
        Blocks model(device, s, blocks, projection);
        std::unique_ptr<Workers> workers;
        if (count) workers = std::make_unique<Workers>(device, count, int64_t(1) << 30);
        double projection_ms[2], reinitialize_ms[2], backward_ms = 0, quant_error = 0, energy = 0;
        for (int merge = 0; merge < 2; ++merge) {
            BackwardPass pass;
            auto backward = [&] {
                device.synchronize();
                double begin = wall_seconds();
                for (auto& group : model.groups) {
                    // Column slices of the same random numbers: nothing is padded with zeros, which no result depends on.
                    Tensor gx = x.col_slice(0, group->in_padded()), gy = dy.col_slice(0, group->out_padded()), gdx = dx.col_slice(0, group->in_padded());
                    group->input_gradient(device, gdx, gy);
                    group->parameter_gradients(device, gy, gx, pass);
                }
                if (workers) workers->finish();
                device.synchronize();
                return (wall_seconds() - begin) * 1e3;
            };
            backward();
            backward_ms = backward();
            pass.merges = true, pass.step = merge;
            projection_ms[merge] = backward() - backward_ms;
            MergeStatistics statistics;
            double begin = wall_seconds();
            reinitialize(device, model, merge, merge ? nullptr : &model.source, statistics);
            device.synchronize();
            reinitialize_ms[merge] = (wall_seconds() - begin) * 1e3;
            quant_error = statistics.quant_error / statistics.matrices, energy = statistics.captured_energy / statistics.matrices;
        }
        std::vector<char> state;
        for (auto& group : model.groups)
            for (Linear& l : group->linears())
                for (Tensor t : {l.p_q.codes, l.w_q.codes, l.b.value}) {
                    size_t begin = state.size();
                    state.resize(begin + size_t(t.bytes()));
                    device.download(state.data() + begin, t.data, t.bytes());
                }
        if (reference.empty()) reference = state;
        const double all = double(s.layers) / blocks;
        std::printf("%-5s %-8s %d workers: first merge %7.1f + %6.1f ms, second %7.1f + %6.1f ms = %7.1f ms for all %d layers; scratch %.0f MiB a worker; error %.4f, energy %.4f; %s\n",
                    s.model, projection, count, projection_ms[0] * all, reinitialize_ms[0] * all, projection_ms[1] * all, reinitialize_ms[1] * all,
                    (projection_ms[1] + reinitialize_ms[1]) * all, s.layers, workers ? double(workers->scratch_high_water()) / 1048576.0 : 0.0, quant_error, energy,
                    state == reference ? "same bits" : "OTHER BITS");
        same = same && state == reference;
        std::fflush(stdout);
        if (count == 0) {
            BackwardPass pass;
            pass.merges = true, pass.step = 2;
            Profiler profiler(device);
            for (auto& group : model.groups) group->parameter_gradients(device, dy.col_slice(0, group->out_padded()), x.col_slice(0, group->in_padded()), pass);
            MergeStatistics statistics;
            reinitialize(device, model, 2, nullptr, statistics);
            for (const OperationProfile& line : profiler.take())
                std::printf("      %-28s %6lld calls %9.2f ms %7.1f TFLOP/s %7.0f GB/s\n", line.name.c_str(), (long long)line.calls, line.seconds * 1e3 * all,
                            line.flops / line.seconds * 1e-12, line.bytes / line.seconds * 1e-9);
        }
        for (auto& entry : model.table.entries()) device.release(entry.holder->data);
    }
    return same;
}

}  // namespace

int main(int argc, char**) {
    try {
        auto device = Device::open("cuda");
        device->reserve_scratch(int64_t(4) << 30);
        std::printf("%s\nms per matrix                   gram      cold  energy    warm  energy  compensation  error\n", device->name().c_str());
        for (const Shape& s : kShapes) {
            if (argc > 1 && s.h != 512 && s.h != 2048) continue;
            per_matrix(*device, s, s.h, s.h);
            per_matrix(*device, s, s.f, s.h);
            per_matrix(*device, s, s.h, s.f);
        }
        std::printf("\n");
        bool same = true;
        for (const Shape& s : kShapes) {
            if (s.h != 2048 && s.h != 512) continue;
            same = whole_blocks(*device, s, "subspace", 4) && same;
            same = whole_blocks(*device, s, "gram", 2) && same;
        }
        return same ? 0 : 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}

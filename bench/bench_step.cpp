// Times the training step of a configuration on random tokens: model, optimizer and merges are the trainer's own code, without data,
// files and reports around it. Prints one JSON object (bench/README.md describes it); bench/run.py makes tables of several.
//   build/bench_step --config 60m [--steps 30] [--seconds 10] [--merges 3] [--profile 3] [--SECTION.KEY VALUE ...]
// steps, seconds: what ends the timed steps, whichever comes first (but not before the fifth). merges: timed merges in each projection mode;
// 0 = none. profile: steps run under the profiler; 0 = none. Everything else is a key of the configuration, as train_loqt takes it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <random>

#include "flops.h"
#include "plan.h"
#include "runtime/metrics.h"
#include "runtime/profile.h"
#include "runtime/workers.h"
#include "training_step.h"
#include "weight_source.h"

using json = nlohmann::ordered_json;

namespace {

constexpr int64_t kLeastSteps = 5, kWarmUp = 2;

struct Options {
    std::string config = "tiny";
    int64_t steps = 30, merges = 2, profile = 3;
    double seconds = 10;
    std::vector<Override> overrides;
};

Options parse(int argc, char** argv) {
    Options o;
    for (int i = 1; i < argc; ++i) {
        std::string key = argv[i], value;
        if (key.rfind("--", 0) != 0) throw UserError("unexpected argument \"" + key + "\"");
        size_t equals = key.find('=');
        if (equals != std::string::npos) value = key.substr(equals + 1);
        else if (++i < argc) value = argv[i];
        else throw UserError(key + " needs a value");
        key = key.substr(2, equals == std::string::npos ? equals : equals - 2);
        auto number = [&] {
            char* end = nullptr;
            double x = std::strtod(value.c_str(), &end);
            if (value.empty() || *end || !(x >= 0)) throw UserError("--" + key + " " + value + ": expected a number");
            return x;
        };
        std::replace(key.begin(), key.end(), '-', '_');
        if (key == "config") o.config = value;
        else if (key == "steps") o.steps = std::max<int64_t>(1, int64_t(number()));
        else if (key == "merges") o.merges = int64_t(number());
        else if (key == "profile") o.profile = int64_t(number());
        else if (key == "seconds") o.seconds = number();
        else o.overrides.push_back({resolve_key(key), value});
    }
    return o;
}

double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x.empty() ? NAN : 0.5 * (x[x.size() / 2] + x[(x.size() - 1) / 2]);
}

// Bytes read and written per second by a copy within the device's memory.
double copy_bytes_per_second(Device& device) {
    const int64_t bytes = device.is_cuda() ? int64_t(1) << 30 : int64_t(1) << 26;
    void *from = device.allocate(bytes, "copy"), *to = device.allocate(bytes, "copy");
    device.zero(from, bytes);
    double best = INFINITY;
    for (int i = 0; i < 5; ++i) {
        constexpr int kCopies = 5;
        device.synchronize();
        double begin = wall_seconds();
        for (int k = 0; k < kCopies; ++k) device.copy(to, from, bytes);
        device.synchronize();
        if (i > 0) best = std::min(best, (wall_seconds() - begin) / kCopies);
    }
    device.release(from), device.release(to);
    return 2.0 * double(bytes) / best;
}

std::vector<Batch> random_batches(const Config& config) {
    std::mt19937_64 rng(1);
    std::uniform_int_distribution<int32_t> token(0, int32_t(config.model.vocab) - 1);
    std::vector<Batch> batches(config.micro_batches());
    for (Batch& b : batches) {
        b.rows = config.train.micro_batch, b.seq = config.train.seq_len;
        int64_t count = b.rows * b.seq;
        std::vector<int32_t> text(count + 1);
        for (int32_t& t : text) t = token(rng);
        b.tokens.assign(text.begin(), text.end() - 1), b.targets.assign(text.begin() + 1, text.end());
        b.valid_targets = count;
        b.groups = group_tokens(b.tokens.data(), count, config.model.vocab);
    }
    return batches;
}

class Run {
  public:
    Run(const Config& config, Device& device, const MemoryPlan& plan)
        : config_(config), device_(device), model_(config_, device, true), sums_(device, model_, config_), batches_(random_batches(config_)) {
        model_.allocate();
        device_.reserve_scratch(plan.scratch);
        if (plan.workers) workers_ = std::make_unique<Workers>(device_, plan.workers, plan.worker_scratch);
        model_.initialize(random_weights(config_));
        // The first merge brings loqt into the state it trains in: every matrix has P and B. It also warms up the merge.
        if (makes_anew(config_)) step(true);
        for (int64_t i = 0; i < kWarmUp; ++i) step(false);
    }

    // One optimizer step, by the clock of the trainer's step_ms. The loss goes to loss().
    double step(bool merges) {
        double begin = wall_seconds();
        StepPlan plan;
        plan.step = step_, plan.lr = learning_rate(config_, step_), plan.merges = merges;
        StepGradients gradients = accumulate_gradients(device_, model_, config_, sums_, batches_, plan);
        if (!std::isfinite(gradients.loss) || !std::isfinite(gradients.norm)) throw UserError("the loss is not finite; what was timed is not training");
        apply_gradients(device_, model_, config_, plan, gradients.norm);
        if (merges) model_.merge(step_, nullptr);
        device_.synchronize();
        loss_ = gradients.loss;
        ++step_;
        return wall_seconds() - begin;
    }
    double loss() const { return loss_; }

    std::vector<double> timed_steps(int64_t steps, double seconds) {
        std::vector<double> times;
        double begin = wall_seconds();
        while (int64_t(times.size()) < steps && (int64_t(times.size()) < kLeastSteps || wall_seconds() - begin < seconds)) times.push_back(step(false));
        return times;
    }

    // What a merge adds to a step of `plain` seconds.
    json timed_merges(int64_t count, double plain) {
        std::vector<double> extra;
        for (int64_t i = 0; i < count; ++i) extra.push_back(step(true) - plain);
        return {{"seconds", median(extra)}, {"all", extra}};
    }

    // Where the time of a step goes, mean over `steps` of them.
    json profile(int64_t steps) {
        Profiler profiler(device_);
        double wall = 0, n = double(steps);
        for (int64_t i = 0; i < steps; ++i) wall += step(false);
        json operations = json::array();
        for (const OperationProfile& p : profiler.take())
            operations.push_back({{"label", p.label}, {"name", p.name}, {"calls", double(p.calls) / n}, {"seconds", p.seconds / n}, {"flops", p.flops / n}, {"bytes", p.bytes / n}});
        return {{"step_seconds", wall / n}, {"operations", operations}};
    }

  private:
    Config config_;
    Device& device_;
    Llama model_;
    std::unique_ptr<Workers> workers_;  // after the model, which their jobs use
    StepSums sums_;
    std::vector<Batch> batches_;
    int64_t step_ = 0;
    double loss_ = 0;
};

json measure(const Options& options, Config config) {
    auto device = Device::open(config.run.device);
    double product_flops = measure_product_flops(*device, device->is_cuda() ? 8192 : 512), copy_rate = copy_bytes_per_second(*device);
    PeakFlops peak = peak_flops(*device);
    MemoryPlan plan = choose_plan(config, device->kind(), memory_budget(config, device.get()));
    json result;
    double plain = 0;
    {
        Run run(config, *device, plan);
        std::vector<double> times = run.timed_steps(options.steps, options.seconds);
        plain = median(times);
        double rate = double(config.train.batch * config.train.seq_len) / plain;
        result = {{"device", device->name()}, {"gpu", device->is_cuda()}, {"method", config.method.name}, {"parameters", parameter_count(config)},
                  {"rank", config.method.name == "full" ? 0 : config.method.rank}, {"batch", config.train.batch}, {"seq_len", config.train.seq_len},
                  {"micro_batch", config.train.micro_batch}, {"effective_weights", config.train.effective_weights},
                  {"planned_bytes", plan.total}, {"peak_bytes", device->process_peak_bytes()}, {"loss", run.loss()},
                  {"product_flops", product_flops}, {"copy_bytes_per_s", copy_rate}, {"peak_flops", peak.flops}, {"peak_source", peak.source},
                  {"step_seconds", plain}, {"tokens_per_s", rate}, {"mfu", peak.flops > 0 ? json(training_flops_per_token(config) * rate / peak.flops) : json()},
                  {"full_rank_equivalent_tflops", full_rank_flops_per_token(config) * rate * 1e-12}, {"steps", times}};
        if (options.profile > 0) result["profile"] = run.profile(options.profile);
        if (options.merges > 0 && method_policy(config).projects) result["merges"][config.method.projection] = run.timed_merges(options.merges, plain);
    }
    if (options.merges > 0 && method_policy(config).projects) {  // the other way to project, on a model of its own
        config.method.projection = config.method.projection == "gram" ? "subspace" : "gram";
        device = nullptr;  // gives its memory back
        device = Device::open(config.run.device);
        MemoryPlan other = plan_memory(config, device->kind(), plan.workers);
        result["merges"][config.method.projection] = Run(config, *device, other).timed_merges(options.merges, plain);
    }
    return result;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        Options options = parse(argc, argv);
        Config config;
        // The presets lie beside the program, one folder above this one.
        std::error_code ignored;
        std::filesystem::path folder = std::filesystem::read_symlink("/proc/self/exe", ignored).parent_path().parent_path();
        read_config_file(config, find_config_file(options.config, (folder / "train_loqt").string()));
        for (const Override& o : options.overrides) apply_override(config, o);
        validate_config(config);
        std::printf("%s\n", measure(options, config).dump().c_str());
        return 0;
    } catch (const UserError& error) {
        std::fprintf(stderr, "bench_step: %s\n", error.what());
        return 2;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "bench_step: internal error: %s\n", error.what());
        return 1;
    }
}

// Shared by the benchmarks of the memory-bound operations. Each compares the GPU form with the CPU form on small shapes, then prints the
// median time of 20 runs at the shapes of real models, in ms and in GB/s (bytes that must move at least, read and written), next to two
// yardsticks: the bandwidth of a device-to-device copy of 1 GiB, and that of a copy which moves as many bytes as the operation. "L2"
// marks a working set that fits the GPU's L2 cache.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <random>
#include <vector>

#include "bench/kernels/timing.h"

struct ModelShape {
    const char* name;
    int64_t hidden, intermediate, heads, head_dim;
};
constexpr ModelShape kModels[] = {{"60M", 512, 1376, 8, 64}, {"350M", 1024, 2736, 16, 64}, {"1B", 2048, 5504, 32, 64}, {"7B", 4096, 11008, 32, 128}};
constexpr int64_t kTokens[] = {16384, 131072};

// Tensors of one device with normally distributed bf16-representable values, the same on every device; freed together.
class Tensors {
  public:
    explicit Tensors(Device& device) : device_(device) {}
    ~Tensors() {
        for (void* p : held_) device_.release(p);
    }
    Tensors(const Tensors&) = delete;

    Tensor empty(DType dtype, int64_t rows, int64_t cols) {
        Tensor t{device_.allocate(rows * cols * size_of(dtype), "bench"), dtype, rows, cols, cols};
        held_.push_back(t.data);
        return t;
    }
    Tensor zeros(DType dtype, int64_t rows, int64_t cols) {
        Tensor t = empty(dtype, rows, cols);
        device_.zero(t);
        return t;
    }
    Tensor random(DType dtype, int64_t rows, int64_t cols, float sigma = 1.0f) {
        Tensor t = empty(dtype, rows, cols);
        std::mt19937_64 rng(held_.size());
        std::normal_distribution<float> normal(0.0f, sigma);
        std::vector<char> piece(std::min(t.numel(), int64_t(1) << 16) * size_of(dtype));
        for (int64_t i = 0; i < int64_t(piece.size()); i += size_of(dtype)) {
            const bf16 x = to_bf16(normal(rng));
            if (dtype == DType::bf16) reinterpret_cast<bf16&>(piece[i]) = x;
            else reinterpret_cast<float&>(piece[i]) = to_float(x);
        }
        device_.upload(t.data, piece.data(), int64_t(piece.size()));
        for (int64_t done = int64_t(piece.size()); done < t.bytes(); done *= 2)  // repeats; no kernel can tell
            device_.copy(static_cast<char*>(t.data) + done, t.data, std::min(done, t.bytes() - done));
        return t;
    }
    Tensor activation(int64_t rows, int64_t cols, float sigma = 1.0f) { return random(device_.activation_dtype(), rows, cols, sigma); }
    // Numbers in [begin, end), uniform.
    const int32_t* integers(int64_t count, int32_t begin, int32_t end) {
        std::mt19937_64 rng(held_.size());
        std::vector<int32_t> host(count);
        for (int32_t& x : host) x = std::uniform_int_distribution<int32_t>(begin, end - 1)(rng);
        return upload(host);
    }
    const int32_t* upload(const std::vector<int32_t>& host) {
        Tensor t = empty(DType::i32, 1, int64_t(host.size()));
        device_.upload(t.data, host.data(), t.bytes());
        return t.as<int32_t>();
    }
    Device& device() const { return device_; }

  private:
    Device& device_;
    std::vector<void*> held_;
};

class Bench {
  public:
    Bench() : gpu_(Device::open("cuda")), cpu_(Device::open("cpu")), buffers_(*gpu_) {
        gpu_->reserve_scratch(int64_t(2) << 30);
        cpu_->reserve_scratch(int64_t(64) << 20);
        from_ = buffers_.random(DType::bf16, 1, kCopyBytes / 2), to_ = buffers_.empty(DType::bf16, 1, kCopyBytes / 2);
        std::printf("%s, copies at %.0f GB/s (read + write)\n", gpu_->name().c_str(), copy_bandwidth(2 * kCopyBytes) * 1e-9);
    }

    Device& gpu() { return *gpu_; }

    // run makes its inputs from `tensors`, calls the operation on tensors.device() and returns the outputs.
    void check(const char* what, double limit, const std::function<std::vector<Tensor>(Tensors&)>& run) {
        Tensors on_gpu(*gpu_), on_cpu(*cpu_);
        const std::vector<Tensor> a = run(on_gpu), b = run(on_cpu);
        for (size_t i = 0; i < a.size(); ++i) {
            const std::vector<float> x = read(*gpu_, a[i]), y = read(*cpu_, b[i]);
            double difference = 0, norm = 0;
            for (size_t k = 0; k < x.size(); ++k) difference += std::pow(double(x[k]) - y[k], 2), norm += std::pow(double(y[k]), 2);
            const double error = std::sqrt(difference / norm);
            if (!(error < limit)) throw InternalError(format("%s: output %zu differs from the CPU form, relative error %.2e", what, i, error));
        }
        std::printf("check %s: ok\n", what);
    }

    // One line of the table. bytes: what one call moves at least; it is also the working set.
    template <class F> void time(const char* what, const char* shape, double bytes, F work) {
        const double s = seconds(work, calls_for(bytes)), rate = bytes / s;
        std::printf("%-28s %-28s %9.4f ms  %6.0f GB/s  %5.1f %% of copy  %5.1f %% of an equal copy%s\n", what, shape, s * 1e3, rate * 1e-9,
                    100 * rate / copy_bandwidth(2 * kCopyBytes), 100 * rate / copy_bandwidth(bytes),
                    bytes < double(gpu_->cuda().properties.l2CacheSize) ? "  L2" : "");
    }

    // Median seconds per call.
    template <class F> double seconds(F work, int calls) {
        const double ms = median_ms(*gpu_, [&] {
            for (int k = 0; k < calls; ++k) work();
        });
        return ms * 1e-3 / calls;
    }

  private:
    static constexpr int64_t kCopyBytes = int64_t(1) << 30;

    static int calls_for(double bytes) { return int(std::clamp(2e8 / bytes, 1.0, 50.0)); }  // short ones back to back, as in training

    // Bytes per second, read and written, of a copy that moves `bytes` in all.
    double copy_bandwidth(double bytes) {
        const int64_t copied = std::clamp<int64_t>(int64_t(bytes / 2), 16, kCopyBytes);
        double& rate = copy_rates_[copied];
        if (rate == 0) rate = 2.0 * double(copied) / seconds([&] { gpu_->copy(to_.data, from_.data, copied); }, calls_for(2.0 * double(copied)));
        return rate;
    }

    static std::vector<float> read(Device& device, const Tensor& t) {
        std::vector<char> raw(t.bytes());
        device.download(raw.data(), t.data, t.bytes());
        std::vector<float> out(t.numel());
        for (int64_t i = 0; i < t.numel(); ++i)
            out[i] = t.dtype == DType::bf16 ? to_float(reinterpret_cast<const bf16*>(raw.data())[i]) : reinterpret_cast<const float*>(raw.data())[i];
        return out;
    }

    std::unique_ptr<Device> gpu_, cpu_;
    Tensors buffers_;
    Tensor from_, to_;
    std::map<int64_t, double> copy_rates_;
};

inline std::string shape_name(const ModelShape& model, int64_t tokens, int64_t cols) {
    return format("%s: %lld × %lld", model.name, (long long)tokens, (long long)cols);
}

// main of a benchmark: errors go to stderr.
template <class F> int run_bench(F body) {
    try {
        Bench bench;
        body(bench);
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}

// NF4 on one GPU: agreement with the CPU form, then ms and GB/s (bytes of both forms, each moved once), the median of 20 runs of 16
// operations in a row: they follow one another as in a training step, so what the first one's launch on an idle stream takes (5 µs) is
// no part of the figure. Many matrices take turns, so that what is measured is memory and not the L2 cache.
//   make build/bench_nf4 && build/bench_nf4
#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

#include "bench/kernels/timing.h"
#include "nf4.h"
#include "runtime/cuda_context.h"

namespace {

constexpr int kInRow = 16;

struct Matrix {
    Device& device;
    Tensor w;
    Nf4Tensor q;

    Matrix(Device& d, DType dtype, int64_t rows, int64_t cols, int64_t ld) : device(d) {
        auto make = [&](DType t, int64_t r, int64_t c, int64_t l) { return Tensor{device.allocate(r * l * size_of(t), "bench"), t, r, c, l}; };
        w = make(dtype, rows, cols, ld);
        q.rows = rows, q.cols = cols;
        q.codes = make(DType::u8, 1, ceil_div(rows * cols, 2), ceil_div(rows * cols, 2));
        q.codes8 = make(DType::u8, 1, q.blocks(), q.blocks());
        q.scale2 = make(DType::f32, 1, ceil_div(q.blocks(), kNestedBlock), ceil_div(q.blocks(), kNestedBlock));
        q.offset = make(DType::f32, 1, 1, 1);
    }
    ~Matrix() {
        for (Tensor t : {w, q.codes, q.codes8, q.scale2, q.offset}) device.release(t.data);
    }
    Matrix(const Matrix&) = delete;
    void fill() {
        std::mt19937_64 rng(1);
        std::vector<uint16_t> pool(1 << 16);
        std::normal_distribution<float> normal(0.0f, 0.02f);
        for (uint16_t& x : pool) x = to_bf16(normal(rng)).bits;
        std::vector<char> host(w.bytes());
        for (int64_t i = 0; i < w.rows * w.ld; ++i) {
            bf16 value{pool[(i * 7 + i / 65521) & 0xffff]};
            if (w.dtype == DType::bf16) reinterpret_cast<bf16*>(host.data())[i] = value;
            else reinterpret_cast<float*>(host.data())[i] = to_float(value);
        }
        device.upload(w.data, host.data(), w.bytes());
    }
    std::vector<char> bytes(const Tensor& t) const {
        std::vector<char> out(t.bytes());
        device.download(out.data(), t.data, t.bytes());
        return out;
    }
};

bool agrees(Device& gpu, Device& cpu, DType dtype, int64_t rows, int64_t cols, int64_t ld) {
    Matrix a(gpu, dtype, rows, cols, ld), b(cpu, dtype, rows, cols, ld);
    for (Matrix* m : {&a, &b}) {
        m->fill();
        nf4_quantize(m->device, m->q, m->w, nullptr);
        nf4_dequantize(m->device, m->w, m->q);
    }
    const bool codes = a.bytes(a.q.codes) == b.bytes(b.q.codes), values = a.bytes(a.w) == b.bytes(b.w), offset = a.bytes(a.q.offset) == b.bytes(b.q.offset);
    // The mean of absmax may differ by one unit in the last place, and then so may the values.
    const bool good = codes && (values || !offset);
    std::printf("check  %5lld x %5lld ld %5lld %s  codes %s, values %s\n", (long long)rows, (long long)cols, (long long)ld, safetensors_name(dtype),
                codes ? "equal" : "DIFFER", values ? "equal" : "differ");
    return good;
}

}  // namespace

int main() {
    try {
        auto gpu = Device::open("cuda"), cpu = Device::open("cpu");
        gpu->reserve_scratch(int64_t(64) << 20);
        cpu->reserve_scratch(int64_t(64) << 20);
        bool good = true;
        for (DType dtype : {DType::bf16, DType::f32})
            for (auto [rows, cols, ld] : {std::array<int64_t, 3>{512, 1376, 1376}, {301, 5461, 5504}, {97, 5461, 5461}}) good &= agrees(*gpu, *cpu, dtype, rows, cols, ld);
        if (!good) return 1;

        std::printf("\n%s: ms and GB/s\n                               quantize            dequantize          residual\n", gpu->name().c_str());
        for (auto [rows, cols, ld] : {std::array<int64_t, 3>{512, 1376, 1376}, {2048, 2048, 2048}, {5461, 2048, 2048}, {2048, 5461, 5504}, {4096, 11008, 11008}, {11008, 4096, 4096}})
            for (DType dtype : {DType::bf16, DType::f32}) {
                const double elements = double(rows) * double(cols), bytes = elements * (double(size_of(dtype)) + 0.515869);
                std::vector<std::unique_ptr<Matrix>> matrices;
                for (int i = 0; i < std::max(2, int(4e8 / bytes)) && i < 256; ++i) {
                    matrices.push_back(std::make_unique<Matrix>(*gpu, dtype, rows, cols, ld));
                    matrices.back()->fill();
                }
                size_t next = 0;
                auto in_turn = [&](auto operation) {
                    return median_ms(*gpu, [&] { for (int i = 0; i < kInRow; ++i) operation(*matrices[next++ % matrices.size()]); }) / kInRow;
                };
                const double quantize = in_turn([&](Matrix& m) { nf4_quantize(*gpu, m.q, m.w, nullptr); });
                std::printf("%5lld x %5lld ld %5lld %s  %8.4f  %6.0f", (long long)rows, (long long)cols, (long long)ld, safetensors_name(dtype), quantize, bytes / quantize * 1e-6);
                if (dtype == DType::f32) {
                    Tensor sums{gpu->allocate(8, "sum"), DType::f64, 1, 1, 1}, residual{gpu->allocate(rows * ld * 2, "residual"), DType::bf16, rows, cols, ld};
                    const double ms = in_turn([&](Matrix& m) { nf4_residual(*gpu, residual, m.w, m.q, sums.as<double>(), 0); });
                    const double dequantize = in_turn([&](Matrix& m) { nf4_dequantize(*gpu, m.w, m.q); });
                    std::printf("    %8.4f  %6.0f    %8.4f  %6.0f\n", dequantize, bytes / dequantize * 1e-6, ms, (bytes + 2 * elements) / ms * 1e-6);
                    gpu->release(sums.data), gpu->release(residual.data);
                } else {
                    const double dequantize = in_turn([&](Matrix& m) { nf4_dequantize(*gpu, m.w, m.q); });
                    std::printf("    %8.4f  %6.0f\n", dequantize, bytes / dequantize * 1e-6);
                }
            }
        // What a copy reaches: the yardstick.
        const int64_t bytes = int64_t(256) << 20;
        void *a = gpu->allocate(bytes, "copy"), *b = gpu->allocate(bytes, "copy");
        const double ms = median_ms(*gpu, [&] { gpu->copy(b, a, bytes); });
        std::printf("copy of %lld MiB: %.4f ms, %.0f GB/s read + write\n", (long long)(bytes >> 20), ms, 2 * double(bytes) / ms * 1e-6);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}

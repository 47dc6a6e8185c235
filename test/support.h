// Shared by the tests: fresh seeds that are printed on failure, random data, uploads, error metrics, devices to run on.
#pragma once
#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "runtime/device.h"
#include "test/catch.h"

// A fresh seed per run; LOQT_TEST_SEED=n repeats one. Use as: auto seed = fresh_seed(); INFO("seed " << seed);
inline uint64_t fresh_seed() {
    if (const char* s = std::getenv("LOQT_TEST_SEED")) return std::strtoull(s, nullptr, 10);
    return std::random_device{}();
}

inline std::vector<float> random_normal(std::mt19937_64& rng, int64_t n, float sigma = 1.0f) {
    std::normal_distribution<float> d(0.0f, sigma);
    std::vector<float> x(n);
    for (float& v : x) v = d(rng);
    return x;
}

inline std::vector<float> round_to_bf16(std::vector<float> x) {
    for (float& v : x) v = to_float(to_bf16(v));
    return x;
}

// ‖a − b‖_F / ‖b‖_F in fp64; NaN and Inf give NaN, which fails every comparison.
template <class A, class B> double relative_error(const std::vector<A>& a, const std::vector<B>& b) {
    if (a.size() != b.size()) return NAN;
    double difference = 0, norm = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        double d = double(a[i]) - double(b[i]);
        difference += d * d, norm += double(b[i]) * double(b[i]);
    }
    return std::sqrt(difference) / std::sqrt(norm);
}

// A tensor in device memory that frees itself. Filled with a NaN pattern (0xff) first, so unwritten outputs show.
class OnDevice {
  public:
    Tensor t;
    OnDevice(Device& device, DType dtype, int64_t rows, int64_t cols, int64_t ld = 0) : device_(device) {
        t = Tensor{nullptr, dtype, rows, cols, ld ? ld : cols};
        t.data = device.allocate(std::max<int64_t>(t.bytes(), 1), "test");
        std::vector<char> poison(t.bytes(), char(0xff));
        device.upload(t.data, poison.data(), t.bytes());
    }
    OnDevice(Device& device, DType dtype, int64_t rows, int64_t cols, const std::vector<float>& values, int64_t ld = 0)
        : OnDevice(device, dtype, rows, cols, ld) {
        write(values);
    }
    ~OnDevice() { device_.release(t.data); }
    OnDevice(const OnDevice&) = delete;
    operator Tensor() const { return t; }

    void write(const std::vector<float>& values) {  // rows × cols, converted to dtype (f32, bf16 RNE, i32)
        std::vector<char> host(t.bytes(), char(0xff));
        if (t.bytes()) device_.download(host.data(), t.data, t.bytes());
        for (int64_t r = 0; r < t.rows; ++r)
            for (int64_t c = 0; c < t.cols; ++c) {
                char* p = host.data() + (r * t.ld + c) * size_of(t.dtype);
                float x = values[r * t.cols + c];
                if (t.dtype == DType::f32) *reinterpret_cast<float*>(p) = x;
                else if (t.dtype == DType::bf16) *reinterpret_cast<bf16*>(p) = to_bf16(x);
                else *reinterpret_cast<int32_t*>(p) = int32_t(x);
            }
        device_.upload(t.data, host.data(), t.bytes());
    }
    std::vector<float> read() const {  // logical elements, as float
        std::vector<char> host(t.bytes());
        device_.download(host.data(), t.data, t.bytes());
        std::vector<float> out(t.numel());
        for (int64_t r = 0; r < t.rows; ++r)
            for (int64_t c = 0; c < t.cols; ++c) {
                const char* p = host.data() + (r * t.ld + c) * size_of(t.dtype);
                out[r * t.cols + c] = t.dtype == DType::f32 ? *reinterpret_cast<const float*>(p)
                                    : t.dtype == DType::bf16 ? to_float(*reinterpret_cast<const bf16*>(p))
                                                             : float(*reinterpret_cast<const int32_t*>(p));
            }
        return out;
    }
    template <class T> std::vector<T> raw() const {  // the bytes, padding included
        std::vector<T> out(t.bytes() / sizeof(T));
        device_.download(out.data(), t.data, t.bytes());
        return out;
    }
    template <class T> void raw_write(const std::vector<T>& v) { device_.upload(t.data, v.data(), v.size() * sizeof(T)); }

  private:
    Device& device_;
};

// A device with scratch for tests. GPU tests carry the tag [gpu] and are counted as skipped where there is none.
inline std::unique_ptr<Device> test_device(const std::string& which, int64_t scratch_bytes = int64_t(256) << 20) {
    auto device = Device::open(which);
    device->reserve_scratch(scratch_bytes);
    return device;
}

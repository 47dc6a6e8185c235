#include "gradient_reduction.h"

#include <algorithm>
#include <functional>

#include "comm/communicator.h"
#include "runtime/tensor_table.h"

namespace {

// Draws apart from those of the products that were summed before (parameter.cpp).
constexpr uint32_t kReducedPart = 0x80000000;

}  // namespace

std::vector<Tensor> joined(std::vector<Tensor> tensors) {
    std::sort(tensors.begin(), tensors.end(), [](const Tensor& a, const Tensor& b) { return a.dtype != b.dtype ? a.dtype < b.dtype : std::less<void*>()(a.data, b.data); });
    std::vector<Tensor> result;
    for (const Tensor& t : tensors) {
        if (!result.empty() && result.back().dtype == t.dtype) {
            Tensor& last = result.back();
            const int64_t padded = round_up(last.bytes(), kTensorAlignment);
            if (static_cast<char*>(last.data) + padded == t.data) {
                last.cols = last.ld = padded / size_of(t.dtype) + t.cols;
                continue;
            }
        }
        result.push_back(t);
    }
    return result;
}

void GradientReduction::add(Parameter& p) {
    Communicator* ranks = device_.communicator();
    if (!ranks && !(device_.dry() && config_.world_size > 1)) return;
    if (!p.active && !device_.dry()) return;  // nothing wrote a gradient, on any rank
    if (p.grad.dtype == DType::u8) {
        // Codes of different scales have no sum.
        ScratchScope scope(device_);
        Tensor g = load_gradient(device_, scope, p);
        if (ranks) {
            ranks->all_reduce({g.flat()});
            finish();
        }
        // The same draws on every rank: they round the same sum.
        const GradientPart sum{true, false, uint64_t(config_.train.seed), kReducedPart | uint32_t(step_)};
        add_to_gradient_sum(device_, {p.grad, p.grad_scales}, g, true, gradient_draws(p, sum));
        return;
    }
    if (!ranks) return;
    put(p.grad.flat());
}

void GradientReduction::add(double* values, int64_t count) {
    if (device_.communicator()) put(Tensor{values, DType::f64, 1, count, count});
}

void GradientReduction::put(const Tensor& t) {
    bucket_.push_back(t);
    bucket_bytes_ += bucket_.back().bytes();
    if (bucket_bytes_ >= device_.communicator()->bucket_bytes()) flush();
}

void GradientReduction::flush() {
    if (!bucket_.empty()) device_.communicator()->all_reduce(joined(std::move(bucket_)));
    bucket_.clear();
    bucket_bytes_ = 0;
}

void GradientReduction::finish() {
    if (!device_.communicator()) return;
    flush();
    device_.communicator()->finish();
}

#include "gradient_reduction.h"

#include "comm/communicator.h"

namespace {

// One operation of NCCL's per bucket. Large enough for the links' full rate, small enough that the first is under way long before the last gradient is there.
constexpr int64_t kBucketBytes = int64_t(32) << 20;

// Draws apart from those of the products that were summed before (parameter.cpp).
constexpr uint32_t kReducedPart = 0x80000000;

}  // namespace

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
    bucket_.push_back(p.grad.flat());
    bucket_bytes_ += bucket_.back().bytes();
    if (bucket_bytes_ >= kBucketBytes) flush();
}

void GradientReduction::flush() {
    if (!bucket_.empty()) device_.communicator()->all_reduce(bucket_);
    bucket_.clear();
    bucket_bytes_ = 0;
}

void GradientReduction::finish() {
    if (!device_.communicator()) return;
    flush();
    device_.communicator()->finish();
}

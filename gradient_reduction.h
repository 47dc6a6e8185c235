// Gradients of several ranks become one: summed in buckets (Communicator::bucket_bytes), while the backward pass goes on.
#pragma once
#include "llama.h"

class GradientReduction {
  public:
    // Does nothing without a communicator (device.communicator()); a dry device's scratch is counted where the configuration has several ranks.
    // step: of the optimizer.
    GradientReduction(Device& device, const Config& config, int64_t step) : device_(device), config_(config), step_(step) {}

    // p's gradient is final on this rank, and will be on the others at the same place of their backward pass. Its sum over the ranks takes its place:
    // begun once a bucket is full, there after finish().
    void add(Parameter& p);
    // The same for values in f64 on the device that are no gradient.
    void add(double* values, int64_t count);
    // What is queued on the device from now on finds the sums.
    void finish();

  private:
    void put(const Tensor& t);
    void flush();
    Device& device_;
    const Config& config_;
    int64_t step_;
    std::vector<Tensor> bucket_;
    int64_t bucket_bytes_ = 0;
};

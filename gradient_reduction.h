// Gradients of several ranks become one: summed in buckets (Communicator::bucket_bytes), which begin while the backward pass goes on or, if one holds them
// all, when it is done.
#pragma once
#include "llama.h"

// Tensors that lie in an arena of a TensorTable one right after the other become one, with the padding between them, which belongs to nobody: a few
// large sums take less time than many. In an order that is the same on all ranks, whose arenas are alike but lie anywhere: by type, then as in the arena.
// All of one type must be of one arena.
std::vector<Tensor> joined(std::vector<Tensor> tensors);

class GradientReduction {
  public:
    // Does nothing without a communicator (device.communicator()); a dry device's scratch is counted where the configuration has several ranks.
    // step: of the optimizer.
    GradientReduction(Device& device, const Config& config, int64_t step) : device_(device), config_(config), step_(step) {}

    // p's gradient is final on this rank, and will be on the others at the same place of their backward pass. Its sum over the ranks takes its place:
    // begun once a bucket is full, there after finish().
    void add(Parameter& p);
    // The same for values in f64 on the device that are no gradient; once between two calls of finish().
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

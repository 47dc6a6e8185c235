// Several ranks hold copies of one model and update them alike. This tells when they are no longer the same, to the bit.
#pragma once
#include <cstdint>

#include "llama.h"

class ReplicaCheck {
  public:
    // Memory for one checksum per saved tensor. Without a communicator there is nothing to compare (the plan's dry device).
    ReplicaCheck(Device& device, Llama& model);
    ~ReplicaCheck();
    ReplicaCheck(const ReplicaCheck&) = delete;

    // Compares every saved tensor and the parameters' counters with rank 0's. All ranks call it, and all throw InternalError, which names the first tensor
    // that differs and whose, if one does. Some ms for a billion parameters on a GPU. step: steps done, for the message.
    void verify(int64_t step);

  private:
    std::string first_difference(const std::vector<uint64_t>& mine, const std::vector<uint64_t>& theirs) const;
    Device& device_;
    Llama& model_;
    std::vector<const TensorEntry*> saved_;
    uint64_t* sums_;  // device [saved_]
    int64_t agreed_ = -1;
};

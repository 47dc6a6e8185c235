// Floating-point operations a training step needs, for the MFU figure and the plan.
#pragma once
#include <cstdint>
#include <string>

#include "runtime/config.h"

// Per trained token, forward and backward: products of the linear layers as the method computes them (W_eff formed as often
// as train.effective_weights says), causal attention, LM head. Recomputed element-wise work, merges and evaluation are not counted.
double training_flops_per_token(const Config& config);
// Parameters of the plain model.
int64_t parameter_count(const Config& config);
// Dense bf16 tensor-core peak in FLOP/s of a known GPU (data sheets, no sparsity), 0 if unknown.
double peak_flops(const std::string& device_name);

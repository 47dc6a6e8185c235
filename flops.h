// Floating-point operations a training step needs, and what a GPU can do, for the speed figures and the plan.
#pragma once
#include <cstdint>
#include <string>

#include "runtime/config.h"
#include "runtime/device.h"

// Per trained token, forward and backward: products of the linear layers as the method computes them (W_eff formed as often
// as train.effective_weights says), causal attention, LM head. What train.recompute does over again, element-wise work, merges and
// evaluation are not counted: this is what MFU credits. train.micro_batch must be resolved, here and below.
double training_flops_per_token(const Config& config);
// The same with what is made again in the backward pass (light: x·P of factored weights; block: the forward of all blocks).
double machine_flops_per_token(const Config& config);
// How long a token takes, for comparing plans of one configuration: the machine's FLOPs, plus 180 for every byte that element-wise operations and the making
// of weights move, plus 4e9 for every operation begun. Never rises with train.micro_batch.
double cost_per_token(const Config& config, DeviceKind kind);
// Parameters of the plain model.
int64_t parameter_count(const Config& config);
// 6·N per trained token, N = parameter_count: what full-rank training of the same model is commonly said to need.
double full_rank_flops_per_token(const Config& config);

// Dense bf16 tensor-core peak in FLOP/s of a known GPU with fp32 accumulation (data sheets, no sparsity), 0 if unknown.
double data_sheet_flops(const std::string& device_name);
// FLOP/s of a (size, size) product with inner dimension 2·size in the device's activation type, on random data: the best of five short
// series. Takes 10·size² elements of memory and about a tenth of a second on a GPU.
double measure_product_flops(Device& device, int64_t size);

struct PeakFlops {
    double flops = 0;     // FLOP/s; 0: none known (CPU)
    const char* source = "";  // "data sheet", or "measured" where no data sheet is known
};
// What MFU is a share of on this device.
PeakFlops peak_flops(Device& device);

// A trained parameter: value, gradient, Adam moments, all named and registered in one table.
#pragma once
#include <string>
#include <vector>

#include "adam.h"
#include "runtime/config.h"
#include "runtime/tensor_table.h"

struct Parameter {
    std::string name;
    int64_t rows = 0, cols = 0;  // logical
    Tensor value, grad;          // may be padded below and to the right with zeros
    AdamState moments;           // over the logical elements
    int64_t updates = 0;         // Adam's t
    uint32_t stream = 0;         // counter-based randomness: one number per parameter
    bool active = true;          // false: no update yet (B before its first projection)

    Tensor logical(Tensor t) const { return Tensor{t.data, t.dtype, rows, cols, t.ld}; }
};

// Where and how tensors are registered. Not training (export, sampling): weights only, no gradients and no moments.
struct Registration {
    TensorTable& table;
    const Device& device;
    const Config& config;
    bool training;
};

// Formats of the run, from the configuration.
MomentFormat moment_format(const Config& config);
ParamRounding param_rounding(const Config& config);
DType gradient_dtype(const Config& config, const Device& device);

// configured: as the configuration says.
// moments32: no 8-bit moments (embeddings and LM head: 8-bit states make pretraining unstable, Dettmers et al. 2022).
// all32: value, gradient and moments in fp32 (norm weights: at 1.0 they would not move in bf16).
enum class Precision { configured, moments32, all32 };
// Registers value (saved), gradient and moments (saved) of a parameter stored as padded_rows rows (0: unpadded).
void register_parameter(const Registration& reg, Parameter& p, const std::string& name, int64_t rows, int64_t cols, Precision precision,
                        int64_t padded_rows = 0);
// Only the moments, for a parameter whose value and gradient are parts of a fused matrix. p.name, rows and cols are set.
void register_moments(const Registration& reg, Parameter& p, Precision precision);

// Adam's hyper-parameters for one step of one parameter.
AdamStep adam_step(const Config& config, const Parameter& p, double lr, double grad_scale, int64_t step);

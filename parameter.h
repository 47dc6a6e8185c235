// A trained parameter: value, gradient, Adam moments, all named and registered in one table.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "adam.h"
#include "ops/gradient_sum.h"
#include "runtime/config.h"
#include "runtime/tensor_table.h"

struct Parameter {
    std::string name;
    int64_t rows = 0, cols = 0;  // logical
    Tensor value;                // may be padded below and to the right with zeros
    Tensor grad;                 // f32 or bf16, padded as value; u8 (1, rows·cols): a sum in 8 bits (ops/gradient_sum.h)
    Tensor grad_scales;          // f32, of a sum in 8 bits only
    AdamState moments;           // over the logical elements
    int64_t updates = 0;         // Adam's t
    uint32_t stream = 0;         // counter-based randomness: one number per parameter
    bool active = true;          // false: no update yet (B before its first projection)
    std::function<bool(Device&, const AdamStep&)> take_step;  // the optimizer's step where it is not AdamW on value and grad; false: none was taken
    bool reduced = false;        // several ranks: its gradient was given to the reduction
    bool stepped = false;        // the optimizer step now under way has been taken for it, inside the backward pass

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
// optimizer.embedding_moments with auto resolved: as moments, but fp32 for int8; and bf16 rounded to nearest if moments are.
std::string embedding_moments(const Config& config);
ParamRounding param_rounding(const Config& config);
DType gradient_dtype(const Config& config, const Device& device);
// Gradients are used up inside the backward pass (train.updates per_layer), so all but those of norms share one place.
bool updates_per_layer(const Config& config);

// adapter: as the configuration says, the gradient in 8 bits too.
// weight: the same, but the gradient in at least 16 bits (W of `full`).
// embedding: as weight, with optimizer.embedding_moments (8-bit states of embedding and LM head make pretraining unstable, Dettmers et al. 2022).
// exact: value, gradient and moments in fp32 (norm weights: at 1.0 they would not move in bf16).
enum class Precision { adapter, weight, embedding, exact };
// Registers value (saved), gradient and moments (saved) of a parameter stored as padded_rows rows (0: unpadded).
void register_parameter(const Registration& reg, Parameter& p, const std::string& name, int64_t rows, int64_t cols, Precision precision,
                        int64_t padded_rows = 0);
// Only the moments, for a parameter whose value and gradient are parts of a fused matrix. p.name, rows and cols are set.
void register_moments(const Registration& reg, Parameter& p, Precision precision);

// Which part of a step's gradient a product is: what is there already, and where random rounding draws from.
struct GradientPart {
    bool first = true;  // what the gradient held before is void
    bool only = true;   // nothing more will be added in this step
    uint64_t seed = 0;
    uint32_t number = 0;  // of the part among all of the run
};
// p.grad ← (p.grad unless part.first) + a product. product(into, row_begin, beta) runs it: into ← rows row_begin, row_begin + 1, … of the product
// (as many as `into` has; padding rows included) + beta·into. Into p.grad itself where that is fp32 or gets nothing else, else by way of fp32
// scratch memory and stochastic rounding, in slabs of rows.
void add_gradient(Device& device, const Parameter& p, const GradientPart& part, const std::function<void(Tensor into, int64_t row_begin, float beta)>& product);
// The draws that round parameter p's part of the gradient.
RoundingDraws gradient_draws(const Parameter& p, const GradientPart& part, uint64_t begin = 0);
// The logical gradient as f32 or bf16: where it lies, or unpacked to scratch memory.
Tensor load_gradient(Device& device, ScratchScope& scope, const Parameter& p);

// Adam's hyper-parameters for one step of one parameter.
AdamStep adam_step(const Config& config, const Parameter& p, double lr, double grad_scale, int64_t step);

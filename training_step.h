// One optimizer step over a model, without data, files or reports around it: what the trainer runs and what bench/ times.
#pragma once
#include "llama.h"
#include "optimizer_step.h"

// How the backward passes of step `step` are to treat a merge. config.train.micro_batch must be resolved.
ProjectionPass projection_pass(const Config& config, int64_t step, bool merges);

struct StepGradients {
    double loss = 0;  // mean over the counted targets of all micro-batches, nats
    double norm = 0;  // ‖gradient‖ over all parameters, before clipping
    double waited = 0;  // seconds that the backward pass and its end waited for projections on workers
};

// Forward and backward over the micro-batches of one step. Leaves the gradient of that mean loss in the parameters, and on a merge step the
// new projections in their layers. Synchronizes.
StepGradients accumulate_gradients(Device& device, Llama& model, StepSums& sums, const std::vector<Batch>& batches, ProjectionPass pass);

// AdamW with the gradients just accumulated, scaled down to optimizer.clip where their norm is larger.
void apply_gradients(Device& device, Llama& model, const Config& config, int64_t step, double lr, double gradient_norm);

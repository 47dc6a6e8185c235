// One optimizer step over a model, without data, files or reports around it: what the trainer runs and what bench/ times.
#pragma once
#include "llama.h"
#include "optimizer_step.h"

// What is to happen in a step.
struct StepPlan {
    int64_t step = 0;
    double lr = 0;                         // used where updates are taken inside the backward pass
    bool merges = false;                   // every matrix is merged and made anew
    const WeightSource* source = nullptr;  // see Llama::merge
    double targets = 0;                    // counted in the batches of all ranks; 0: in those of this one, which is alone
};

struct StepGradients {
    double loss = 0;  // mean over the counted targets of all micro-batches, nats
    double norm = 0;  // ‖gradient‖ over all parameters, before clipping
    double waited = 0;  // seconds that the backward pass and its end waited for projections and merges on workers
    bool updated = false;  // some parameters have taken this step already, inside the backward pass
};

// Forward and backward over the micro-batches of one step. Leaves the gradient of their mean loss in the parameters, and on a merge step the
// new projections in their layers. With train.updates per_layer, and on merge steps where merges_inside_backward, parameters are updated, and
// matrices merged, inside the last backward pass; that is left out if the loss is not finite; elements whose
// gradient is not finite stay as they are.
// config.train.micro_batch must be resolved. Synchronizes.
// Several ranks (device.communicator()): each with its own batches; loss, gradients and norm are those of all, the same bits everywhere. Every rank
// makes the projections of the matrices it owns; Llama::merge, or apply_gradients for galore, brings them together.
StepGradients accumulate_gradients(Device& device, Llama& model, const Config& config, StepSums& sums, const std::vector<Batch>& batches, const StepPlan& plan);

// AdamW, for all that has not been updated, with the gradients just accumulated, scaled down to optimizer.clip where their norm is larger.
void apply_gradients(Device& device, Llama& model, const Config& config, const StepPlan& plan, double gradient_norm);

// One optimizer step over all parameters: global gradient norm, clipping, AdamW.
#pragma once
#include "llama.h"

// Learning rate of step `step` (0-based): linear warm-up, then cosine to min_lr_ratio·lr.
double learning_rate(const Config& config, int64_t step);

// Sums kept on the device during a step: one loss per micro-batch, one squared gradient norm per parameter.
class StepSums {
  public:
    StepSums(Device& device, Llama& model, const Config& config);
    ~StepSums();
    StepSums(const StepSums&) = delete;
    double* losses() { return losses_; }
    // Takes the squared norm of p's gradient now, because the gradient will not be there at the end of the step.
    void record(const Parameter& p);
    // Σ of the first `count` losses, and ‖gradient‖ over all parameters: as recorded where p.stepped, else of the gradient there is. Synchronizes.
    void read(Llama& model, int64_t count, double* loss_sum, double* gradient_norm);
    double read_losses(int64_t count);

  private:
    Device& device_;
    double* losses_;   // device [micro_batches]
    double* squares_;  // device [parameters], by Parameter::stream
    size_t parameters_;
};

// AdamW on p with its gradient times grad_scale; nothing if p is not active.
void update_parameter(Device& device, const Config& config, Parameter& p, int64_t step, double lr, double grad_scale);
// The same on every parameter for which this step has not been taken yet.
void update_parameters(Device& device, Llama& model, const Config& config, int64_t step, double lr, double grad_scale);

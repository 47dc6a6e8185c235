#include "training_step.h"

#include "runtime/metrics.h"
#include "runtime/workers.h"

ProjectionPass projection_pass(const Config& config, int64_t step, bool merges) {
    ProjectionPass pass;
    pass.step = step;
    pass.active = merges;
    pass.whole_batch = config.method.projection_gradient == "full" && config.micro_batches() > 1;
    return pass;
}

StepGradients accumulate_gradients(Device& device, Llama& model, StepSums& sums, const std::vector<Batch>& batches, ProjectionPass pass) {
    int64_t targets = 0, count = int64_t(batches.size());
    for (const Batch& batch : batches) targets += batch.valid_targets;
    float loss_scale = targets ? float(1.0 / double(targets)) : 0.0f;
    model.zero_gradients();
    for (int64_t i = 0; i < count; ++i) {
        pass.first = i == 0, pass.last = i + 1 == count;
        model.train(batches[i], loss_scale, sums.losses(), i, pass);
    }
    StepGradients result;
    if (pass.active && device.workers()) {
        device.synchronize();  // the backward pass itself
        double begin = wall_seconds();
        device.workers()->finish();
        result.waited = wall_seconds() - begin + device.workers()->take_waited();
    }
    double loss_sum = 0;
    sums.read(model, count, &loss_sum, &result.norm);
    if (targets) result.loss = loss_sum / double(targets);
    return result;
}

void apply_gradients(Device& device, Llama& model, const Config& config, int64_t step, double lr, double gradient_norm) {
    double scale = config.optimizer.clip > 0 && gradient_norm > config.optimizer.clip ? config.optimizer.clip / gradient_norm : 1.0;
    update_parameters(device, model, config, step, lr, scale);
}

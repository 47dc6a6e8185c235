#include "training_step.h"

#include <cmath>

#include "runtime/metrics.h"
#include "runtime/workers.h"

StepGradients accumulate_gradients(Device& device, Llama& model, const Config& config, StepSums& sums, const std::vector<Batch>& batches, const StepPlan& plan) {
    int64_t targets = 0, count = int64_t(batches.size());
    for (const Batch& batch : batches) targets += batch.valid_targets;
    float loss_scale = targets ? float(1.0 / double(targets)) : 0.0f;
    StepGradients result;
    BackwardPass pass;
    pass.step = plan.step, pass.merges = plan.merges, pass.source = plan.source;
    pass.whole_batch = config.method.projection_gradient == "full" && config.micro_batches() > 1;
    const bool inside = updates_per_layer(config) || (plan.merges && merges_inside_backward(config));
    for (Parameter* p : model.parameters()) p->stepped = false;
    model.zero_gradients();
    for (int64_t i = 0; i < count; ++i) {
        pass.micro_batch = i, pass.first = i == 0, pass.last = i + 1 == count;
        if (inside && pass.last) {
            pass.may_update = [&] {
                result.updated = std::isfinite(sums.read_losses(count)) || device.dry();
                return result.updated;
            };
            pass.update = [&](Parameter& p) {
                sums.record(p);
                update_parameter(device, config, p, plan.step, plan.lr, 1.0);
                p.stepped = true;
            };
        }
        model.train(batches[i], loss_scale, sums.losses(), i, pass);
    }
    if (result.updated) model.invalidate();  // also where the step ends here, because its gradient is not finite
    if (plan.merges && device.workers()) {
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

void apply_gradients(Device& device, Llama& model, const Config& config, const StepPlan& plan, double gradient_norm) {
    double scale = config.optimizer.clip > 0 && gradient_norm > config.optimizer.clip ? config.optimizer.clip / gradient_norm : 1.0;
    update_parameters(device, model, config, plan.step, plan.lr, scale);
}

#include "training_step.h"

#include <cmath>

#include "comm/communicator.h"
#include "gradient_reduction.h"
#include "runtime/metrics.h"
#include "runtime/workers.h"

StepGradients accumulate_gradients(Device& device, Llama& model, const Config& config, StepSums& sums, const std::vector<Batch>& batches, const StepPlan& plan) {
    const int64_t count = int64_t(batches.size());
    double targets = plan.targets;
    if (targets == 0)
        for (const Batch& batch : batches) targets += double(batch.valid_targets);
    float loss_scale = targets > 0 ? float(1.0 / targets) : 0.0f;
    StepGradients result;
    GradientReduction reduction(device, config, plan.step);
    BackwardPass pass;
    pass.step = plan.step, pass.merges = plan.merges, pass.source = plan.source;
    pass.rank = device.communicator() ? device.communicator()->rank() : 0;
    pass.whole_batch = config.method.projection_gradient == "full" && config.micro_batches() > 1;
    Control* control = device.communicator() ? &device.communicator()->control() : nullptr;
    const bool inside = updates_per_layer(config) || (plan.merges && merges_inside_backward(config));
    for (Parameter* p : model.parameters()) p->stepped = p->reduced = false;
    model.zero_gradients();
    for (int64_t i = 0; i < count; ++i) {
        pass.micro_batch = i, pass.first = i == 0, pass.last = i + 1 == count;
        if (pass.last && config.world_size > 1)
            pass.reduce = [&](Parameter& p) {
                reduction.add(p);
                p.reduced = true;
            };
        if (pass.last && inside) {
            pass.may_update = [&] {
                reduction.add(sums.losses(), count);  // before the gradients here, whose updates depend on them
                reduction.finish();
                Control::Activity waits(control, Control::Kind::waiting, "the loss");
                result.updated = std::isfinite(sums.read_losses(count)) || device.dry();
                return result.updated;
            };
            pass.update = [&](Parameter& p) {
                reduction.finish();
                sums.record(p);
                update_parameter(device, config, p, plan.step, plan.lr, 1.0);
                p.stepped = true;
            };
        }
        model.train(batches[size_t(i)], loss_scale, sums.losses(), i, pass);
    }
    if (config.world_size > 1 && (!inside || result.updated))  // else the loss forbade the backward pass
        for (Parameter* p : model.parameters())
            if (!p->reduced) reduction.add(*p);  // norms
    if (!inside) reduction.add(sums.losses(), count);
    reduction.finish();
    if (result.updated) model.invalidate();  // also where the step ends here, because its gradient is not finite
    if (plan.merges && device.workers()) {
        Communicator::synchronize(device, "the backward pass");
        double begin = wall_seconds();
        device.workers()->finish();
        result.waited = wall_seconds() - begin + device.workers()->take_waited();
    }
    double loss_sum = 0;
    {
        Control::Activity waits(control, Control::Kind::waiting, "the gradients");
        sums.read(model, count, &loss_sum, &result.norm);
    }
    if (targets > 0) result.loss = loss_sum / targets;
    return result;
}

void apply_gradients(Device& device, Llama& model, const Config& config, const StepPlan& plan, double gradient_norm) {
    double scale = config.optimizer.clip > 0 && gradient_norm > config.optimizer.clip ? config.optimizer.clip / gradient_norm : 1.0;
    if (plan.merges) model.refresh_projections(plan.step);
    update_parameters(device, model, config, plan.step, plan.lr, scale);
}

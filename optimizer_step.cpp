#include "optimizer_step.h"

#include <algorithm>
#include <cmath>

#include "ops/elementwise.h"

double learning_rate(const Config& config, int64_t step) {
    const OptimizerConfig& o = config.optimizer;
    // relora: after a restart the rate rises again from near zero.
    const std::vector<int64_t> restarts = config.method.name == "relora" ? merge_steps(config) : std::vector<int64_t>{};
    auto restart = std::lower_bound(restarts.begin(), restarts.end(), step);  // the first at or after this step
    double rise = 1;
    if (restart != restarts.begin()) rise = std::min(1.0, double(step - *std::prev(restart)) / double(std::max<int64_t>(1, config.method.relora_warmup)));
    double total = double(config.train.steps), warmup = std::floor(o.warmup_ratio * total), u = double(step);
    if (u < warmup) return rise * o.lr * (u + 1) / warmup;
    double progress = total > warmup ? (u - warmup) / (total - warmup) : 1.0;
    return rise * o.lr * (o.min_lr_ratio + (1 - o.min_lr_ratio) * 0.5 * (1 + std::cos(3.141592653589793 * progress)));
}

StepSums::StepSums(Device& device, Llama& model, const Config& config) : device_(device), parameters_(model.parameters().size()) {
    losses_ = static_cast<double*>(device.allocate(config.micro_batches() * int64_t(sizeof(double)), "loss sums"));
    squares_ = static_cast<double*>(device.allocate(int64_t(parameters_ * sizeof(double)), "gradient norms"));
}

StepSums::~StepSums() {
    device_.release(losses_);
    device_.release(squares_);
}

double StepSums::read_losses(int64_t count) {
    std::vector<double> host(count);
    device_.download(host.data(), losses_, count * int64_t(sizeof(double)));
    double total = 0;
    for (double x : host) total += x;
    return total;
}

void StepSums::record(const Parameter& p) {
    if (!p.active && !device_.dry()) return device_.zero(squares_ + p.stream, sizeof(double));  // its gradient was never written
    ScratchScope scope(device_);
    sum_of_squares(device_, squares_, p.stream, load_gradient(device_, scope, p));
}

void StepSums::read(Llama& model, int64_t count, double* loss_sum, double* gradient_norm) {
    // All at once where all gradients lie ready.
    std::vector<Tensor> ready;
    for (Parameter* p : model.parameters())
        if (!p->stepped && p->grad.dtype != DType::u8) ready.push_back(p->logical(p->grad));
    if (ready.size() == parameters_) {
        sums_of_squares(device_, squares_, ready);
    } else {
        for (Parameter* p : model.parameters())
            if (!p->stepped) record(*p);
    }
    std::vector<double> host(parameters_);
    device_.download(host.data(), squares_, int64_t(parameters_ * sizeof(double)));
    double total = 0;
    for (double x : host) total += x;
    *gradient_norm = std::sqrt(total);
    *loss_sum = read_losses(count);
}

void update_parameter(Device& device, const Config& config, Parameter& p, int64_t step, double lr, double grad_scale) {
    if (!p.active && !device.dry()) return;
    ScratchScope scope(device);
    const AdamStep adam = adam_step(config, p, lr, grad_scale, step);
    bool taken = true;
    if (p.take_step) taken = p.take_step(device, adam);
    else adam_update(device, p.logical(p.value), load_gradient(device, scope, p), p.moments, adam, nullptr);
    if (taken) ++p.updates;
}

void update_parameters(Device& device, Llama& model, const Config& config, int64_t step, double lr, double grad_scale) {
    for (Parameter* p : model.parameters())
        if (!p->stepped) update_parameter(device, config, *p, step, lr, grad_scale);
    model.invalidate();
}

// GaLore (Zhao et al. 2024): W is trained, but Adam runs on the gradient projected to rank r, where its moments take r/h of the room.
//   left   R = G·Pᵀ (n, r)    W ← W + s·U·P         U = Adam's update for R, learning rate and sign included
//   right  R = Gᵀ·Pᵀ (n, r)   W ← W + s·(U·P)ᵀ
// P: (r, h), the leading singular vectors of the gradient at the last refresh, on the same side as LoQT's.
#include "comm/communicator.h"
#include "loqt.h"
#include "ops/elementwise.h"
#include "ops/matmul.h"
#include "runtime/profile.h"

namespace {
constexpr uint32_t kUpdateStream = 0x20000000;  // rounding of W, apart from that of the moments
}

bool LinearGroup::galore_step(Device& device, Linear& l, AdamStep step) {
    ProfileLabel label(device, "galore update");
    Parameter& w = l.dense;
    ScratchScope scope(device);
    Tensor g = scope.tensor("gradient in fp32", DType::f32, l.out, l.in, round_up(l.in, 8));
    convert(device, g, w.logical(w.grad));
    if (refresh_ || device.dry()) {  // inside the backward pass; else refresh_projections was first
        if (owns(device, l)) refresh_projection(device, l, g, step.step);
        if (Communicator* ranks = device.communicator()) {
            std::vector<double> outcome;
            add_outcome(device, l, outcome);
            ranks->sum(outcome, "a new projection");
            take_outcome(device, l, outcome.data());
            ranks->finish();
        }
    }
    if (!l.projected && !device.dry()) return false;  // no gradient so far: nothing to follow

    Tensor p = scope.tensor("P in fp32", DType::f32, l.rank, l.h()), r = scope.tensor("projected gradient", DType::f32, l.n(), l.rank),
           u = scope.tensor("update", DType::f32, l.n(), l.rank);
    convert(device, p, l.p);
    matmul(device, r, 1.0f, g, l.right ? Op::transpose : Op::none, p, Op::transpose);
    device.zero(u);
    AdamStep inner = step;
    inner.t = w.updates + 1;  // a refresh may have set it back
    inner.lr = step.lr * double(scale_), inner.weight_decay = 0;
    adam_update(device, u, r, l.b.moments, inner, nullptr);

    add_adapter(device, l, g, p, u, 0.0f, 1.0f);  // g ← the whole update
    Tensor value = w.logical(w.value);
    if (step.weight_decay > 0) axpby(device, g, float(-step.lr * step.weight_decay), value, 1.0f);
    // W + update is what a sum of gradients is: bf16 + fp32, rounded stochastically.
    if (step.rounding == ParamRounding::stochastic && value.dtype == DType::bf16)
        add_to_gradient_sum(device, {value, Tensor{}}, g, false, RoundingDraws{step.seed, kUpdateStream + step.stream, step.step});
    else axpby(device, value, 1.0f, g, 1.0f);
    return true;
}

void LinearGroup::refresh_projections(Device& device, int64_t step) {
    if (!refresh_) return;
    refresh_ = false;
    ProfileLabel label(device, "projection");
    for (Linear& l : linears_) {
        if (!owns(device, l)) continue;
        ScratchScope scope(device);
        Tensor g = scope.tensor("gradient in fp32", DType::f32, l.out, l.in, round_up(l.in, 8));
        convert(device, g, l.dense.logical(l.dense.grad));
        refresh_projection(device, l, g, step);
    }
}

void LinearGroup::refresh_projection(Device& device, Linear& l, Tensor gradient, int64_t step) {
    ScratchScope scope(device);
    Tensor p_old = scope.tensor("old P", DType::f32, l.rank, l.h()), p_new = scope.tensor("new P", DType::f32, l.rank, l.h());
    convert(device, p_old, l.p);
    const bool subspace = config_->method.projection == "subspace";
    ProjectionResult result = leading_singular_vectors(device, p_new, gradient, l.right, subspace ? ProjectionMethod::subspace : ProjectionMethod::gram,
                                                       subspace && (l.projected || device.dry()) ? p_old : Tensor{}, uint64_t(config_->train.seed),
                                                       l.dense.stream + (uint32_t(step) << 12));
    l.next_ready = l.merged = result.ok || device.dry();
    l.captured_energy = result.captured_energy;
    if (!l.next_ready) return;
    l.b.stream = l.dense.stream;
    if (l.projected || device.dry()) carry_moments(device, l, p_old, p_new, step);
    convert(device, l.p, p_new);
    l.projected = true;
}

// Several ranks: each makes some of the matrices anew and the others get them, so that no factorization is done twice.
#include "comm/communicator.h"
#include "loqt.h"

bool LinearGroup::owns(const Device& device, const Linear& l) const {
    const Communicator* ranks = device.communicator();
    return !ranks || l.owner == ranks->rank();
}

// The tensors that a merge, a refresh or an initialization by factorization writes.
std::vector<Tensor> LinearGroup::remade(const Linear& l) const {
    std::vector<Tensor> all;
    auto add = [&](Tensor t) {
        if (t) all.push_back(t.flat());
    };
    auto add_nf4 = [&](const Nf4Tensor& q) {
        for (auto part : kNf4Parts) add(q.*part);
    };
    if (policy_.quantized) add_nf4(l.w_q);
    else if (policy_.adapters) add(l.w);
    if (policy_.quantized_p) add_nf4(l.p_q);
    else add(l.p);
    add(l.a.value), add(l.b.value);  // galore: neither
    if (policy_.projects && config_->method.moments_at_merge != "keep") {
        const AdamState& state = l.b.moments;
        add(state.m), add(state.v), add(state.m_absmax), add(state.v_absmax);
    }
    return all;
}

void LinearGroup::add_outcome(const Device& device, const Linear& l, std::vector<double>& outcomes) const {
    const bool made = owns(device, l) && l.next_ready;
    for (double number : {1.0, double(l.captured_energy), l.quant_error, l.plain_quant_error}) outcomes.push_back(made ? number : 0.0);
}

void LinearGroup::take_outcome(Device& device, Linear& l, const double* outcome) {
    if (outcome[0] == 0) return;  // its owner made nothing
    device.communicator()->broadcast(remade(l), l.owner);
    if (owns(device, l)) return;
    // As reinitialize_one and refresh_projection leave the matrix on its owner.
    if (l.projected && config_->method.moments_at_merge == "reset") (policy_.trains_w ? l.dense : l.b).updates = 0;
    if (policy_.trains_w) l.b.stream = l.dense.stream;
    if (l.b.moments.correction) device.zero(l.b.moments.correction);
    l.captured_energy = float(outcome[1]), l.quant_error = outcome[2], l.plain_quant_error = outcome[3];
    l.projected = l.b.active = l.next_ready = l.merged = true;
}

void LinearGroup::share_initial(Device& device) {
    for (Linear& l : linears_) {
        device.communicator()->broadcast(remade(l), l.owner);
        l.projected = true;
    }
}

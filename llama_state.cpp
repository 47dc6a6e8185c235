// What happens to the model between passes: merges and who makes them, export. See llama.h.
#include <algorithm>

#include "comm/communicator.h"
#include "llama.h"
#include "ops/elementwise.h"
#include "runtime/workers.h"

void Llama::zero_gradients() {
    if (!updates_per_layer(config_)) device_.zero(embedding_.grad);  // else in its turn
    device_.zero(final_norm_.grad);
    for (Block& b : blocks_) device_.zero(b.norm1.grad), device_.zero(b.norm2.grad);
}

void Llama::invalidate() {
    for (LinearGroup* group : groups()) group->invalidate();
}

MergeStatistics Llama::merge(int64_t step, const WeightSource* source) {
    MergeStatistics statistics;
    for (LinearGroup* group : groups()) group->start_reinitialization(device_, step, source);
    if (device_.workers()) device_.workers()->finish();
    if (method_policy(config_).adapters && method_policy(config_).projects) share_remade("a merge");
    for (LinearGroup* group : groups()) group->finish_reinitialization(statistics);
    return statistics;
}

void Llama::refresh_projections(int64_t step) {
    const MethodPolicy policy = method_policy(config_);
    if (!policy.projects || policy.adapters || updates_per_layer(config_)) return;
    for (LinearGroup* group : groups()) group->refresh_projections(device_, step);
    share_remade("new projections");
}

// Several ranks: what each has made anew goes to the others.
void Llama::share_remade(const char* what) {
    Communicator* ranks = device_.communicator();
    if (!ranks) return;
    std::vector<double> outcomes;
    for (LinearGroup* group : groups())
        for (Linear& l : group->linears()) group->add_outcome(device_, l, outcomes);
    ranks->sum(outcomes, what);
    const double* outcome = outcomes.data();
    for (LinearGroup* group : groups())
        for (Linear& l : group->linears()) {
            group->take_outcome(device_, l, outcome);
            outcome += LinearGroup::kOutcomeNumbers;
        }
    ranks->finish();
}

// Every matrix goes to the rank with the least to do so far, in the order in which the backward pass meets them: so all are busy all the time.
void Llama::assign_owners() {
    std::vector<double> load(size_t(config_.world_size), 0.0);
    std::vector<LinearGroup*> order = groups();
    std::reverse(order.begin(), order.end());
    for (LinearGroup* group : order)
        for (Linear& l : group->linears()) {
            l.owner = int(std::min_element(load.begin(), load.end()) - load.begin());
            load[size_t(l.owner)] += double(l.h()) * double(l.h()) * double(l.h() + l.n());  // the Gram matrix and its eigenvectors
        }
}

int64_t Llama::projected_matrices() {
    int64_t count = 0;
    for (LinearGroup* group : groups())
        for (const Linear& l : group->linears()) count += l.projected;
    return count;
}

int64_t Llama::matrices() {
    int64_t count = 0;
    for (LinearGroup* group : groups()) count += int64_t(group->linears().size());
    return count;
}

std::vector<Llama::ExportedTensor> Llama::exported_tensors() {
    std::vector<ExportedTensor> all;
    auto plain = [&](Parameter& p, std::vector<int64_t> shape) {
        all.push_back({p.name, shape, [this, &p](std::vector<float>& out) {
                           ScratchScope scope(device_);
                           Tensor wide = scope.tensor("exported weights", DType::f32, p.rows, p.cols);
                           convert(device_, wide, p.value);
                           out.resize(p.rows * p.cols);
                           device_.download(out.data(), wide.data, wide.bytes());
                       }});
    };
    plain(embedding_, {embedding_.rows, embedding_.cols});
    for (Block& b : blocks_) {
        plain(b.norm1, {b.norm1.cols});
        plain(b.norm2, {b.norm2.cols});
        for (LinearGroup* group : {&b.qkv, &b.o, &b.gate_up, &b.down})
            for (Linear& l : group->linears())
                all.push_back({l.name, {l.out, l.in}, [this, group, &l](std::vector<float>& out) { group->read_effective(device_, l, out); }});
    }
    plain(final_norm_, {final_norm_.cols});
    plain(head_, {head_.rows, head_.cols});
    return all;
}

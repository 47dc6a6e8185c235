// Re-initialisation of the LoQT linear layer: projections from the gradient, merging, compensation, moments (LoQT, Algorithm 2, corrected).
//
// A merge costs no extra pass over data. During the ordinary backward pass the dense gradient G of one matrix at a time gives the new P;
// the optimizer takes its ordinary step in the old basis; then the matrix is merged and made anew: one after the other inside the backward
// pass, or, where the optimizer has to wait for the end of that, all of them then, their new P being stored meanwhile.
#include <optional>

#include "comm/communicator.h"
#include "compensation.h"
#include "loqt.h"
#include "ops/elementwise.h"
#include "ops/linalg.h"
#include "ops/matmul.h"
#include "runtime/metrics.h"
#include "runtime/profile.h"
#include "runtime/workers.h"

namespace {

// Scratch that a job works with: until it has the projection, and until it has ended. The later one goes first.
struct JobScratch {
    ScratchScope whole;
    std::optional<ScratchScope> projection;
    explicit JobScratch(Device& device) : whole(device) {}
};

}  // namespace

// Room for the next projection of a matrix in scratch memory.
NextProjection LinearGroup::scratch_projection(ScratchScope& scope, const Linear& l) const {
    NextProjection next;
    if (policy_.quantized_p) {
        next.q = l.p_q;
        for (auto part : kNf4Parts)
            if (Tensor t = l.p_q.*part; t.numel()) next.q.*part = scope.tensor("next P", t.dtype, t.rows, t.cols);
    } else {
        next.p = scope.tensor("next P", l.p.dtype, l.rank, l.h());
    }
    return next;
}

void LinearGroup::project_gradients(Device& device, Tensor dy, Tensor x, const BackwardPass& pass) {
    ProfileLabel label(device, "projection");
    if (merge_gradient_ && pass.whole_batch) matmul(device, merge_gradient_, 1.0f, dy, Op::transpose, x, Op::none, pass.first ? 0.0f : 1.0f);
    if (!pass.last) return;
    // With workers the backward pass goes on meanwhile, and what counts is the wait at its end (StepGradients::waited).
    bool timed = !device.workers();
    if (timed) Communicator::synchronize(device, "the backward pass");
    for (Linear& l : linears_) {
        double begin = wall_seconds();
        project_one(device, l, dy, x, pass);
        if (timed) Communicator::synchronize(device, "a new projection");
        l.projection_seconds = timed ? wall_seconds() - begin : 0;
    }
}

// G of one matrix over the data of all ranks, (padded rows, in_padded) in fp32: on the rank that owns the matrix, elsewhere undefined.
Tensor LinearGroup::dense_gradient(Device& device, ScratchScope& scope, const Linear& l, Tensor dy, Tensor x, const BackwardPass& pass) {
    const int64_t rows = padded_width(l.out);
    const bool summed = merge_gradient_ && pass.whole_batch;
    Tensor g = summed ? merge_gradient_.row_slice(l.row_begin, rows) : scope.tensor("dense gradient", DType::f32, rows, in_padded());
    if (!summed) matmul(device, g, 1.0f, dy.col_slice(l.row_begin, rows), Op::transpose, x, Op::none);
    if (Communicator* ranks = device.communicator()) {
        ranks->reduce(g.flat(), l.owner);
        ranks->finish();
    }
    return Tensor{g.data, g.dtype, l.out, l.in, g.ld};
}

// A worker without a job. The jobs of all may be waiting for a gradient to which a rank that hangs does not come, so the watch over the ranks has to know; and
// all ranks enter the same waits, also those that need no worker.
Device* LinearGroup::idle_worker(Device& device, const Linear& l) const {
    Communicator* ranks = device.communicator();
    Control::Activity waits(ranks ? &ranks->control() : nullptr, Control::Kind::waiting, "a new projection");
    return owns(device, l) ? &device.workers()->idle() : nullptr;
}

// The Gram matrix on this device; its eigenvectors, and the merge if it is due now, on a worker's, if there are workers.
void LinearGroup::project_one(Device& device, Linear& l, Tensor dy, Tensor x, const BackwardPass& pass) {
    Device* worker = device.workers() ? idle_worker(device, l) : nullptr;
    if (!owns(device, l)) {
        ScratchScope scope(device);
        dense_gradient(device, scope, l, dy, x, pass);
        return;
    }
    Device& helper = worker ? *worker : device;
    auto scratch = std::make_shared<JobScratch>(helper);
    const bool at_once = bool(pass.update);
    CHECK_INTERNAL(at_once || !merges_inside_backward(*config_), "%s: no place for its next projection", l.name.c_str());
    NextProjection next = at_once ? scratch_projection(scratch->whole, l) : l.next;
    scratch->projection.emplace(helper);
    Tensor c = scratch->projection->tensor("Gram matrix of the gradient", DType::f32, l.h(), l.h());
    ProjectionMethod method = config_->method.projection == "subspace" ? ProjectionMethod::subspace : ProjectionMethod::gram;
    {
        ScratchScope gradient_scope(device);
        gradient_gram(device, c, dense_gradient(device, gradient_scope, l, dy, x, pass), l.right, method);
    }
    auto job = [this, &l, scratch = std::move(scratch), next, c, method, at_once, step = pass.step,
                source = pass.source](Device& d) mutable {
        {
            ScratchScope inner(d);
            Tensor p = inner.tensor("new P", DType::f32, l.rank, l.h()), previous;
            if (method == ProjectionMethod::subspace && (l.projected || d.dry())) {
                previous = p;
                load_p(d, previous, l);
            }
            ProjectionResult result = leading_eigenvectors(d, p, c, method, previous, uint64_t(config_->train.seed), l.b.stream + (uint32_t(step) << 12));
            l.next_ready = result.ok || d.dry();
            l.captured_energy = result.captured_energy;
            if (!l.next_ready) return;
            if (policy_.quantized_p) nf4_quantize(d, next.q, p, nullptr);
            else convert(d, next.p, p);
        }
        scratch->projection.reset();
        if (at_once) reinitialize_one(d, l, next, step, source);
    };
    if (device.workers()) device.workers()->start(helper, std::move(job));
    else job(device);
}

void LinearGroup::start_reinitialization(Device& device, int64_t step, const WeightSource* source) {
    ProfileLabel label(device, "merge");
    for (Linear& l : linears_) {
        if (policy_.trains_p) restart(device, l, step);
        if (!l.next_ready || l.merged) continue;
        auto job = [this, &l, step, source](Device& d) { reinitialize_one(d, l, l.next, step, source); };
        if (device.workers()) device.workers()->start(device.workers()->idle(), job);
        else job(device);
    }
}

void LinearGroup::finish_reinitialization(MergeStatistics& statistics) {
    for (Linear& l : linears_) {
        ++statistics.matrices;
        statistics.projection_seconds += l.projection_seconds;
        if (!l.next_ready) {
            ++statistics.failed;
            continue;
        }
        l.next_ready = l.merged = false;
        statistics.quant_error += l.quant_error;
        statistics.plain_quant_error += l.plain_quant_error;
        statistics.captured_energy += l.captured_energy;
    }
    invalidate();
}

void LinearGroup::reinitialize_one(Device& device, Linear& l, const NextProjection& next, int64_t step, const WeightSource* source) {
    ScratchScope scope(device);
    float s = scale_;
    Tensor b = l.b.logical(l.b.value);

    // W in fp32 with the old adapters merged in.
    Tensor w = scope.tensor("merged weights", DType::f32, l.out, l.in, round_up(l.in, 8));
    if (source && !l.projected) load_source(device, w, l, *source);
    else load_w(device, w, l);
    Tensor p_new = scope.tensor("new P", DType::f32, l.rank, l.h());
    if (policy_.quantized_p) nf4_dequantize(device, p_new, next.q);
    else convert(device, p_new, next.p);
    if (l.projected || device.dry()) {
        ScratchScope old_scope(device);
        Tensor p_old = old_scope.tensor("old P", DType::f32, l.rank, l.h());
        load_p(device, p_old, l);
        Tensor b_old = old_scope.tensor("old B", DType::f32, l.n(), l.rank);
        convert(device, b_old, b);
        add_adapter(device, l, w, p_old, b_old, 1.0f, s);
        carry_moments(device, l, p_old, p_new, step);
    }

    // W, P and B anew.
    if (policy_.quantized) {
        CompensationResult result = quantize_with_compensation(device, l.w_q, b, w, p_new, l.right, s, int(config_->method.compensation_rounds));
        l.quant_error = result.error, l.plain_quant_error = result.quant_error;
    } else {
        store_w(device, l, w);
        device.zero(l.b.value);
    }
    if (policy_.quantized_p) {
        for (auto part : kNf4Parts)
            if ((l.p_q.*part).numel()) device.copy((l.p_q.*part).data, (next.q.*part).data, (l.p_q.*part).bytes());
    } else {
        device.copy(l.p.data, next.p.data, l.p.bytes());
    }
    if (l.b.moments.correction) device.zero(l.b.moments.correction);
    l.projected = l.b.active = l.merged = true;
}

// B changes basis; its moments belong to the old one.
//   keep     as they are (the official code)
//   reset    zero, Adam's t starts over
//   project  m ← m·R, v ← v·(R∘R), R = P_old·P_new⁺ (r, r): the coordinates of the old rows in the new basis
void LinearGroup::carry_moments(Device& device, Linear& l, Tensor p_old, Tensor p_new, int64_t step) {
    const std::string& policy = config_->method.moments_at_merge;
    AdamState& state = l.b.moments;
    if (policy == "keep") return;
    if (policy == "reset") {
        for (Tensor t : {state.m, state.v, state.m_absmax, state.v_absmax})
            if (t) device.zero(t);
        (policy_.trains_w ? l.dense : l.b).updates = 0;
        return;
    }
    ScratchScope scope(device);
    Tensor r = scope.tensor("basis change", DType::f32, l.rank, l.rank);
    {
        ScratchScope inverse_scope(device);
        Tensor inverse = inverse_scope.tensor("P⁺", DType::f32, l.rank, l.h());
        bool defined = pseudo_inverse(device, inverse, p_new);
        matmul(device, r, 1.0f, p_old, Op::none, inverse, Op::transpose);
        if (!defined) device.zero(r);
    }
    Tensor old_moment = scope.tensor("old moment", DType::f32, l.n(), l.rank), new_moment = scope.tensor("new moment", DType::f32, l.n(), l.rank);
    auto flat = [](Tensor t) { return Tensor{t.data, t.dtype, 1, t.numel(), t.numel()}; };
    for (bool second : {false, true}) {
        if (second) square(device, r, r);
        adam_load_moment(device, flat(old_moment), state, second);
        matmul(device, new_moment, 1.0f, old_moment, Op::none, r, Op::none);
        adam_store_moment(device, state, second, flat(new_moment), uint64_t(config_->train.seed), l.b.stream, uint32_t(step));
    }
}

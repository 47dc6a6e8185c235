// What a linear layer consists of: shapes, tensors, initial weights, W and P as they are stored. See loqt.h.
#include "loqt.h"

#include "ops/elementwise.h"

EffectiveWeights effective_weights_of(const Config& config) {
    const std::string& name = config.train.effective_weights;
    return name == "cached" ? EffectiveWeights::cached : name == "factored" ? EffectiveWeights::factored : EffectiveWeights::rebuilt;
}

Recompute recompute_of(const Config& config) {
    const std::string& name = config.train.recompute;
    return name == "none" ? Recompute::none : name == "block" ? Recompute::block : Recompute::light;
}

bool merges_inside_backward(const Config& config) {
    const MethodPolicy policy = method_policy(config);
    return policy.adapters && policy.projects && config.optimizer.clip == 0;
}

int64_t padded_width(int64_t width) { return width % 8 == 0 ? width : round_up(width, 128); }

void LinearGroup::configure(const Config& config, int64_t in, const std::vector<Spec>& specs) {
    config_ = &config;
    policy_ = method_policy(config);
    scale_ = float(adapter_scale(config));
    in_ = in;
    out_padded_ = 0;
    linears_.resize(specs.size());
    for (size_t i = 0; i < specs.size(); ++i) {
        Linear& l = linears_[i];
        l.name = specs[i].name, l.out = specs[i].out, l.in = in, l.row_begin = out_padded_;
        l.right = l.out < l.in;
        l.rank = std::min({config.method.rank, l.out, l.in});
        out_padded_ += padded_width(l.out);
    }
}

namespace {

void register_nf4(TensorTable& table, const std::string& name, Family family, Nf4Tensor& q, int64_t rows, int64_t cols, bool nested, bool saved) {
    q.rows = rows, q.cols = cols, q.nested = nested;
    table.add(name + ".nf4", family, &q.codes, DType::u8, 1, ceil_div(rows * cols, 2), saved);
    if (nested) {
        table.add(name + ".absmax8", family, &q.codes8, DType::u8, 1, q.blocks(), saved);
        table.add(name + ".absmax_scale", family, &q.scale2, DType::f32, 1, ceil_div(q.blocks(), kNestedBlock), saved);
        table.add(name + ".absmax_offset", family, &q.offset, DType::f32, 1, 1, saved);
    } else {
        table.add(name + ".absmax", family, &q.absmax, DType::f32, 1, q.blocks(), saved);
    }
}

}  // namespace

void LinearGroup::register_tensors(const Registration& reg) {
    TensorTable& table = reg.table;
    const Config& config = reg.config;
    DType act = reg.device.activation_dtype();
    const std::string& group_name = linears_.front().name;
    if (!policy_.quantized)
        table.add(group_name + ".fused", policy_.trains_w ? Family::trained : Family::frozen, &fused_, act, out_padded_, in_, false, 0, in_padded());
    if (policy_.trains_w && reg.training) {
        const std::string name = group_name + ".fused.grad";
        const DType dtype = gradient_dtype(config, reg.device);
        if (updates_per_layer(config)) table.add_shared(name, Family::gradients, &fused_grad_, dtype, out_padded_, in_, 0, in_padded());
        else table.add(name, Family::gradients, &fused_grad_, dtype, out_padded_, in_, false, 0, in_padded());
    }
    for (Linear& l : linears_) {
        register_weight(reg, l);
        register_projection(reg, l);
        if (!policy_.adapters) continue;
        register_parameter(reg, l.b, l.name + ".B", l.n(), l.rank, Precision::adapter, padded_width(l.n()));
        l.b.active = !policy_.projects;
    }
    if (!policy_.adapters) return;
    if (reg.training && policy_.projects && config.method.projection_gradient == "full" && config.micro_batches() > 1)
        table.add(group_name + ".merge_gradient", Family::projection, &merge_gradient_, DType::f32, out_padded_, in_padded(), false);
    if (reg.training && effective_weights_of(config) == EffectiveWeights::cached)
        table.add(group_name + ".effective", Family::effective, &effective_, act, out_padded_, in_padded(), false);
    if (reg.training && factored() && recompute_of(config) == Recompute::none && left_rank())
        table.add(group_name + ".xP", Family::activations, &kept_u_, act, config.train.micro_batch * config.train.seq_len, left_rank(), false);
}

void LinearGroup::register_weight(const Registration& reg, Linear& l) {
    if (policy_.quantized) return register_nf4(reg.table, l.name, Family::frozen, l.w_q, l.out, l.in, reg.config.method.double_quant, true);
    if (!policy_.trains_w) return reg.table.add_part(l.name, &l.w, &fused_, l.row_begin, l.out, l.in, l.out, true);
    l.dense.name = l.name, l.dense.rows = l.out, l.dense.cols = l.in;
    reg.table.add_part(l.name, &l.dense.value, &fused_, l.row_begin, l.out, l.in, l.out, true);
    if (reg.training) reg.table.add_part(l.name + ".grad", &l.dense.grad, &fused_grad_, l.row_begin, l.out, l.in, l.out, false);
    if (!policy_.projects) return register_moments(reg, l.dense, Precision::weight);
    l.b.name = l.name + ".projected", l.b.rows = l.n(), l.b.cols = l.rank;
    register_moments(reg, l.b, Precision::weight);
    l.dense.take_step = [this, &l](Device& device, const AdamStep& step) { return galore_step(device, l, step); };
}

void LinearGroup::register_projection(const Registration& reg, Linear& l) {
    const std::string name = l.name + (policy_.trains_p ? ".A" : ".P");
    const DType act = reg.device.activation_dtype();
    const bool nested = reg.config.method.double_quant, keeps_next = reg.training && policy_.adapters && !merges_inside_backward(reg.config);
    if (policy_.trains_p) return register_parameter(reg, l.a, name, l.rank, l.h(), Precision::adapter);
    if (!policy_.projects) return;
    if (policy_.quantized_p) {
        register_nf4(reg.table, name, Family::frozen, l.p_q, l.rank, l.h(), nested, true);
        if (keeps_next) register_nf4(reg.table, name + "_next", Family::projection, l.next.q, l.rank, l.h(), nested, false);
    } else {
        reg.table.add(name, Family::frozen, &l.p, act, l.rank, l.h(), true);
        if (keeps_next) reg.table.add(name + "_next", Family::projection, &l.next.p, act, l.rank, l.h(), false);
    }
}

void LinearGroup::initialize(Device& device, const WeightSource& source) {
    for (Linear& l : linears_) {
        ScratchScope scope(device);
        Tensor w = scope.tensor("initial weights", DType::f32, l.out, l.in);
        load_source(device, w, l, source);
        store_w(device, l, w);
        if (policy_.trains_p) initialize_factors(device, l, w);
    }
    invalidate();
}

void LinearGroup::collect(std::vector<Parameter*>& parameters) {
    for (Linear& l : linears_) {
        if (policy_.trains_w) parameters.push_back(&l.dense);
        if (policy_.trains_p) parameters.push_back(&l.a);
        if (policy_.adapters) parameters.push_back(&l.b);
    }
}

void LinearGroup::restored() {
    for (Linear& l : linears_) l.projected = policy_.adapters ? l.b.active : policy_.projects && l.dense.updates > 0;
    invalidate();
}

void LinearGroup::load_source(Device& device, Tensor w, const Linear& l, const WeightSource& source) const {
    if (!device.dry()) source(device, l.name, 0, w);
}

void LinearGroup::load_w(Device& device, Tensor w, const Linear& l) const {
    if (policy_.quantized) nf4_dequantize(device, w, l.w_q);
    else convert(device, w, policy_.trains_w ? l.dense.value : l.w);
}

void LinearGroup::store_w(Device& device, const Linear& l, Tensor w) const {
    if (policy_.quantized) nf4_quantize(device, l.w_q, w, nullptr);
    else convert(device, policy_.trains_w ? l.dense.value : l.w, w);
}

void LinearGroup::load_p(Device& device, Tensor p, const Linear& l) const {
    if (policy_.trains_p) convert(device, p, l.a.value);
    else if (policy_.quantized_p) nf4_dequantize(device, p, l.p_q);
    else convert(device, p, l.p);
}

Tensor LinearGroup::dequantized_p(Device& device, ScratchScope& scope, const Linear& l, DType dtype) const {
    Tensor stored = policy_.trains_p ? l.a.value : l.p;  // no rows where it is NF4
    if (stored.rows && dtype == stored.dtype) return stored;
    Tensor p = scope.tensor("P", dtype, l.rank, l.h());
    load_p(device, p, l);
    return p;
}

// Forward and backward of the LoQT linear layer. Re-initialisation is in loqt_merge.cpp.
#include "loqt.h"

#include "ops/elementwise.h"
#include "ops/matmul.h"
#include "runtime/profile.h"

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
    l.dense.take_step = [this, &l](Device& device, const AdamStep& step) { galore_step(device, l, step); };
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

// ---- W_eff

// w: (out_padded, in_padded). Padding is zero because dequantization leaves the zeros there and B's padding rows are zero.
void LinearGroup::load_fused(Device& device, Tensor w) {
    for (const Linear& l : linears_) {
        Tensor slab = w.row_slice(l.row_begin, padded_width(l.out));
        if (padded_width(l.out) != l.out || padded_width(l.in) != l.in) device.zero(slab);
        load_w(device, Tensor{slab.data, slab.dtype, l.out, l.in, slab.ld}, l);
    }
}

// w += s·P·B
void LinearGroup::add_adapters(Device& device, Tensor w) {
    float s = scale_;
    for (const Linear& l : linears_) {
        if (!has_adapter(device, l)) continue;
        ScratchScope scope(device);
        Tensor p = dequantized_p(device, scope, l, w.dtype);
        Tensor slab = w.row_slice(l.row_begin, l.right ? l.out : padded_width(l.out));
        if (l.right) matmul(device, slab, s, p, Op::transpose, l.b.value, Op::transpose, 1.0f);
        else matmul(device, slab.col_slice(0, l.in), s, l.b.value, Op::none, p, Op::none, 1.0f);
    }
}

void LinearGroup::add_adapter(Device& device, const Linear& l, Tensor w, Tensor p, Tensor b, float beta, float factor) const {
    if (l.right) matmul(device, w, factor, p, Op::transpose, b, Op::transpose, beta);
    else matmul(device, w, factor, b, Op::none, p, Op::none, beta);
}

Tensor LinearGroup::effective_weight(Device& device, ScratchScope& scope) {
    if (policy_.trains_w) return Tensor{fused_.data, fused_.dtype, out_padded_, in_padded(), fused_.ld};
    ProfileLabel label(device, "effective weights");
    if (effective_) {
        if (!effective_fresh_) load_fused(device, effective_), add_adapters(device, effective_);
        effective_fresh_ = true;
        return effective_;
    }
    Tensor w = scope.tensor("effective weights", device.activation_dtype(), out_padded_, in_padded());
    load_fused(device, w);
    add_adapters(device, w);
    return w;
}

Tensor LinearGroup::weight_without_adapters(Device& device, ScratchScope& scope) {
    if (!policy_.quantized) return Tensor{fused_.data, fused_.dtype, out_padded_, in_padded(), fused_.ld};
    ProfileLabel label(device, "effective weights");
    Tensor w = scope.tensor("dequantized weights", device.activation_dtype(), out_padded_, in_padded());
    load_fused(device, w);
    return w;
}

// ---- Forward, and gradient of the input

void LinearGroup::forward(Device& device, Tensor y, Tensor x, Tensor residual) {
    ProfileLabel label(device, "linear forward");
    {
        ScratchScope scope(device);
        Tensor w = factored() ? weight_without_adapters(device, scope) : effective_weight(device, scope);
        if (residual) matmul(device, y, 1.0f, x, Op::none, w, Op::transpose, 1.0f, residual);
        else matmul(device, y, 1.0f, x, Op::none, w, Op::transpose);
    }
    if (factored()) add_factored_forward(device, y, x);
}

void LinearGroup::input_gradient(Device& device, Tensor dx, Tensor dy) {
    ProfileLabel label(device, "input gradients");
    {
        ScratchScope scope(device);
        Tensor w = factored() ? weight_without_adapters(device, scope) : effective_weight(device, scope);
        matmul(device, dx, 1.0f, dy, Op::none, w, Op::none);
    }
    if (factored()) add_factored_input_gradient(device, dx, dy);
}

// y += s·(x·Pᵀ)·Bᵀ (left), s·(x·B)·P (right).
void LinearGroup::add_factored_forward(Device& device, Tensor y, Tensor x) {
    float s = scale_;
    ScratchScope scope(device);
    Tensor u = left_rank() ? projected_input(device, scope, x) : Tensor{};
    int64_t column = 0;
    for (const Linear& l : linears_) {
        ScratchScope inner(device);
        if (l.right) {
            Tensor p = dequantized_p(device, inner, l, x.dtype), v = inner.tensor("x·B", x.dtype, x.rows, l.rank);
            if (!has_adapter(device, l)) continue;
            matmul(device, v, 1.0f, x, Op::none, l.b.value, Op::none);
            matmul(device, y.col_slice(l.row_begin, l.out), s, v, Op::none, p, Op::none, 1.0f);
        } else {
            if (has_adapter(device, l))
                matmul(device, y.col_slice(l.row_begin, padded_width(l.out)), s, u.col_slice(column, l.rank), Op::none, l.b.value, Op::transpose, 1.0f);
            column += l.rank;
        }
    }
}

// dx += s·(dy·B)·P (left; the matrices of a group add up, so the second product is one), s·(dy·Pᵀ)·Bᵀ (right).
void LinearGroup::add_factored_input_gradient(Device& device, Tensor dx, Tensor dy) {
    float s = scale_;
    for (const Linear& l : linears_) {
        if (!l.right) continue;
        ScratchScope scope(device);
        Tensor p = dequantized_p(device, scope, l, dy.dtype), v = scope.tensor("dy·P", dy.dtype, dy.rows, l.rank);
        if (!has_adapter(device, l)) continue;
        matmul(device, v, 1.0f, dy.col_slice(l.row_begin, l.out), Op::none, p, Op::transpose);
        matmul(device, dx, s, v, Op::none, l.b.value, Op::transpose, 1.0f);
    }
    if (left_rank() == 0) return;
    ScratchScope scope(device);
    Tensor v = scope.tensor("dy·B", dy.dtype, dy.rows, left_rank()), p = stacked_p(device, scope, dy.dtype);
    int64_t column = 0;
    for (const Linear& l : linears_) {
        if (l.right) continue;
        Tensor slice = v.col_slice(column, l.rank);
        column += l.rank;
        // B of a matrix that has no P yet is zero, and so is this product.
        matmul(device, slice, s, dy.col_slice(l.row_begin, padded_width(l.out)), Op::none, l.b.value, Op::none);
    }
    matmul(device, dx.col_slice(0, in_), 1.0f, v, Op::none, p, Op::none, 1.0f);
}

// ---- Gradients of what is trained

void LinearGroup::parameter_gradients(Device& device, Tensor dy, Tensor x, const BackwardPass& pass) {
    if (policy_.trains_w) return weight_gradients(device, dy, x, pass);
    factor_gradients(device, dy, x, pass);
    if (pass.merges && policy_.projects) project_gradients(device, dy, x, pass);
}

// dW += dyᵀ·x, for the whole group at once where it can go straight to where it is kept.
void LinearGroup::weight_gradients(Device& device, Tensor dy, Tensor x, const BackwardPass& pass) {
    ProfileLabel label(device, "weight gradients");
    refresh_ = policy_.projects && pass.merges;
    GradientPart part = pass.part(*config_);
    if (fused_grad_.dtype == DType::f32 || part.only) {
        matmul(device, Tensor{fused_grad_.data, fused_grad_.dtype, out_padded_, in_padded(), fused_grad_.ld}, 1.0f, dy, Op::transpose, x, Op::none, part.first ? 0.0f : 1.0f);
    } else {
        for (const Linear& l : linears_)
            add_gradient(device, l.dense, part, [&](Tensor into, int64_t row, float beta) {
                matmul(device, into, 1.0f, dy.col_slice(l.row_begin + row, into.rows), Op::transpose, x.col_slice(0, in_), Op::none, beta);
            });
    }
    if (pass.update)
        for (Linear& l : linears_) pass.update(l.dense);
}

int64_t LinearGroup::left_rank() const {
    int64_t rank = 0;
    for (const Linear& l : linears_) rank += l.right ? 0 : l.rank;
    return rank;
}

Tensor LinearGroup::stacked_p(Device& device, ScratchScope& scope, DType dtype) const {
    Tensor stacked = scope.tensor("stacked P", dtype, left_rank(), in_);
    int64_t row = 0;
    for (const Linear& l : linears_) {
        if (l.right) continue;
        load_p(device, stacked.row_slice(row, l.rank), l);
        row += l.rank;
    }
    return stacked;
}

// Into kept_u_ where there is one.
Tensor LinearGroup::projected_input(Device& device, ScratchScope& scope, Tensor x) const {
    Tensor u = kept_u_.rows ? kept_u_.row_slice(0, x.rows) : scope.tensor("x·P", x.dtype, x.rows, left_rank());
    ScratchScope p_scope(device);
    matmul(device, u, 1.0f, x.col_slice(0, in_), Op::none, stacked_p(device, p_scope, x.dtype), Op::transpose);
    return u;
}

// dB += s·dyᵀ·(x·Pᵀ) (left), s·xᵀ·(dy·Pᵀ) (right), and where P is trained dP += s·(dy·B)ᵀ·x (left), s·(x·B)ᵀ·dy (right). The left matrices of a
// group share x, so their projections are one product.
void LinearGroup::factor_gradients(Device& device, Tensor dy, Tensor x, const BackwardPass& pass) {
    ProfileLabel label(device, "B gradients");
    const float s = scale_;
    ScratchScope scope(device);
    Tensor u;
    if (kept_u_.rows) u = kept_u_.row_slice(0, x.rows);
    else if (left_rank()) u = projected_input(device, scope, x);
    int64_t column = 0;
    for (Linear& l : linears_) {
        ScratchScope inner(device);
        const bool has = has_adapter(device, l);
        Tensor narrow = l.right ? dy.col_slice(l.row_begin, l.out) : x.col_slice(0, in_);               // on P's side, (T, h)
        Tensor wide = l.right ? x : dy.col_slice(l.row_begin, l.b.value.rows), projected;               // on B's side, (T, n)
        if (l.right) {
            Tensor p = dequantized_p(device, inner, l, dy.dtype);
            projected = inner.tensor("dy·P", dy.dtype, dy.rows, l.rank);
            if (has) matmul(device, projected, 1.0f, narrow, Op::none, p, Op::transpose);
        } else {
            projected = u.col_slice(column, l.rank);
            column += l.rank;
        }
        auto gradient = [&](Parameter& parameter, Tensor rows_side, Tensor cols_side) {  // s·rows_sideᵀ·cols_side
            if (has)
                add_gradient(device, parameter, pass.part(*config_), [&](Tensor into, int64_t row, float beta) {
                    matmul(device, into, s, rows_side.col_slice(row, into.rows), Op::transpose, cols_side, Op::none, beta);
                });
        };
        if (policy_.trains_p) {
            Tensor through_b = inner.tensor("dy·B", dy.dtype, dy.rows, l.rank);
            matmul(device, through_b, 1.0f, wide, Op::none, l.b.value, Op::none);
            gradient(l.a, through_b, narrow);
            if (pass.update) pass.update(l.a);
        }
        gradient(l.b, wide, projected);
        if (pass.update) pass.update(l.b);
    }
}

void LinearGroup::read_effective(Device& device, const Linear& l, std::vector<float>& out) {
    ScratchScope scope(device);
    Tensor w = scope.tensor("exported weights", DType::f32, l.out, l.in);
    load_w(device, w, l);
    if (policy_.adapters && has_adapter(device, l)) {
        Tensor p = dequantized_p(device, scope, l, DType::f32);
        Tensor b = scope.tensor("B in fp32", DType::f32, l.n(), l.rank);
        convert(device, b, l.b.logical(l.b.value));
        add_adapter(device, l, w, p, b, 1.0f, scale_);
    }
    out.resize(l.out * l.in);
    device.download(out.data(), w.data, w.bytes());
}

// Forward and backward of the LoQT linear layer. Re-initialisation is in loqt_merge.cpp.
#include "loqt.h"

#include "ops/elementwise.h"
#include "ops/matmul.h"
#include "runtime/profile.h"

Method method_of(const Config& config) {
    return config.method.name == "full" ? Method::full : config.method.name == "loqt-nq" ? Method::loqt_nq : Method::loqt;
}

EffectiveWeights effective_weights_of(const Config& config) {
    const std::string& name = config.train.effective_weights;
    return name == "cached" ? EffectiveWeights::cached : name == "factored" ? EffectiveWeights::factored : EffectiveWeights::rebuilt;
}

Recompute recompute_of(const Config& config) {
    const std::string& name = config.train.recompute;
    return name == "none" ? Recompute::none : name == "block" ? Recompute::block : Recompute::light;
}

bool merges_inside_backward(const Config& config) { return config.low_rank() && config.optimizer.clip == 0; }

int64_t padded_width(int64_t width) { return width % 8 == 0 ? width : round_up(width, 128); }

void LinearGroup::configure(const Config& config, int64_t in, const std::vector<Spec>& specs) {
    config_ = &config;
    method_ = method_of(config);
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
    if (method_ == Method::full) {
        table.add(group_name + ".fused", Family::trained, &fused_, act, out_padded_, in_, false, 0, in_padded());
        const std::string grad_name = group_name + ".fused.grad";
        const DType grad_dtype = gradient_dtype(config, reg.device);
        if (reg.training && updates_per_layer(config)) table.add_shared(grad_name, Family::gradients, &fused_grad_, grad_dtype, out_padded_, in_, 0, in_padded());
        else if (reg.training) table.add(grad_name, Family::gradients, &fused_grad_, grad_dtype, out_padded_, in_, false, 0, in_padded());
    } else if (method_ == Method::loqt_nq) {
        table.add(group_name + ".fused", Family::frozen, &fused_, act, out_padded_, in_, false, 0, in_padded());
    }
    const bool keeps_next = reg.training && !merges_inside_backward(config);
    for (Linear& l : linears_) {
        if (method_ == Method::full) {
            l.dense.name = l.name, l.dense.rows = l.out, l.dense.cols = l.in;
            table.add_part(l.name, &l.dense.value, &fused_, l.row_begin, l.out, l.in, l.out, true);
            if (reg.training) table.add_part(l.name + ".grad", &l.dense.grad, &fused_grad_, l.row_begin, l.out, l.in, l.out, false);
            register_moments(reg, l.dense, Precision::weight);
            continue;
        }
        if (method_ == Method::loqt) {
            register_nf4(table, l.name, Family::frozen, l.w_q, l.out, l.in, config.method.double_quant, true);
            register_nf4(table, l.name + ".P", Family::frozen, l.p_q, l.rank, l.h(), config.method.double_quant, true);
            if (keeps_next) register_nf4(table, l.name + ".P_next", Family::projection, l.next.q, l.rank, l.h(), config.method.double_quant, false);
        } else {
            table.add_part(l.name, &l.w, &fused_, l.row_begin, l.out, l.in, l.out, true);
            table.add(l.name + ".P", Family::frozen, &l.p, act, l.rank, l.h(), true);
            if (keeps_next) table.add(l.name + ".P_next", Family::projection, &l.next.p, act, l.rank, l.h(), false);
        }
        register_parameter(reg, l.b, l.name + ".B", l.n(), l.rank, Precision::adapter, padded_width(l.n()));
        l.b.active = false;
    }
    if (method_ == Method::full) return;
    if (reg.training && config.method.projection_gradient == "full" && config.micro_batches() > 1)
        table.add(group_name + ".merge_gradient", Family::projection, &merge_gradient_, DType::f32, out_padded_, in_padded(), false);
    if (reg.training && effective_weights_of(config) == EffectiveWeights::cached)
        table.add(group_name + ".effective", Family::effective, &effective_, act, out_padded_, in_padded(), false);
    if (reg.training && factored() && recompute_of(config) == Recompute::none && left_rank())
        table.add(group_name + ".xP", Family::activations, &kept_u_, act, config.train.micro_batch * config.train.seq_len, left_rank(), false);
}

void LinearGroup::initialize(Device& device, const WeightSource& source) {
    for (Linear& l : linears_) {
        ScratchScope scope(device);
        Tensor w = scope.tensor("initial weights", DType::f32, l.out, l.in);
        load_source(device, w, l, source);
        if (method_ == Method::loqt) nf4_quantize(device, l.w_q, w, nullptr);
        else convert(device, method_ == Method::full ? l.dense.value : l.w, w);
    }
    invalidate();
}

void LinearGroup::collect(std::vector<Parameter*>& parameters) {
    for (Linear& l : linears_) parameters.push_back(method_ == Method::full ? &l.dense : &l.b);
}

void LinearGroup::load_source(Device& device, Tensor w, const Linear& l, const WeightSource& source) const {
    if (!device.dry()) source(device, l.name, 0, w);
}

void LinearGroup::load_w(Device& device, Tensor w, const Linear& l) const {
    if (method_ == Method::loqt) nf4_dequantize(device, w, l.w_q);
    else convert(device, w, method_ == Method::full ? l.dense.value : l.w);
}

void LinearGroup::load_p(Device& device, Tensor p, const Linear& l) const {
    if (method_ == Method::loqt) nf4_dequantize(device, p, l.p_q);
    else convert(device, p, l.p);
}

Tensor LinearGroup::dequantized_p(Device& device, ScratchScope& scope, const Linear& l, DType dtype) const {
    if (method_ == Method::loqt_nq && dtype == l.p.dtype) return l.p;
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
    float s = float(config_->method.scale);
    for (const Linear& l : linears_) {
        if (!has_adapter(device, l)) continue;
        ScratchScope scope(device);
        Tensor p = dequantized_p(device, scope, l, w.dtype);
        Tensor slab = w.row_slice(l.row_begin, l.right ? l.out : padded_width(l.out));
        if (l.right) matmul(device, slab, s, p, Op::transpose, l.b.value, Op::transpose, 1.0f);
        else matmul(device, slab.col_slice(0, l.in), s, l.b.value, Op::none, p, Op::none, 1.0f);
    }
}

Tensor LinearGroup::effective_weight(Device& device, ScratchScope& scope) {
    if (method_ == Method::full) return Tensor{fused_.data, fused_.dtype, out_padded_, in_padded(), fused_.ld};
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
    if (method_ != Method::loqt) return Tensor{fused_.data, fused_.dtype, out_padded_, in_padded(), fused_.ld};
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
    float s = float(config_->method.scale);
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
    float s = float(config_->method.scale);
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
    if (method_ == Method::full) return weight_gradients(device, dy, x, pass);
    factor_gradients(device, dy, x, pass);
    if (pass.merges) project_gradients(device, dy, x, pass);
}

// dW += dyᵀ·x, for the whole group at once where it can go straight to where it is kept.
void LinearGroup::weight_gradients(Device& device, Tensor dy, Tensor x, const BackwardPass& pass) {
    ProfileLabel label(device, "weight gradients");
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

// dB += s·dyᵀ·(x·Pᵀ) (left), s·xᵀ·(dy·Pᵀ) (right). The left matrices of a group share x, so their projections are one product.
void LinearGroup::factor_gradients(Device& device, Tensor dy, Tensor x, const BackwardPass& pass) {
    ProfileLabel label(device, "B gradients");
    float s = float(config_->method.scale);
    ScratchScope scope(device);
    Tensor u;
    if (kept_u_.rows) u = kept_u_.row_slice(0, x.rows);
    else if (left_rank()) u = projected_input(device, scope, x);
    int64_t column = 0;
    for (Linear& l : linears_) {
        ScratchScope inner(device);
        Tensor a = dy.col_slice(l.row_begin, l.right ? l.out : l.b.value.rows), b;  // dB = s·aᵀ·b
        if (l.right) {
            Tensor p = dequantized_p(device, inner, l, dy.dtype), projected = inner.tensor("dy·P", dy.dtype, dy.rows, l.rank);
            if (has_adapter(device, l)) matmul(device, projected, 1.0f, a, Op::none, p, Op::transpose);
            a = x, b = projected;
        } else {
            b = u.col_slice(column, l.rank);
            column += l.rank;
        }
        if (has_adapter(device, l))
            add_gradient(device, l.b, pass.part(*config_), [&](Tensor into, int64_t row, float beta) {
                matmul(device, into, s, a.col_slice(row, into.rows), Op::transpose, b, Op::none, beta);
            });
        if (pass.update) pass.update(l.b);
    }
}

void LinearGroup::read_effective(Device& device, const Linear& l, std::vector<float>& out) {
    ScratchScope scope(device);
    Tensor w = scope.tensor("exported weights", DType::f32, l.out, l.in);
    load_w(device, w, l);
    if (method_ != Method::full && (l.projected || device.dry())) {
        Tensor p = dequantized_p(device, scope, l, DType::f32);
        Tensor b = scope.tensor("B in fp32", DType::f32, l.n(), l.rank);
        convert(device, b, l.b.logical(l.b.value));
        float s = float(config_->method.scale);
        if (l.right) matmul(device, w, s, p, Op::transpose, b, Op::transpose, 1.0f);
        else matmul(device, w, s, b, Op::none, p, Op::none, 1.0f);
    }
    out.resize(l.out * l.in);
    device.download(out.data(), w.data, w.bytes());
}

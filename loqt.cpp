// Forward and backward of the LoQT linear layer. Its tensors are in loqt_tensors.cpp, re-initialisation in loqt_merge.cpp.
#include "loqt.h"

#include "ops/elementwise.h"
#include "ops/matmul.h"
#include "runtime/profile.h"

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
    if (pass.last)
        for (Linear& l : linears_) pass.done(l.dense);
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
            if (pass.last) pass.done(l.a);
        }
        gradient(l.b, wide, projected);
        if (pass.last) pass.done(l.b);
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

#include "parameter.h"

#include <algorithm>

namespace {

MomentFormat format_of(const std::string& name) {
    return name == "bf16" ? MomentFormat::bf16_stochastic : name == "bf16-nearest" ? MomentFormat::bf16_nearest
         : name == "int8" ? MomentFormat::int8 : MomentFormat::fp32;
}

}  // namespace

MomentFormat moment_format(const Config& config) { return format_of(config.optimizer.moments); }

std::string embedding_moments(const Config& config) {
    const std::string &moments = config.optimizer.moments, &wanted = config.optimizer.embedding_moments;
    if (wanted == "auto") return moments == "int8" ? "fp32" : moments;
    return wanted == "bf16" && moments == "bf16-nearest" ? moments : wanted;
}

ParamRounding param_rounding(const Config& config) {
    const std::string& name = config.optimizer.rounding;
    return name == "nearest" ? ParamRounding::nearest : name == "master" ? ParamRounding::master : ParamRounding::stochastic;
}

DType gradient_dtype(const Config& config, const Device& device) {
    return device.is_cuda() && config.train.gradients != "fp32" ? DType::bf16 : DType::f32;
}

bool updates_per_layer(const Config& config) { return config.train.updates == "per_layer"; }

namespace {

MomentFormat moments_of(const Config& config, Precision precision) {
    return precision == Precision::exact ? MomentFormat::fp32 : precision == Precision::embedding ? format_of(embedding_moments(config)) : moment_format(config);
}

void register_gradient(const Registration& reg, Parameter& p, Precision precision, int64_t padded_rows) {
    const std::string name = p.name + ".grad";
    DType dtype = precision == Precision::exact ? DType::f32 : gradient_dtype(reg.config, reg.device);
    if (precision == Precision::adapter && reg.config.train.gradients == "int8" && reg.config.micro_batches() > 1) {
        int64_t n = p.rows * p.cols;
        reg.table.add(name, Family::gradients, &p.grad, DType::u8, 1, n, false);
        reg.table.add(name + ".scales", Family::gradients, &p.grad_scales, DType::f32, 1, ceil_div(n, kGradientBlock), false);
    } else if (updates_per_layer(reg.config) && precision != Precision::exact) {
        reg.table.add_shared(name, Family::gradients, &p.grad, dtype, p.rows, p.cols, padded_rows);
    } else {
        reg.table.add(name, Family::gradients, &p.grad, dtype, p.rows, p.cols, false, padded_rows);
    }
}

}  // namespace

void register_moments(const Registration& reg, Parameter& p, Precision precision) {
    if (!reg.training) return;
    TensorTable& table = reg.table;
    int64_t n = p.rows * p.cols;
    AdamState& s = p.moments;
    s.format = effective_format(moments_of(reg.config, precision), n);
    DType dtype = s.format == MomentFormat::fp32 ? DType::f32 : s.format == MomentFormat::int8 ? DType::u8 : DType::bf16;
    table.add(p.name + ".adam_m", Family::moments, &s.m, dtype, 1, n, true);
    table.add(p.name + ".adam_v", Family::moments, &s.v, dtype, 1, n, true);
    if (s.format == MomentFormat::int8) {
        table.add(p.name + ".adam_m.absmax", Family::moments, &s.m_absmax, DType::f32, 1, ceil_div(n, kAdamBlock), true);
        table.add(p.name + ".adam_v.absmax", Family::moments, &s.v_absmax, DType::f32, 1, ceil_div(n, kAdamBlock), true);
    }
    if (param_rounding(reg.config) == ParamRounding::master && reg.device.is_cuda() && precision != Precision::exact)
        table.add(p.name + ".master", Family::moments, &s.correction, DType::i16, 1, n, true);
}

void register_parameter(const Registration& reg, Parameter& p, const std::string& name, int64_t rows, int64_t cols, Precision precision,
                        int64_t padded_rows) {
    p.name = name, p.rows = rows, p.cols = cols;
    DType dtype = precision == Precision::exact ? DType::f32 : reg.device.activation_dtype();
    reg.table.add(name, Family::trained, &p.value, dtype, rows, cols, true, padded_rows);
    if (!reg.training) return;
    register_gradient(reg, p, precision, padded_rows);
    register_moments(reg, p, precision);
}

// ---- Gradients

namespace {

constexpr int64_t kSlabBytes = int64_t(64) << 20;  // of a gradient in fp32, on its way to a sum in fewer bits
constexpr uint32_t kGradientStream = 0x40000000;   // apart from the optimizer's streams, which count from 0

}  // namespace

RoundingDraws gradient_draws(const Parameter& p, const GradientPart& part, uint64_t begin) {
    return RoundingDraws{part.seed, kGradientStream + p.stream, part.number, begin};
}

void add_gradient(Device& device, const Parameter& p, const GradientPart& part, const std::function<void(Tensor, int64_t, float)>& product) {
    const bool codes = p.grad.dtype == DType::u8;
    if (p.grad.dtype == DType::f32 || (part.only && !codes)) return product(p.grad, 0, part.first ? 0.0f : 1.0f);
    const int64_t padded_rows = p.value.rows;
    const int64_t slab = codes ? padded_rows : std::min(std::max<int64_t>(8, kSlabBytes / (p.cols * int64_t(sizeof(float))) / 8 * 8), padded_rows);
    for (int64_t begin = 0; begin < padded_rows; begin += slab) {
        ScratchScope scope(device);
        Tensor g = scope.tensor("gradient in fp32", DType::f32, std::min(slab, padded_rows - begin), p.cols);
        product(g, begin, 0.0f);
        Tensor logical = g.row_slice(0, std::min(g.rows, p.rows - begin));
        if (logical.rows <= 0) continue;  // padding, which stays zero
        Tensor sum = codes ? p.grad : Tensor{p.grad.at(begin, 0), p.grad.dtype, logical.rows, p.cols, p.grad.ld};
        add_to_gradient_sum(device, {sum, p.grad_scales}, logical, part.first, gradient_draws(p, part, uint64_t(begin * p.cols)));
    }
}

Tensor load_gradient(Device& device, ScratchScope& scope, const Parameter& p) {
    if (p.grad.dtype != DType::u8) return p.logical(p.grad);
    Tensor g = scope.tensor("gradient in fp32", DType::f32, p.rows, p.cols);
    load_gradient_sum(device, g, {p.grad, p.grad_scales});
    return g;
}

AdamStep adam_step(const Config& config, const Parameter& p, double lr, double grad_scale, int64_t step) {
    const OptimizerConfig& o = config.optimizer;
    ParamRounding rounding = p.value.dtype == DType::bf16 ? param_rounding(config) : ParamRounding::nearest;
    return AdamStep{lr, o.beta1, o.beta2, o.eps, o.weight_decay, p.updates + 1, float(grad_scale), rounding, uint64_t(config.train.seed), p.stream, uint32_t(step)};
}

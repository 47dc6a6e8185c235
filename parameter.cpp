#include "parameter.h"

MomentFormat moment_format(const Config& config) {
    const std::string& name = config.optimizer.moments;
    return name == "bf16" ? MomentFormat::bf16_stochastic : name == "bf16-nearest" ? MomentFormat::bf16_nearest
         : name == "int8" ? MomentFormat::int8 : MomentFormat::fp32;
}

ParamRounding param_rounding(const Config& config) {
    const std::string& name = config.optimizer.rounding;
    return name == "nearest" ? ParamRounding::nearest : name == "master" ? ParamRounding::master : ParamRounding::stochastic;
}

DType gradient_dtype(const Config& config, const Device& device) {
    return device.is_cuda() && config.train.gradients == "bf16" ? DType::bf16 : DType::f32;
}

void register_moments(const Registration& reg, Parameter& p, Precision precision) {
    if (!reg.training) return;
    TensorTable& table = reg.table;
    int64_t n = p.rows * p.cols;
    MomentFormat wanted = moment_format(reg.config);
    if (precision == Precision::all32 || (precision == Precision::moments32 && wanted == MomentFormat::int8)) wanted = MomentFormat::fp32;
    AdamState& s = p.moments;
    s.format = effective_format(wanted, n);
    DType dtype = s.format == MomentFormat::fp32 ? DType::f32 : s.format == MomentFormat::int8 ? DType::u8 : DType::bf16;
    table.add(p.name + ".adam_m", Family::moments, &s.m, dtype, 1, n, true);
    table.add(p.name + ".adam_v", Family::moments, &s.v, dtype, 1, n, true);
    if (s.format == MomentFormat::int8) {
        table.add(p.name + ".adam_m.absmax", Family::moments, &s.m_absmax, DType::f32, 1, ceil_div(n, kAdamBlock), true);
        table.add(p.name + ".adam_v.absmax", Family::moments, &s.v_absmax, DType::f32, 1, ceil_div(n, kAdamBlock), true);
    }
    if (param_rounding(reg.config) == ParamRounding::master && reg.device.is_cuda() && precision != Precision::all32)
        table.add(p.name + ".master", Family::moments, &s.correction, DType::i16, 1, n, true);
}

void register_parameter(const Registration& reg, Parameter& p, const std::string& name, int64_t rows, int64_t cols, Precision precision,
                        int64_t padded_rows) {
    p.name = name, p.rows = rows, p.cols = cols;
    bool exact = precision == Precision::all32;
    reg.table.add(name, Family::trained, &p.value, exact ? DType::f32 : reg.device.activation_dtype(), rows, cols, true, padded_rows);
    if (!reg.training) return;
    reg.table.add(name + ".grad", Family::gradients, &p.grad, exact ? DType::f32 : gradient_dtype(reg.config, reg.device), rows, cols, false, padded_rows);
    register_moments(reg, p, precision);
}

AdamStep adam_step(const Config& config, const Parameter& p, double lr, double grad_scale, int64_t step) {
    const OptimizerConfig& o = config.optimizer;
    ParamRounding rounding = p.value.dtype == DType::bf16 ? param_rounding(config) : ParamRounding::nearest;
    return AdamStep{lr, o.beta1, o.beta2, o.eps, o.weight_decay, p.updates + 1, float(grad_scale), rounding, uint64_t(config.train.seed), p.stream, uint32_t(step)};
}

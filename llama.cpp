// The model: tensors, forward, backward. See llama.h.
#include "llama.h"

#include <algorithm>

#include "comm/communicator.h"
#include "ops/cross_entropy.h"
#include "ops/elementwise.h"
#include "ops/embedding.h"
#include "ops/matmul.h"
#include "ops/rmsnorm.h"
#include "ops/rope.h"
#include "ops/swiglu.h"
#include "runtime/profile.h"

namespace {

constexpr int64_t kPieceBytes = int64_t(32) << 20;
// The LM head runs over chunks of tokens. Its products are fastest with about 8,000 rows (measured on an H200); a chunk's logits are to
// stay small beside the activations of the micro-batch, though.
constexpr int64_t kLeastLogitsBytes = int64_t(128) << 20, kMostLogitsBytes = int64_t(512) << 20, kLogitsShare = 16;

Tensor first_rows(const Tensor& t, int64_t rows) { return t.row_slice(0, rows); }
Tensor first_cols(const Tensor& t, int64_t cols) { return t.col_slice(0, cols); }

}  // namespace

BlockActivations BlockActivations::first(int64_t tokens, int64_t heads) const {
    BlockActivations a;
    a.x_mid = first_rows(x_mid, tokens), a.rstd1 = first_cols(rstd1, tokens), a.rstd2 = first_cols(rstd2, tokens);
    a.q_k_v = first_rows(q_k_v, tokens), a.attention = first_rows(attention, tokens), a.lse = first_cols(lse, tokens * heads);
    a.gates = first_rows(gates, tokens);
    if (normed1.rows) a.normed1 = first_rows(normed1, tokens), a.normed2 = first_rows(normed2, tokens), a.swiglu = first_rows(swiglu, tokens);
    return a;
}

Llama::Llama(const Config& config, Device& device, bool training)
    : config_(config), device_(device), capacity_(config.train.micro_batch * config.train.seq_len) {
    int64_t hd = config.model.head_dim();
    if (device.is_cuda() && hd != 64 && hd != 128)
        throw UserError(format("model.heads: %lld heads of %lld; on a GPU heads must have size 64 or 128; change model.heads, or --device cpu", (long long)config.model.heads, (long long)hd));
    register_tensors(training);
    assign_owners();
    // The order of this list numbers the random streams: it must never depend on the method's details of storage.
    parameters_ = {&embedding_};
    for (Block& b : blocks_) {
        parameters_.push_back(&b.norm1);
        b.qkv.collect(parameters_), b.o.collect(parameters_);
        parameters_.push_back(&b.norm2);
        b.gate_up.collect(parameters_), b.down.collect(parameters_);
    }
    parameters_.push_back(&final_norm_), parameters_.push_back(&head_);
    for (size_t i = 0; i < parameters_.size(); ++i) parameters_[i]->stream = uint32_t(i);
}

void Llama::register_tensors(bool training) {
    const ModelConfig& m = config_.model;
    Registration reg{table_, device_, config_, training};
    DType act = device_.activation_dtype();
    int64_t T = capacity_, hd = m.head_dim(), q = m.heads * hd, kv = config_.kv_heads() * hd, f = padded_width(m.intermediate);

    register_parameter(reg, embedding_, "model.embed_tokens.weight", m.vocab, m.hidden, Precision::embedding);
    const Recompute recompute = recompute_of(config_);
    blocks_.resize(m.layers);
    activations_.resize(!training || recompute == Recompute::block ? 1 : m.layers);  // without a backward pass nothing needs to stay
    for (int64_t i = 0; i < m.layers; ++i) {
        Block& b = blocks_[i];
        std::string prefix = "model.layers." + std::to_string(i) + ".";
        register_parameter(reg, b.norm1, prefix + "input_layernorm.weight", 1, m.hidden, Precision::exact);
        b.qkv.configure(config_, m.hidden, {{prefix + "self_attn.q_proj.weight", q}, {prefix + "self_attn.k_proj.weight", kv}, {prefix + "self_attn.v_proj.weight", kv}});
        b.o.configure(config_, q, {{prefix + "self_attn.o_proj.weight", m.hidden}});
        register_parameter(reg, b.norm2, prefix + "post_attention_layernorm.weight", 1, m.hidden, Precision::exact);
        b.gate_up.configure(config_, m.hidden, {{prefix + "mlp.gate_proj.weight", m.intermediate}, {prefix + "mlp.up_proj.weight", m.intermediate}});
        b.down.configure(config_, m.intermediate, {{prefix + "mlp.down_proj.weight", m.hidden}});
        for (LinearGroup* group : {&b.qkv, &b.o, &b.gate_up, &b.down}) group->register_tensors(reg);

        auto activation = [&](const char* name, Tensor* t, DType dtype, int64_t rows, int64_t cols) {
            table_.add(prefix + name, Family::activations, t, dtype, rows, cols, false);
        };
        activation("x", &b.x, act, T, m.hidden);
        const bool shared = i >= int64_t(activations_.size());
        BlockActivations& kept = shared ? activations_[0] : activations_[i];
        b.kept = &kept;
        if (shared) continue;
        activation("x_mid", &kept.x_mid, act, T, m.hidden);
        activation("rstd1", &kept.rstd1, DType::f32, 1, T), activation("rstd2", &kept.rstd2, DType::f32, 1, T);
        activation("qkv", &kept.q_k_v, act, T, q + 2 * kv);
        activation("attention", &kept.attention, act, T, q), activation("lse", &kept.lse, DType::f32, 1, T * m.heads);
        activation("gate_up", &kept.gates, act, T, 2 * f);
        if (!training || recompute != Recompute::none) continue;
        activation("normed1", &kept.normed1, act, T, m.hidden), activation("normed2", &kept.normed2, act, T, m.hidden);
        activation("swiglu", &kept.swiglu, act, T, f);
    }
    register_parameter(reg, final_norm_, "model.norm.weight", 1, m.hidden, Precision::exact);
    register_parameter(reg, head_, "lm_head.weight", m.vocab, m.hidden, Precision::embedding);

    table_.add("x_final", Family::activations, &x_final_, act, T, m.hidden, false);
    table_.add("final_rstd", Family::activations, &final_rstd_, DType::f32, 1, T, false);
    table_.add("rope", Family::activations, &rope_, DType::f32, config_.train.seq_len, hd, false);
    for (auto& [name, t] : {std::pair<const char*, Tensor*>{"tokens", &batch_.tokens}, {"targets", &batch_.targets}, {"order", &batch_.order},
                            {"segment_begin", &batch_.segment_begin}, {"group_begin", &batch_.group_begin}, {"group_token", &batch_.group_token}})
        table_.add(std::string("batch.") + name, Family::activations, t, DType::i32, 1, T + 1, false);
}

void Llama::upload_rope() {
    if (device_.dry()) return;
    std::vector<float> table = rope_table(config_.train.seq_len, config_.model.head_dim(), config_.model.rope_base);
    device_.upload(rope_.data, table.data(), int64_t(table.size() * sizeof(float)));
}

void Llama::initialize(const WeightSource& source) {
    auto fill = [&](Parameter& p) {
        // In pieces: the fp32 form of an embedding must not become the largest thing in scratch.
        int64_t step = std::max<int64_t>(1, kPieceBytes / (p.cols * int64_t(sizeof(float))));
        for (int64_t begin = 0; begin < p.rows; begin += step) {
            ScratchScope scope(device_);
            Tensor piece = scope.tensor("initial weights", DType::f32, std::min(step, p.rows - begin), p.cols);
            if (!device_.dry()) source(device_, p.name, begin, piece);
            convert(device_, p.value.row_slice(begin, piece.rows), piece);
        }
    };
    fill(embedding_), fill(final_norm_), fill(head_);
    for (Block& b : blocks_) fill(b.norm1), fill(b.norm2);
    for (LinearGroup* group : groups()) group->initialize(device_, source);
    if (config_.method.name != "loftq" || !device_.communicator()) return;
    for (LinearGroup* group : groups()) group->share_initial(device_);
    device_.communicator()->finish();
}

std::vector<LinearGroup*> Llama::groups() {
    std::vector<LinearGroup*> all;
    for (Block& b : blocks_)
        for (LinearGroup* group : {&b.qkv, &b.o, &b.gate_up, &b.down}) all.push_back(group);
    return all;
}

AttentionShape Llama::attention_shape(int64_t rows, int64_t seq) const {
    return AttentionShape{rows, seq, config_.model.heads, config_.kv_heads(), config_.model.head_dim()};
}

void Llama::upload_batch(const Batch& batch) {
    CHECK_INTERNAL(batch.rows * batch.seq <= capacity_, "micro-batch of %lld × %lld tokens", (long long)batch.rows, (long long)batch.seq);
    auto upload = [&](Tensor t, const std::vector<int32_t>& v) { device_.upload_async(t.data, v.data(), int64_t(v.size() * sizeof(int32_t))); };
    upload(batch_.tokens, batch.tokens), upload(batch_.targets, batch.targets);
    upload(batch_.order, batch.groups.order), upload(batch_.segment_begin, batch.groups.segment_begin);
    upload(batch_.group_begin, batch.groups.group_begin), upload(batch_.group_token, batch.groups.group_token);
}

// ---------------------------------------------------------------------------------------------------------------- forward

void Llama::block_forward(Block& b, Tensor x_out, int64_t T, const AttentionShape& shape) {
    const ModelConfig& m = config_.model;
    const BlockActivations kept = b.kept->first(T, m.heads);
    Tensor x = first_rows(b.x, T);
    float eps = float(m.rms_eps);
    auto kept_or = [&](ScratchScope& scope, Tensor t, const char* what, int64_t cols) { return t.rows ? t : scope.tensor(what, x.dtype, T, cols); };
    {
        ScratchScope scope(device_);
        Tensor normed = kept_or(scope, kept.normed1, "normed", m.hidden);
        rmsnorm_forward(device_, normed, kept.rstd1, x, b.norm1.value, eps);
        b.qkv.forward(device_, kept.q_k_v, normed);
    }
    rope_inplace(device_, kept.q_k_v, rope_, shape.seq, shape.heads, shape.kv_heads, shape.head_dim, false);
    attention_forward(device_, kept.attention, kept.lse, kept.q_k_v, shape);
    b.o.forward(device_, kept.x_mid, kept.attention, x);
    {
        ScratchScope scope(device_);
        Tensor normed = kept_or(scope, kept.normed2, "normed", m.hidden);
        rmsnorm_forward(device_, normed, kept.rstd2, kept.x_mid, b.norm2.value, eps);
        b.gate_up.forward(device_, kept.gates, normed);
    }
    if (!x_out.rows) return;
    ScratchScope scope(device_);
    Tensor a = kept_or(scope, kept.swiglu, "swiglu", b.down.in_padded());
    swiglu_forward(device_, a, kept.gates);
    b.down.forward(device_, x_out, a, kept.x_mid);
}

Tensor Llama::forward(int64_t rows, int64_t seq) {
    int64_t T = rows * seq;
    AttentionShape shape = attention_shape(rows, seq);
    embedding_forward(device_, first_rows(blocks_[0].x, T), embedding_.value, batch_.tokens.as<int32_t>());
    for (size_t i = 0; i < blocks_.size(); ++i) {
        Tensor next = i + 1 < blocks_.size() ? blocks_[i + 1].x : x_final_;
        block_forward(blocks_[i], first_rows(next, T), T, shape);
    }
    return first_rows(x_final_, T);
}

// Final norm, LM head and loss over chunks of tokens; with a pass, gradients of both and of x (written to dx).
void Llama::head(Tensor x, Tensor dx, float loss_scale, double* sums, int64_t slot, const BackwardPass* pass) {
    const ModelConfig& m = config_.model;
    ProfileLabel label(device_, "LM head");
    int64_t T = x.rows, V = m.vocab;
    int64_t row_bytes = V * size_of(x.dtype), logits_bytes = std::clamp(capacity_ * row_bytes / kLogitsShare, kLeastLogitsBytes, kMostLogitsBytes);
    int64_t chunk = std::max<int64_t>(64, logits_bytes / row_bytes / 64 * 64);
    // The stack is sized for a full micro-batch; a smaller one must not need more.
    chunk = std::min(chunk, capacity_);
    ScratchScope scope(device_);
    Tensor losses = scope.tensor("losses", DType::f32, 1, T);
    Tensor normed = scope.tensor("normed", x.dtype, T, m.hidden);
    rmsnorm_forward(device_, normed, first_cols(final_rstd_, T), x, final_norm_.value, float(m.rms_eps));
    Tensor d_normed = pass ? scope.tensor("gradient of normed", x.dtype, T, m.hidden) : Tensor{};
    Tensor logits_buffer = scope.tensor("logits", x.dtype, chunk, V);
    for (int64_t begin = 0; begin < T; begin += chunk) {
        int64_t count = std::min(chunk, T - begin);
        Tensor logits = first_rows(logits_buffer, count), in = normed.row_slice(begin, count);
        matmul(device_, logits, 1.0f, in, Op::none, head_.value, Op::transpose);
        cross_entropy(device_, losses.col_slice(begin, count), logits, batch_.targets.as<int32_t>() + begin, loss_scale, bool(pass));
        if (!pass) continue;
        matmul(device_, d_normed.row_slice(begin, count), 1.0f, logits, Op::none, head_.value, Op::none);
        add_gradient(device_, head_, pass->part(config_, begin / chunk, ceil_div(T, chunk)), [&](Tensor into, int64_t row, float beta) {
            matmul(device_, into, 1.0f, logits.col_slice(row, into.rows), Op::transpose, in, Op::none, beta);
        });
    }
    sum(device_, sums, slot, losses);
    if (pass) rmsnorm_backward(device_, dx, final_norm_.grad, d_normed, x, final_norm_.value, first_cols(final_rstd_, T), Tensor{}, false);
}

// ---------------------------------------------------------------------------------------------------------------- backward

void Llama::block_backward(Block& b, Tensor dx, int64_t T, const AttentionShape& shape, const BackwardPass& pass) {
    const ModelConfig& m = config_.model;
    const BlockActivations kept = b.kept->first(T, m.heads);
    Tensor x = first_rows(b.x, T);
    // Every group's input gradient comes first: the kernel that takes it further back through SwiGLU or RMSNorm makes the group's input
    // again on the way, unless it was kept, and writes it in place of that gradient, where the gradient of the weights then finds it.
    auto group_input = [](Tensor kept_input, Tensor gradient) { return kept_input.rows ? kept_input : gradient; };
    auto made_again = [](Tensor kept_input, Tensor gradient) { return kept_input.rows ? Tensor{} : gradient; };
    {   // SwiGLU half: the gradient of gate|up takes the place of gate|up.
        ScratchScope scope(device_);
        Tensor a = scope.tensor("gradient of swiglu, then swiglu", x.dtype, T, b.down.in_padded());
        b.down.input_gradient(device_, a, dx);
        swiglu_backward(device_, kept.gates, kept.gates, a, made_again(kept.swiglu, a));
        b.down.parameter_gradients(device_, dx, group_input(kept.swiglu, a), pass);
    }
    {
        ScratchScope scope(device_);
        Tensor normed = scope.tensor("gradient of normed, then normed", x.dtype, T, m.hidden);
        b.gate_up.input_gradient(device_, normed, kept.gates);
        rmsnorm_backward(device_, dx, b.norm2.grad, normed, kept.x_mid, b.norm2.value, kept.rstd2, made_again(kept.normed2, normed));
        b.gate_up.parameter_gradients(device_, kept.gates, group_input(kept.normed2, normed), pass);
    }
    // Attention half.
    ScratchScope scope(device_);
    Tensor d_qkv = scope.tensor("gradient of q|k|v", x.dtype, T, kept.q_k_v.cols);
    {
        ScratchScope inner(device_);
        Tensor d_attention = inner.tensor("gradient of attention", x.dtype, T, kept.attention.cols);
        b.o.input_gradient(device_, d_attention, dx);
        b.o.parameter_gradients(device_, dx, kept.attention, pass);
        attention_backward(device_, d_qkv, d_attention, kept.q_k_v, kept.attention, kept.lse, shape, rope_);
    }
    Tensor normed = scope.tensor("gradient of normed, then normed", x.dtype, T, m.hidden);
    b.qkv.input_gradient(device_, normed, d_qkv);
    rmsnorm_backward(device_, dx, b.norm1.grad, normed, x, b.norm1.value, kept.rstd1, made_again(kept.normed1, normed));
    b.qkv.parameter_gradients(device_, d_qkv, group_input(kept.normed1, normed), pass);
}

void Llama::embedding_gradient(Tensor dx, const Batch& batch, const BackwardPass& pass) {
    // In a place shared with other gradients there is something else by now.
    if (updates_per_layer(config_)) device_.zero(embedding_.grad);
    // On a dry device the counts of the groups are the worst case.
    int64_t T = dx.rows, most_groups = std::min(T, config_.model.vocab), most_segments = std::min(T, most_groups + T / kEmbeddingSegment);
    int64_t segments = device_.dry() ? most_segments : int64_t(batch.groups.segment_begin.size()) - 1;
    int64_t distinct = device_.dry() ? most_groups : int64_t(batch.groups.group_token.size());
    DeviceTokenGroups groups{batch_.order.as<int32_t>(), batch_.segment_begin.as<int32_t>(), batch_.group_begin.as<int32_t>(),
                             batch_.group_token.as<int32_t>(), segments, distinct};
    embedding_backward(device_, embedding_.grad, dx, groups, gradient_draws(embedding_, pass.part(config_)));
    if (pass.last) pass.done(embedding_);
}

void Llama::train(const Batch& batch, float loss_scale, double* sums, int64_t slot, const BackwardPass& pass) {
    upload_batch(batch);
    int64_t T = batch.rows * batch.seq;
    AttentionShape shape = attention_shape(batch.rows, batch.seq);
    Tensor x = forward(batch.rows, batch.seq);
    ScratchScope scope(device_);
    Tensor dx = scope.tensor("gradient of the residual stream", x.dtype, T, config_.model.hidden);
    head(x, dx, loss_scale, sums, slot, &pass);
    if (pass.update && !pass.may_update()) return;
    if (pass.last) pass.done(head_);
    for (size_t i = blocks_.size(); i-- > 0;) {
        // What the forward pass of the last block left is still there.
        bool gone = activations_.size() < blocks_.size() && i + 1 < blocks_.size();
        if (gone) block_forward(blocks_[i], Tensor{}, T, shape);
        block_backward(blocks_[i], dx, T, shape, pass);
    }
    embedding_gradient(dx, batch, pass);
}

void Llama::evaluate(const Batch& batch, double* sums, int64_t slot) {
    upload_batch(batch);
    head(forward(batch.rows, batch.seq), Tensor{}, 0.0f, sums, slot, nullptr);
}

std::vector<float> Llama::next_token_logits(const std::vector<int32_t>& tokens) {
    const ModelConfig& m = config_.model;
    int64_t T = int64_t(tokens.size());
    device_.upload(batch_.tokens.data, tokens.data(), T * int64_t(sizeof(int32_t)));
    Tensor x = forward(1, T).row_slice(T - 1, 1);
    ScratchScope scope(device_);
    Tensor normed = scope.tensor("normed", x.dtype, 1, m.hidden), logits = scope.tensor("logits", x.dtype, 1, m.vocab);
    Tensor wide = scope.tensor("logits in fp32", DType::f32, 1, m.vocab);
    rmsnorm_forward(device_, normed, first_cols(final_rstd_, 1), x, final_norm_.value, float(m.rms_eps));
    matmul(device_, logits, 1.0f, normed, Op::none, head_.value, Op::transpose);
    convert(device_, wide, logits);
    std::vector<float> host(m.vocab);
    device_.download(host.data(), wide.data, wide.bytes());
    return host;
}

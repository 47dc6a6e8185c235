// LLaMA (Touvron et al. 2023): pre-norm blocks of RMSNorm → attention with rotary embedding → RMSNorm → SwiGLU, untied LM head.
// One code path for both devices; every product goes through LinearGroup, so a method is a policy of that layer alone.
//
// Shapes: T = batch·seq tokens of a micro-batch, h hidden, f intermediate (padded in memory), q = heads·hd, kv = kv_heads·hd, V vocab.
// Kept for the backward pass per block (train.recompute):
//   light   x, q|k|v after rotation, attention output and its LSE, x_mid, gate|up, and two ρ per token
//   none    the outputs of both norms and of SwiGLU as well
//   block   x; all else of one block at a time, made again from it
#pragma once
#include <memory>

#include "loqt.h"
#include "ops/attention.h"
#include "runtime/data.h"

// What a block's forward pass leaves for its backward pass, beside its input.
struct BlockActivations {
    Tensor x_mid;                        // (T, h)      residual stream into the second half
    Tensor rstd1, rstd2;                 // (1, T) fp32
    Tensor q_k_v;                        // (T, q + 2kv)
    Tensor attention, lse;               // (T, q), (1, heads·T) fp32
    Tensor gates;                        // (T, 2f)
    Tensor normed1, normed2, swiglu;     // (T, h), (T, h), (T, f): recompute none only

    BlockActivations first(int64_t tokens, int64_t heads) const;  // of the first tokens
};

struct Block {
    Parameter norm1, norm2;              // (1, h) fp32
    LinearGroup qkv, o, gate_up, down;
    Tensor x;                            // (T, h)      residual stream into the block
    BlockActivations* kept = nullptr;    // its own, or all blocks' with recompute block
};

// Tokens of a micro-batch on the device.
struct DeviceBatch {
    Tensor tokens, targets, order, segment_begin, group_begin, group_token;  // (1, T or T+1) int32
};

class Llama {
  public:
    // train.micro_batch must be resolved. Throws UserError for a head size that the device's attention does not have.
    Llama(const Config& config, Device& device, bool training);
    Llama(const Llama&) = delete;

    TensorTable& table() { return table_; }
    const Config& config() const { return config_; }
    const std::vector<Parameter*>& parameters() const { return parameters_; }

    // Takes the memory of all tensors. Scratch is the caller's to reserve.
    void allocate() { table_.allocate(device_); upload_rope(); }
    void initialize(const WeightSource& source);

    // Forward and backward of one micro-batch: gradients accumulate, Σ loss over counted targets goes to sums[slot] (device f64).
    // loss_scale multiplies the gradient: 1/(counted targets of the whole step). Does not wait (but for pass.may_update): the batch must live
    // until the device is synchronized.
    void train(const Batch& batch, float loss_scale, double* sums, int64_t slot, const BackwardPass& pass);
    // Forward only. The batch must live as for train.
    void evaluate(const Batch& batch, double* sums, int64_t slot);
    // Logits of the token after `tokens` (1 to seq_len of them), as fp32 on the host.
    std::vector<float> next_token_logits(const std::vector<int32_t>& tokens);

    // Of what adds to its gradient even in the first micro-batch: embedding and norms.
    void zero_gradients();
    // Trained values changed.
    void invalidate();
    // Merges every matrix that the backward pass has not merged already. source: the true initial weights, for matrices that merge for the first time; may be null once all have.
    MergeStatistics merge(int64_t step, const WeightSource* source);
    // galore, ordinary updates: the new projections of a step that makes them anew, before its update.
    void refresh_projections(int64_t step);
    // Matrices that have P and B (full: none ever has).
    int64_t projected_matrices();
    int64_t matrices();

    // Every tensor of the equivalent plain LLaMA under its Hugging Face name, merged and unpadded.
    struct ExportedTensor {
        std::string name;
        std::vector<int64_t> shape;
        std::function<void(std::vector<float>&)> read;
    };
    std::vector<ExportedTensor> exported_tensors();

    std::vector<LinearGroup*> groups();

  private:
    void assign_owners();
    void share_remade(const char* what);
    void register_tensors(bool training);
    void upload_rope();
    void upload_batch(const Batch& batch);
    Tensor forward(int64_t rows, int64_t seq);  // → (T, h) output of the last block
    // x_out empty: only as far as the backward pass needs it.
    void block_forward(Block& b, Tensor x_out, int64_t T, const AttentionShape& shape);
    void block_backward(Block& b, Tensor dx, int64_t T, const AttentionShape& shape, const BackwardPass& pass);
    // pass: null for the loss alone.
    void head(Tensor x, Tensor dx, float loss_scale, double* sums, int64_t slot, const BackwardPass* pass);
    void embedding_gradient(Tensor dx, const Batch& batch, const BackwardPass& pass);
    AttentionShape attention_shape(int64_t rows, int64_t seq) const;

    const Config config_;
    Device& device_;
    TensorTable table_;
    int64_t capacity_;                   // tokens per micro-batch the activations hold
    Parameter embedding_, final_norm_, head_;
    std::vector<Block> blocks_;
    std::vector<BlockActivations> activations_;  // one per block, or one
    Tensor rope_;                        // (seq_len, hd) fp32
    Tensor x_final_, final_rstd_;        // (T, h), (1, T): input of the final norm
    DeviceBatch batch_;
    std::vector<Parameter*> parameters_;
};

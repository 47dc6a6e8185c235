// The LoQT linear layer: y = x·W_effᵀ with W_eff = deq(W_q) + s·P·B, its gradient, and its re-initialisation (LoQT, Algorithm 1 and 2).
//
// Matrices are stored as Hugging Face stores them, (out, in). P lies on the narrower side h of the matrix (ties: input), B on the wider n:
//   left  (h = in)    W_eff = W + s·B·P       W: (n, h)
//   right (h = out)   W_eff = W + s·(B·P)ᵀ    W: (h, n)
// with P: (r, h), its rows the leading singular vectors of the gradient on side h, and B: (n, r), the only trained part.
// Side n is padded in memory to a multiple of 128 where it is not one of 8 (odd widths halve a tensor core's speed or worse);
// padding holds zeros and never reaches a file, a scale block or a moment.
//
// The other methods are the same layer under another policy: `full` trains W itself and has no P and B; `loqt-nq` keeps W and P in bf16.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "nf4.h"
#include "parameter.h"
#include "projection.h"

enum class Method { full, loqt, loqt_nq };
Method method_of(const Config& config);

// How a low-rank method multiplies by W_eff = W + s·P·B (train.effective_weights):
//   cached    W_eff in bf16, formed once per optimizer step and kept: the fewest FLOPs, 2 bytes per weight
//   rebuilt   formed for every use in scratch memory: cheap when a micro-batch has more than about a thousand tokens
//   factored  never formed: x·W + s·(x·P)·B: more FLOPs per token, none per weight, for small micro-batches
enum class EffectiveWeights { cached, rebuilt, factored };
EffectiveWeights effective_weights_of(const Config& config);  // auto that was never resolved (export, sampling): rebuilt

// Writes rows row_begin, row_begin + 1, … of the matrix `name` (Hugging Face name and orientation) to `rows`, f32 (any number, cols) on the
// device: random initialisation or an imported model. Called again at the first merge, which starts from the true weights and not from
// their NF4 round trip.
using WeightSource = std::function<void(Device& device, const std::string& name, int64_t row_begin, Tensor rows)>;

int64_t padded_width(int64_t width);  // width if a multiple of 8, else the next multiple of 128

struct Linear {
    std::string name;                 // model.layers.3.mlp.up_proj.weight
    int64_t out = 0, in = 0;          // logical
    int64_t row_begin = 0;            // first row of this matrix in its group's fused matrix
    bool right = false;
    int64_t rank = 0;
    bool projected = false;           // P and B exist (from the first re-initialisation on)

    Nf4Tensor w_q, p_q, p_next_q;     // loqt
    Tensor w;                         // loqt-nq: (out, in), part of the group's fused matrix
    Tensor p, p_next;                 // loqt-nq: (r, h)
    Parameter b;                      // (n, r)
    Parameter dense;                  // full: W as a parameter
    bool next_ready = false;          // p_next holds this merge step's projection
    float captured_energy = 0;
    double quant_error = 0, plain_quant_error = 0;  // of the last merge
    double projection_seconds = 0;

    int64_t h() const { return right ? out : in; }
    int64_t n() const { return right ? in : out; }
};

// What a merge did, summed over matrices.
struct MergeStatistics {
    int matrices = 0, failed = 0;     // failed: gradient zero, not finite, or no convergence; the old P stays
    double quant_error = 0;           // Σ ‖W − W_eff‖/‖W‖ after compensation
    double plain_quant_error = 0;     // Σ the same without compensation
    double captured_energy = 0;       // Σ ‖P·G‖²/‖G‖²
    double projection_seconds = 0;    // spent on dense gradients and singular vectors during the backward pass
};

// How the current backward pass is to treat a merge.
struct ProjectionPass {
    bool active = false;              // this step merges
    bool first = true, last = true;   // micro-batch of the step
    bool whole_batch = false;         // gradients of all micro-batches are summed
    int64_t step = 0;
};

// The matrices that share one input: q,k,v · o · gate,up · down. One GEMM forward, one for dx.
class LinearGroup {
  public:
    struct Spec {
        std::string name;
        int64_t out;
    };
    // in: width of the shared input; specs: name and width of every matrix. Sets shapes only. config must outlive the group.
    void configure(const Config& config, int64_t in, const std::vector<Spec>& specs);
    void register_tensors(const Registration& reg);
    void initialize(Device& device, const WeightSource& source);

    int64_t in_padded() const { return padded_width(in_); }
    int64_t out_padded() const { return out_padded_; }
    std::vector<Linear>& linears() { return linears_; }
    const std::vector<Linear>& linears() const { return linears_; }
    void collect(std::vector<Parameter*>& parameters);

    // y = x·W_effᵀ + residual (residual may be empty).  x: (T, in_padded), y: (T, out_padded).
    void forward(Device& device, Tensor y, Tensor x, Tensor residual = {});
    // dx = dy·W_eff (written).
    void input_gradient(Device& device, Tensor dx, Tensor dy);
    // Gradients of B (or W) accumulate; on a merge step the new projections are computed into p_next.
    void parameter_gradients(Device& device, Tensor dy, Tensor x, const ProjectionPass& pass);
    // After the optimizer's update of a merge step: merge s·P·B into W, requantize with compensation, install p_next. Where the device has
    // workers they do it, and the caller waits for them before finish_reinitialization.
    // source: the true weights, for matrices that merge for the first time; may be null once all have.
    void start_reinitialization(Device& device, int64_t step, const WeightSource* source);
    void finish_reinitialization(MergeStatistics& statistics);
    // The trained state changed: cached effective weights are stale.
    void invalidate() { effective_fresh_ = false; }
    // W_eff of one matrix in fp32, row-major out × in, to the host (export, tests).
    void read_effective(Device& device, const Linear& linear, std::vector<float>& out);

  private:
    // W_eff as (out_padded, in_padded) in the activations' dtype; without_adapters: W alone. From scratch where it is not kept anyway.
    Tensor effective_weight(Device& device, ScratchScope& scope);
    Tensor weight_without_adapters(Device& device, ScratchScope& scope);
    void load_fused(Device& device, Tensor w);
    void add_adapters(Device& device, Tensor w);
    bool factored() const { return method_ != Method::full && effective_weights_of(*config_) == EffectiveWeights::factored; }
    bool has_adapter(const Device& device, const Linear& l) const { return l.projected || device.dry(); }
    void add_factored_forward(Device& device, Tensor y, Tensor x);
    void add_factored_input_gradient(Device& device, Tensor dx, Tensor dy);
    // The true initial weights of a matrix to w, f32.
    void load_source(Device& device, Tensor w, const Linear& linear, const WeightSource& source) const;
    // The stored W (without adapters) or P of a matrix, in the destination's dtype. next: the projection made in this merge step.
    void load_w(Device& device, Tensor w, const Linear& linear) const;
    void load_p(Device& device, Tensor p, const Linear& linear, bool next = false) const;
    Tensor dequantized_p(Device& device, ScratchScope& scope, const Linear& l, DType dtype) const;
    // The P of all left matrices, one below the other: (left_rank(), in), and x times their transpose: (T, left_rank()).
    int64_t left_rank() const;
    Tensor stacked_p(Device& device, ScratchScope& scope, DType dtype) const;
    Tensor projected_input(Device& device, ScratchScope& scope, Tensor x) const;
    void factor_gradients(Device& device, Tensor dy, Tensor x);
    void project_gradients(Device& device, Tensor dy, Tensor x, const ProjectionPass& pass);
    void project_one(Device& device, Linear& l, Tensor gradient, int64_t step);
    void reinitialize_one(Device& device, Linear& l, int64_t step, const WeightSource* source);
    void carry_moments(Device& device, Linear& l, Tensor p_old, Tensor p_new, int64_t step);

    const Config* config_ = nullptr;
    Method method_ = Method::loqt;
    int64_t in_ = 0, out_padded_ = 0;
    std::vector<Linear> linears_;
    Tensor fused_, fused_grad_;       // full: W and dW; loqt-nq: W
    Tensor merge_gradient_;           // dense gradient summed over micro-batches, fp32
    Tensor effective_;                // cached W_eff
    bool effective_fresh_ = false;
};

// The LoQT linear layer: y = x·W_effᵀ with W_eff = deq(W_q) + s·P·B, its gradient, and its re-initialisation (LoQT, Algorithm 1 and 2).
//
// Matrices are stored as Hugging Face stores them, (out, in). P lies on the narrower side h of the matrix (ties: input), B on the wider n:
//   left  (h = in)    W_eff = W + s·B·P       W: (n, h)
//   right (h = out)   W_eff = W + s·(B·P)ᵀ    W: (h, n)
// with P: (r, h), its rows the leading singular vectors of the gradient on side h, and B: (n, r), the only trained part.
// Side n is padded in memory to a multiple of 128 where it is not one of 8 (odd widths halve a tensor core's speed or worse);
// padding holds zeros and never reaches a file, a scale block or a moment.
//
// The other methods are the same layer under another policy (method.h).
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "method.h"
#include "nf4.h"
#include "parameter.h"
#include "projection.h"

// How a low-rank method multiplies by W_eff = W + s·P·B (train.effective_weights):
//   cached    W_eff in bf16, formed once per optimizer step and kept: the fewest FLOPs, 2 bytes per weight
//   rebuilt   formed for every use in scratch memory: cheap when a micro-batch has more than about a thousand tokens
//   factored  never formed: x·W + s·(x·P)·B: more FLOPs per token, none per weight, for small micro-batches
enum class EffectiveWeights { cached, rebuilt, factored };
EffectiveWeights effective_weights_of(const Config& config);  // auto that was never resolved (export, sampling): rebuilt

// What the backward pass computes again instead of keeping it (train.recompute):
//   none    nothing
//   light   outputs of norms and SwiGLU, x·P: cheap beside the products that use them
//   block   the whole forward pass of a block, from its input
enum class Recompute { none, light, block };
Recompute recompute_of(const Config& config);  // auto that was never resolved: light

// A merge needs each matrix's gradient and its B after the optimizer's step. Where nothing else of the whole backward pass is needed for that
// step, it is taken inside the backward pass and the merge with it, so that no projection has to be stored meanwhile. Clipping to a global
// norm is such a thing.
bool merges_inside_backward(const Config& config);

// Writes rows row_begin, row_begin + 1, … of the matrix `name` (Hugging Face name and orientation) to `rows`, f32 (any number, cols) on the
// device: random initialisation or an imported model. Called again at the first merge, which starts from the true weights and not from
// their NF4 round trip. Any thread may call it.
using WeightSource = std::function<void(Device& device, const std::string& name, int64_t row_begin, Tensor rows)>;

int64_t padded_width(int64_t width);  // width if a multiple of 8, else the next multiple of 128

// A projection between its making and its installation.
struct NextProjection {
    Nf4Tensor q;                      // in NF4
    Tensor p;                         // in bf16: (r, h)
};

struct Linear {
    std::string name;                 // model.layers.3.mlp.up_proj.weight
    int64_t out = 0, in = 0;          // logical
    int64_t row_begin = 0;            // first row of this matrix in its group's fused matrix
    bool right = false;
    int64_t rank = 0;
    bool projected = false;           // P and B exist (from the first re-initialisation on)

    Nf4Tensor w_q, p_q;               // in NF4
    Tensor w;                         // in bf16: (out, in), part of the group's fused matrix
    Tensor p;                         // in bf16: (r, h)
    NextProjection next;              // only where merges wait for the end of the backward pass
    Parameter a;                      // P (r, h) where it is trained
    Parameter b;                      // (n, r); galore: moments only, of the projected gradient
    Parameter dense;                  // W where it is trained
    bool next_ready = false;          // this merge step's projection has been made
    bool merged = false;              // and installed
    int owner = 0;                    // the rank that makes its projection and merges it
    float captured_energy = 0;
    double quant_error = 0, plain_quant_error = 0;  // of the last merge
    double projection_seconds = 0;    // spent in the backward pass

    int64_t h() const { return right ? out : in; }
    int64_t n() const { return right ? in : out; }
};

// What a merge did, summed over matrices.
struct MergeStatistics {
    int matrices = 0, failed = 0;     // failed: gradient zero, not finite, or no convergence; the old P stays
    double quant_error = 0;           // Σ ‖W − W_eff‖/‖W‖ after compensation
    double plain_quant_error = 0;     // Σ the same without compensation
    double captured_energy = 0;       // Σ ‖P·G‖²/‖G‖²
    double projection_seconds = 0;    // spent in the backward pass: dense gradients, singular vectors, merges made there
};

// How a backward pass is to treat what is trained.
struct BackwardPass {
    int64_t step = 0;                 // of the optimizer
    int rank = 0;                     // of this process among those that share the step (Config::world_size)
    int64_t micro_batch = 0;          // which one of the step
    bool first = true, last = true;   // the step's first, the step's last
    bool merges = false;              // this step merges: projections are made from its last micro-batch on
    bool whole_batch = false;         // and of the gradients of all micro-batches, summed
    // Takes the optimizer's step of a parameter whose gradient is final. Empty: gradients stay for the end of the pass. Parameters of linear
    // layers, embedding and head are handed over; norms' gradients always stay. With merges, matrices are merged right after it.
    std::function<void(Parameter&)> update;
    // Several ranks: gets the same parameters before `update` does; see GradientReduction.
    std::function<void(Parameter&)> reduce;
    std::function<bool()> may_update;      // asked once the loss is known, with update; if not, the backward pass is left out
    const WeightSource* source = nullptr;  // with update and merges: see Llama::merge

    // The gradient of p is final on this rank.
    void done(Parameter& p) const {
        if (reduce) reduce(p);
        if (update) update(p);
    }
    // Part `chunk` of `chunks` of this micro-batch's gradient.
    GradientPart part(const Config& config, int64_t chunk = 0, int64_t chunks = 1) const {
        uint32_t number = uint32_t(((step * config.micro_batches() + micro_batch) * config.world_size + rank) * chunks + chunk);
        return {first && chunk == 0, config.micro_batches() == 1 && chunks == 1, uint64_t(config.train.seed), number};
    }
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

    // y = x·W_effᵀ + residual (residual may be empty).  x: (T, in_padded), y: (T, out_padded). Keeps x·P where recompute is none.
    void forward(Device& device, Tensor y, Tensor x, Tensor residual = {});
    // dx = dy·W_eff (written).
    void input_gradient(Device& device, Tensor dx, Tensor dy);
    // Gradients of B (or W) accumulate, and pass.update gets them when they are final. On a merge step the new projections are computed,
    // and with pass.update the matrices are merged too, by the device's workers if it has any: the caller waits for them before it uses the
    // group again.
    void parameter_gradients(Device& device, Tensor dy, Tensor x, const BackwardPass& pass);
    // After the optimizer's update of a merge step: merge s·P·B into W, requantize with compensation, install the new P, unless that has been
    // done. Where the device has workers they do it, and the caller waits for them before finish_reinitialization.
    // source: the true weights, for matrices that merge for the first time; may be null once all have.
    void start_reinitialization(Device& device, int64_t step, const WeightSource* source);
    void finish_reinitialization(MergeStatistics& statistics);
    // galore: makes the new projections of the step whose gradients these are. Several ranks: of this rank's matrices.
    void refresh_projections(Device& device, int64_t step);
    // Several ranks (loqt_share.cpp): what a rank has made anew of one of its matrices goes to the others. First how it went: add_outcome appends
    // kOutcomeNumbers numbers, zeros for the matrices of others; take_outcome gets their sums over the ranks and sends or receives.
    static constexpr int kOutcomeNumbers = 4;
    void add_outcome(const Device& device, const Linear& linear, std::vector<double>& outcomes) const;
    void take_outcome(Device& device, Linear& linear, const double* outcome);
    // The same for factors just initialized, which always goes well.
    void share_initial(Device& device);
    // After a checkpoint has been read: what follows from its counters.
    void restored();
    // The trained state changed: cached effective weights are stale.
    void invalidate() { effective_fresh_ = false; }
    // W_eff of one matrix in fp32, row-major out × in, to the host (export, tests).
    void read_effective(Device& device, const Linear& linear, std::vector<float>& out);

  private:
    void register_weight(const Registration& reg, Linear& l);
    void register_projection(const Registration& reg, Linear& l);
    // W_eff as (out_padded, in_padded) in the activations' dtype; without_adapters: W alone. From scratch where it is not kept anyway.
    Tensor effective_weight(Device& device, ScratchScope& scope);
    Tensor weight_without_adapters(Device& device, ScratchScope& scope);
    void load_fused(Device& device, Tensor w);
    void add_adapters(Device& device, Tensor w);
    bool factored() const { return policy_.adapters && effective_weights_of(*config_) == EffectiveWeights::factored; }
    bool has_adapter(const Device& device, const Linear& l) const { return l.projected || device.dry(); }
    void add_factored_forward(Device& device, Tensor y, Tensor x);
    void add_factored_input_gradient(Device& device, Tensor dx, Tensor dy);
    // The true initial weights of a matrix to w, f32.
    void load_source(Device& device, Tensor w, const Linear& linear, const WeightSource& source) const;
    // The stored W (without adapters) or P of a matrix, in the destination's dtype; and w to where W is stored.
    void load_w(Device& device, Tensor w, const Linear& linear) const;
    void store_w(Device& device, const Linear& linear, Tensor w) const;
    void load_p(Device& device, Tensor p, const Linear& linear) const;
    Tensor dequantized_p(Device& device, ScratchScope& scope, const Linear& l, DType dtype) const;
    // The P of all left matrices, one below the other: (left_rank(), in), and x times their transpose: (T, left_rank()).
    int64_t left_rank() const;
    Tensor stacked_p(Device& device, ScratchScope& scope, DType dtype) const;
    Tensor projected_input(Device& device, ScratchScope& scope, Tensor x) const;
    void weight_gradients(Device& device, Tensor dy, Tensor x, const BackwardPass& pass);
    void factor_gradients(Device& device, Tensor dy, Tensor x, const BackwardPass& pass);
    void project_gradients(Device& device, Tensor dy, Tensor x, const BackwardPass& pass);
    Tensor dense_gradient(Device& device, ScratchScope& scope, const Linear& l, Tensor dy, Tensor x, const BackwardPass& pass);
    std::vector<Tensor> remade(const Linear& l) const;
    bool owns(const Device& device, const Linear& l) const;
    void project_one(Device& device, Linear& l, Tensor dy, Tensor x, const BackwardPass& pass);
    Device* idle_worker(Device& device, const Linear& l) const;
    NextProjection scratch_projection(ScratchScope& scope, const Linear& l) const;
    void reinitialize_one(Device& device, Linear& l, const NextProjection& next, int64_t step, const WeightSource* source);
    // w ← beta·w + factor·P·B as the matrix has it (out, in); all f32.
    void add_adapter(Device& device, const Linear& l, Tensor w, Tensor p, Tensor b, float beta, float factor) const;
    // P trained (lora.cpp).
    void initialize_factors(Device& device, Linear& l, Tensor w);
    void random_factors(Device& device, Linear& l, int64_t step);
    bool loftq_factors(Device& device, Linear& l, Tensor w);
    void balance(Device& device, Tensor p, Tensor b, Tensor scales, Tensor product) const;
    void restart(Device& device, Linear& l, int64_t step);
    // galore.cpp
    // False, and nothing done, where there is no P yet.
    bool galore_step(Device& device, Linear& l, AdamStep step);
    void refresh_projection(Device& device, Linear& l, Tensor gradient, int64_t step);
    void carry_moments(Device& device, Linear& l, Tensor p_old, Tensor p_new, int64_t step);

    const Config* config_ = nullptr;
    MethodPolicy policy_{};
    float scale_ = 1;
    bool refresh_ = false;            // galore: the step under way takes a new P
    int64_t in_ = 0, out_padded_ = 0;
    std::vector<Linear> linears_;
    Tensor fused_, fused_grad_;       // full: W and dW; loqt-nq: W
    Tensor merge_gradient_;           // dense gradient summed over micro-batches, fp32
    Tensor kept_u_;                   // (T, left_rank()): x·P of the last forward pass, where it is made and kept
    Tensor effective_;                // cached W_eff
    bool effective_fresh_ = false;
};

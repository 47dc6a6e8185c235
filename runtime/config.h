// The configuration of a run: every key once, with its type, default, choices and help. JSON files, command-line overrides
// (--section.key value, or --key where that is unambiguous), the resolved config.json and --help all come from visit_config.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

struct ModelConfig {
    int64_t hidden = 512, intermediate = 1376, heads = 8, kv_heads = 0 /* 0 = heads */, layers = 8, vocab = 32000;
    double rms_eps = 1e-6, rope_base = 10000.0, init_std = 0.02;
    int64_t head_dim() const { return hidden / heads; }
};

struct MethodConfig {
    std::string name = "loqt";           // see method.h
    int64_t rank = 128;
    double scale = 0.5;                  // s of W + s·P·B; never divided by the rank
    bool double_quant = true;
    bool quantize_projection = true;     // loqt: P in NF4
    int64_t compensation_rounds = 5;
    std::string projection = "gram";     // gram | subspace
    std::string projection_gradient = "full";  // full | last
    int64_t merge_gap = 100;             // τ
    double merge_growth = 1.2;           // ψ; 0 = fixed gap
    int64_t max_gap = 0;                 // cap on the gap; 0 = none
    std::string moments_at_merge = "keep";  // keep | reset | project
    double lora_alpha = 32.0;            // lora, qlora, loftq, relora: s = lora_alpha / rank
    int64_t loftq_rounds = 5;
    int64_t relora_gap = 2000;           // steps between restarts
    double relora_prune = 0.999;         // share of Adam's moments that a restart sets to zero, the smallest
    int64_t relora_warmup = 50;          // steps of linear warm-up after a restart
};

struct OptimizerConfig {
    double lr = 0.01, min_lr_ratio = 0.1, warmup_ratio = 0.1;
    double beta1 = 0.9, beta2 = 0.999, eps = 1e-6, weight_decay = 0.0;
    double clip = 1.0;                   // global gradient norm; 0 = off
    std::string moments = "fp32";        // fp32 | bf16 | bf16-nearest | int8
    std::string embedding_moments = "auto";  // auto | fp32 | bf16 | int8; auto: as moments, but fp32 for int8
    std::string rounding = "stochastic"; // nearest | stochastic | master: how bf16 parameters take an update
    std::string nonfinite = "stop";      // stop | skip
};

struct DataConfig {
    std::string train, val;              // shard files: a path, a folder or a glob pattern
    std::string layout = "packed";       // packed | rows
    bool shuffle = true;
    int64_t pad_id = -1;                 // rows only; -1 = from manifest.json
};

struct TrainConfig {
    int64_t steps = 10000, seq_len = 256, batch = 512 /* sequences per optimizer step */, micro_batch = 0 /* 0 = auto */;
    int64_t seed = 42;
    std::string gradients = "fp32";      // fp32 | bf16 | int8: storage of accumulated gradients
    std::string updates = "ordinary";    // ordinary | per_layer
    std::string recompute = "auto";      // auto | none | light | block
    std::string effective_weights = "auto";  // auto | cached | rebuilt | factored
};

struct EvalConfig {
    int64_t every = 500, sequences = 0 /* 0 = the whole validation set */;
    bool official_perplexity = false;
};

struct CheckpointConfig {
    int64_t every = 1000, keep_last = 2, keep_every = 0;
};

struct RunConfig {
    std::string dir;                     // default runs/<name of the config file>
    std::string device = "auto";         // auto | cpu | cuda | cuda:N
    int64_t gpus = 1;                    // processes on this machine, a GPU each; 0 = as many as there are GPUs
    double comm_timeout = 120;           // seconds that one rank waits for another
    int64_t verify_every = 100;          // steps between comparisons of the ranks' states; 0 = before checkpoints only
    std::string memory_budget;           // "24GiB"; empty = what is free
    int64_t log_every = 1;
    std::string init_from;               // a Hugging Face LLaMA directory
};

struct Config {
    ModelConfig model;
    MethodConfig method;
    OptimizerConfig optimizer;
    DataConfig data;
    TrainConfig train;
    EvalConfig eval;
    CheckpointConfig checkpoint;
    RunConfig run;
    // Ranks that share the batch. Not a key: whoever starts the processes decides it, and a run may be resumed with another number.
    int64_t world_size = 1;
    // Not 0: train.micro_batch as the run directory has it, where this number of ranks takes a smaller one.
    int64_t stored_micro_batch = 0;

    int64_t kv_heads() const { return model.kv_heads ? model.kv_heads : model.heads; }
    int64_t rank_batch() const { return train.batch / world_size; }               // sequences of a step on every rank
    int64_t micro_batches() const { return rank_batch() / train.micro_batch; }  // of a step on every rank, once micro_batch is resolved
    bool low_rank() const { return method.name != "full" && method.name != "galore"; }  // adapters beside a frozen W
};

// Calls v(path, field, help, choices) for every key, in the order of the file. choices: "a|b|c", or "" for free values.
template <class C, class Visitor> void visit_config(C& c, Visitor&& v) {
    v("model.hidden", c.model.hidden, "width of the residual stream", "");
    v("model.intermediate", c.model.intermediate, "width of the SwiGLU layer", "");
    v("model.heads", c.model.heads, "query heads", "");
    v("model.kv_heads", c.model.kv_heads, "key/value heads; 0 = heads", "");
    v("model.layers", c.model.layers, "transformer blocks", "");
    v("model.vocab", c.model.vocab, "rows of the embedding and the LM head", "");
    v("model.rms_eps", c.model.rms_eps, "epsilon of RMSNorm", "");
    v("model.rope_base", c.model.rope_base, "base of the rotary angles", "");
    v("model.init_std", c.model.init_std, "standard deviation of the initial weights", "");
    v("method.name", c.method.name, "training method", "loqt|loqt-nq|full|galore|lora|relora|qlora|loftq");
    v("method.rank", c.method.rank, "rank of P and B", "");
    v("method.scale", c.method.scale, "s in W + s·P·B of loqt and loqt-nq, and of galore's update", "");
    v("method.double_quant", c.method.double_quant, "quantize the absmax values of NF4 too", "");
    v("method.quantize_projection", c.method.quantize_projection, "loqt: P in NF4; false: in bf16", "");
    v("method.compensation_rounds", c.method.compensation_rounds, "rounds of quantization-error compensation at a merge; 0 = B starts at 0", "");
    v("method.projection", c.method.projection, "singular vectors: exact (gram) or fast (subspace iteration)", "gram|subspace");
    v("method.projection_gradient", c.method.projection_gradient, "gradient the projection is taken from: whole batch or last micro-batch", "full|last");
    v("method.merge_gap", c.method.merge_gap, "steps to the first merge (tau)", "");
    v("method.merge_growth", c.method.merge_growth, "gap k is tau + floor(growth^k); 0 = fixed gap", "");
    v("method.max_gap", c.method.max_gap, "largest gap between merges; 0 = no limit", "");
    v("method.moments_at_merge", c.method.moments_at_merge, "what becomes of B's Adam moments at a merge", "keep|reset|project");
    v("method.lora_alpha", c.method.lora_alpha, "lora, relora, qlora, loftq: s = lora_alpha / rank", "");
    v("method.loftq_rounds", c.method.loftq_rounds, "loftq: alternations of quantization and SVD at the start", "");
    v("method.relora_gap", c.method.relora_gap, "relora: steps between restarts", "");
    v("method.relora_prune", c.method.relora_prune, "relora: share of Adam's moments, the smallest, that a restart sets to zero", "");
    v("method.relora_warmup", c.method.relora_warmup, "relora: steps of warm-up after a restart", "");
    v("optimizer.lr", c.optimizer.lr, "peak learning rate", "");
    v("optimizer.min_lr_ratio", c.optimizer.min_lr_ratio, "final learning rate as a fraction of the peak", "");
    v("optimizer.warmup_ratio", c.optimizer.warmup_ratio, "fraction of the steps that warm up linearly", "");
    v("optimizer.beta1", c.optimizer.beta1, "decay of the first moment", "");
    v("optimizer.beta2", c.optimizer.beta2, "decay of the second moment", "");
    v("optimizer.eps", c.optimizer.eps, "AdamW epsilon", "");
    v("optimizer.weight_decay", c.optimizer.weight_decay, "decoupled weight decay", "");
    v("optimizer.clip", c.optimizer.clip, "largest global gradient norm; 0 = no clipping", "");
    v("optimizer.moments", c.optimizer.moments, "storage of Adam's moments", "fp32|bf16|bf16-nearest|int8");
    v("optimizer.embedding_moments", c.optimizer.embedding_moments, "the same for embedding and LM head; auto = as moments, but fp32 for int8", "auto|fp32|bf16|int8");
    v("optimizer.rounding", c.optimizer.rounding, "how bf16 parameters are rounded after an update", "nearest|stochastic|master");
    v("optimizer.nonfinite", c.optimizer.nonfinite, "on a NaN or Inf in loss or gradient", "stop|skip");
    v("data.train", c.data.train, "training shards: file, folder or glob pattern", "");
    v("data.val", c.data.val, "validation shards; empty = no evaluation", "");
    v("data.layout", c.data.layout, "packed documents or one padded document per row", "packed|rows");
    v("data.shuffle", c.data.shuffle, "visit the samples in a random order", "");
    v("data.pad_id", c.data.pad_id, "padding token of rows; -1 = from manifest.json", "");
    v("train.steps", c.train.steps, "optimizer steps", "");
    v("train.seq_len", c.train.seq_len, "tokens per sequence", "");
    v("train.batch", c.train.batch, "sequences per optimizer step", "");
    v("train.micro_batch", c.train.micro_batch, "sequences per forward pass; auto (0) = the fastest that fits, by the plan's estimate", "");
    v("train.seed", c.train.seed, "seed of initialization, data order and rounding", "");
    v("train.gradients", c.train.gradients, "storage of accumulated gradients; int8: of B, bf16 for the rest", "fp32|bf16|int8");
    v("train.updates", c.train.updates, "optimizer step after the backward pass, or inside it layer by layer (no gradient is kept; one micro-batch per step)", "ordinary|per_layer");
    v("train.recompute", c.train.recompute, "what the backward pass computes again: nothing, norms and SwiGLU, or whole blocks", "auto|none|light|block");
    v("train.effective_weights", c.train.effective_weights, "W + s·P·B: kept for the whole step, rebuilt for every use, or never formed (factored)", "auto|cached|rebuilt|factored");
    v("eval.every", c.eval.every, "steps between evaluations; 0 = only at the end", "");
    v("eval.sequences", c.eval.sequences, "validation sequences per evaluation; 0 = all", "");
    v("eval.official_perplexity", c.eval.official_perplexity, "also report the official code's perplexity, biased by n/(n+1)", "");
    v("checkpoint.every", c.checkpoint.every, "steps between checkpoints; 0 = only at the end", "");
    v("checkpoint.keep_last", c.checkpoint.keep_last, "newest checkpoints kept", "");
    v("checkpoint.keep_every", c.checkpoint.keep_every, "checkpoints at multiples of this step are kept for good; 0 = none", "");
    v("run.dir", c.run.dir, "run directory", "");
    v("run.device", c.run.device, "auto, cpu, cuda or cuda:N", "");
    v("run.gpus", c.run.gpus, "train on so many GPUs of this machine, one process each; 0 = all of them (--device cpu: one process)", "");
    v("run.comm_timeout", c.run.comm_timeout, "several GPUs: seconds to wait for a rank before the run is ended", "");
    v("run.verify_every", c.run.verify_every, "several GPUs: steps between comparisons of their states; 0 = before checkpoints only", "");
    v("run.memory_budget", c.run.memory_budget, "device memory to use at most, such as 24GiB; empty = what is free", "");
    v("run.log_every", c.run.log_every, "steps between lines of metrics.jsonl", "");
    v("run.init_from", c.run.init_from, "start from this Hugging Face LLaMA directory", "");
}

// One override from the command line.
struct Override {
    std::string key, value;
};

// "24GiB", "512MiB", "1.5GB" → bytes; a unit is required. Throws UserError.
int64_t parse_bytes(const std::string& text);

// Finds a config file: as given, else in configs/ beside the binary (with or without .json). Throws UserError listing the presets.
std::string find_config_file(const std::string& name, const std::string& binary_path);

// Reads a JSON config over the defaults. Unknown keys, wrong types and values outside the choices are UserErrors that name the key,
// the value and the nearest known key.
void read_config_file(Config& config, const std::string& path);
// The same from a file's contents; path: for messages.
void read_config_text(Config& config, const std::string& text, const std::string& path);

// The key's short option name: its last part ("optimizer.lr" → "lr"), "method" for method.name.
std::string short_name(const std::string& key);
// The key's default as JSON text.
std::string default_text(const std::string& key);

// Full key for a command-line name ("lr" → "optimizer.lr"); throws UserError with the nearest key, or the nearest of other_options, if unknown,
// or the candidates if ambiguous.
std::string resolve_key(const std::string& name, const std::vector<std::string>& other_options = {});
void apply_override(Config& config, const Override& override);

// The resolved configuration, every default written out, as pretty JSON.
std::string config_to_json(const Config& config);
// The same as a run directory and its checkpoints hold it (Config::stored_micro_batch).
std::string stored_config(const Config& config);

// Values that cannot work together, each a UserError naming key, value and remedy. Fills defaults that depend on others (kv_heads).
// micro_batch may still be 0 (auto).
void validate_config(Config& config);

// Keys whose values differ, as "key: a -> b".
std::vector<std::string> config_differences(const Config& a, const Config& b);

// Restructuring keys: a run cannot be resumed with another value of these.
bool fixed_for_resume(const std::string& key);

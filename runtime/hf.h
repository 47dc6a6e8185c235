// Hugging Face LLaMA directories: config.json + model.safetensors (or shards with an index), as transformers reads and writes them.
// Weights are (out, in) matrices named model.embed_tokens.weight, model.layers.N.self_attn.q_proj.weight, …, lm_head.weight.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "runtime/safetensors.h"

struct LlamaShape {
    int64_t hidden = 0, intermediate = 0, layers = 0, heads = 0, kv_heads = 0, head_dim = 0, vocab = 0;
    int64_t max_positions = 2048;
    double rms_eps = 1e-6, rope_base = 10000.0;
    bool tie_embeddings = false;                    // lm_head is embed_tokens, not a tensor of its own
    int64_t bos_id = -1, eos_id = -1, pad_id = -1;  // -1 = none
};

// Name and shape of every weight of such a model, in the order of the layers.
struct WeightShape {
    std::string name;
    std::vector<int64_t> shape;
};
std::vector<WeightShape> llama_weights(const LlamaShape& shape);

// A weight to export: read(values) fills values with the whole tensor, row-major.
struct HfTensor {
    std::string name;
    std::vector<int64_t> shape;
    std::function<void(std::vector<float>&)> read;
};

// Writes a directory that LlamaForCausalLM.from_pretrained loads: config.json, generation_config.json, model.safetensors (split
// into shards of at most shard_bytes, with an index, if larger), one tensor in memory at a time. tensors must be exactly
// llama_weights(shape), in any order; file_dtype f32 or bf16 (round to nearest even). tokenizer_file (may be empty) is copied as sentencepiece.model or tokenizer.json.
// The directory must be absent or empty: UserError otherwise. On failure what was written is removed again.
void export_huggingface(const std::string& directory, const LlamaShape& shape, const std::vector<HfTensor>& tensors, DType file_dtype,
                        const std::string& tokenizer_file, int64_t shard_bytes = 5000000000);

// A LLaMA model on disk, ready to be read. Weights in F16, BF16, F32 or F64.
class HfModel {
  public:
    // Reads config.json and the headers of the weights. Anything this program's model cannot represent (another architecture, scaled
    // rotary embeddings, biases, quantized weights) and missing, extra or misshapen weights are UserErrors of one line. Files that carry
    // checksums are verified here.
    static HfModel open(const std::string& directory);

    const LlamaShape& shape() const { return shape_; }
    // Rows [row_begin, row_begin + row_count) of a weight as fp32; a vector has one element per row. With tied embeddings lm_head.weight is
    // read from model.embed_tokens.weight.
    void read(const std::string& name, std::vector<float>& out, int64_t row_begin, int64_t row_count) const;
    // The whole weight.
    void read(const std::string& name, std::vector<float>& out) const;

  private:
    HfModel(const std::string& directory, const LlamaShape& shape);
    const std::string& stored_name(const std::string& name) const;
    LlamaShape shape_;
    SafetensorsModel files_;
};

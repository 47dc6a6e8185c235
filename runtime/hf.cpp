// Hugging Face LLaMA directories. See hf.h.
#include "runtime/hf.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

namespace fs = std::filesystem;
using nlohmann::json;
using nlohmann::ordered_json;

namespace {

const std::string kEmbedding = "model.embed_tokens.weight", kHead = "lm_head.weight";

ordered_json id_or_null(int64_t id) { return id < 0 ? ordered_json() : ordered_json(id); }

std::string config_json(const LlamaShape& s, DType dtype) {
    ordered_json c;
    c["architectures"] = {"LlamaForCausalLM"};
    c["attention_bias"] = false;
    c["attention_dropout"] = 0.0;
    c["bos_token_id"] = id_or_null(s.bos_id);
    c["eos_token_id"] = id_or_null(s.eos_id);
    c["head_dim"] = s.head_dim;
    c["hidden_act"] = "silu";
    c["hidden_size"] = s.hidden;
    c["initializer_range"] = 0.02;
    c["intermediate_size"] = s.intermediate;
    c["max_position_embeddings"] = s.max_positions;
    c["mlp_bias"] = false;
    c["model_type"] = "llama";
    c["num_attention_heads"] = s.heads;
    c["num_hidden_layers"] = s.layers;
    c["num_key_value_heads"] = s.kv_heads;
    c["pad_token_id"] = id_or_null(s.pad_id);
    c["pretraining_tp"] = 1;
    c["rms_norm_eps"] = s.rms_eps;
    // transformers 4 reads rope_theta and torch_dtype; 5 reads rope_parameters and dtype, and still accepts the old names.
    c["rope_parameters"] = {{"rope_theta", s.rope_base}, {"rope_type", "default"}};
    c["rope_scaling"] = nullptr;
    c["rope_theta"] = s.rope_base;
    c["tie_word_embeddings"] = s.tie_embeddings;
    c["torch_dtype"] = dtype == DType::bf16 ? "bfloat16" : "float32";
    c["use_cache"] = true;
    c["vocab_size"] = s.vocab;
    return c.dump(2) + "\n";
}

std::string generation_config_json(const LlamaShape& s) {
    ordered_json c;
    c["_from_model_config"] = true;
    c["bos_token_id"] = id_or_null(s.bos_id);
    c["eos_token_id"] = id_or_null(s.eos_id);
    c["pad_token_id"] = id_or_null(s.pad_id);
    return c.dump(2) + "\n";
}

// What AutoTokenizer needs beside tokenizer.json: the plain class (LLaMA's own would add its special tokens) and which tokens are special.
std::string tokenizer_config_json(const LlamaShape& s, const std::string& tokenizer_json) {
    ordered_json c;
    c["tokenizer_class"] = "PreTrainedTokenizerFast";
    c["model_max_length"] = s.max_positions;
    json tokenizer = json::parse(tokenizer_json, nullptr, false);
    if (tokenizer.is_object() && tokenizer.contains("added_tokens") && tokenizer["added_tokens"].is_array())
        for (const json& token : tokenizer["added_tokens"]) {
            if (!token.is_object() || !token.contains("id") || !token["id"].is_number_integer() || !token.contains("content")) continue;
            int64_t id = token["id"].get<int64_t>();
            if (id == s.bos_id) c["bos_token"] = token["content"];
            if (id == s.eos_id) c["eos_token"] = token["content"];
            if (id == s.pad_id) c["pad_token"] = token["content"];
        }
    return c.dump(2) + "\n";
}

int64_t numel(const std::vector<int64_t>& shape) {
    int64_t n = 1;
    for (int64_t k : shape) n *= k;
    return n;
}

void write_weights(const std::string& path, const std::vector<const HfTensor*>& tensors, DType dtype) {
    std::vector<SafetensorsWriter::Item> items;
    for (const HfTensor* t : tensors) items.push_back({t->name, dtype, t->shape});
    SafetensorsWriter file(path, items, {{"format", "pt"}});
    std::vector<float> values;
    std::vector<bf16> rounded;
    for (const HfTensor* t : tensors) {
        t->read(values);
        CHECK_INTERNAL(int64_t(values.size()) == numel(t->shape), "%s: %zu values for %s", t->name.c_str(), values.size(), shape_text(t->shape).c_str());
        if (dtype == DType::f32) {
            file.write(t->name, values.data(), int64_t(values.size() * sizeof(float)));
            continue;
        }
        rounded.resize(values.size());
        std::transform(values.begin(), values.end(), rounded.begin(), to_bf16);
        file.write(t->name, rounded.data(), int64_t(rounded.size() * sizeof(bf16)));
    }
    file.finish();
}

[[noreturn]] void unsupported(const std::string& path, const std::string& what) {
    throw UserError(path + ": " + what + ", which this program cannot train; use a plain LLaMA model");
}

// The value of a key, or fallback if absent or null; UserError if it has another type.
template <class T> T value_of(const json& config, const std::string& path, const char* key, T fallback) {
    if (!config.contains(key) || config[key].is_null()) return fallback;
    try {
        return config[key].get<T>();
    } catch (const json::exception&) {
        throw UserError(path + ": " + key + " is " + config[key].dump() + ", which is not of the type expected; use another copy of the model");
    }
}

int64_t positive(const json& config, const std::string& path, const char* key, int64_t fallback = 0) {
    int64_t value = config.contains(key) && config[key].is_number_float() ? 0 : value_of<int64_t>(config, path, key, fallback);
    if (value <= 0) throw UserError(path + ": " + key + " is missing or not a positive whole number; use another copy of the model");
    return value;
}

// Token ids may be a number or, for several end tokens, a list.
int64_t token_id(const json& config, const char* key) {
    if (!config.contains(key)) return -1;
    const json& value = config[key].is_array() && !config[key].empty() ? config[key][0] : config[key];
    return value.is_number_integer() ? value.get<int64_t>() : -1;
}

// Rotary embeddings: the base, from transformers 5's rope_parameters or the older rope_theta; scaled forms are refused.
double rope_base(const json& config, const std::string& path) {
    double base = value_of<double>(config, path, "rope_theta", 10000.0);
    for (const char* key : {"rope_scaling", "rope_parameters"}) {
        if (!config.contains(key) || !config[key].is_object()) continue;
        const json& rope = config[key];
        std::string type = value_of<std::string>(rope, path, "rope_type", value_of<std::string>(rope, path, "type", "default"));
        if (type != "default" || value_of<double>(rope, path, "partial_rotary_factor", 1.0) != 1.0)
            unsupported(path, std::string(key) + " is " + rope.dump() + ": scaled rotary embeddings");
        base = value_of<double>(rope, path, "rope_theta", base);
    }
    return base;
}

LlamaShape read_config(const std::string& path) {
    json c = json::parse(read_file(path), nullptr, false);
    if (!c.is_object()) throw UserError(path + " is not valid JSON; use another copy of the model");
    std::string type = value_of<std::string>(c, path, "model_type", "llama");
    std::vector<std::string> architectures = value_of<std::vector<std::string>>(c, path, "architectures", {"LlamaForCausalLM"});
    if (type != "llama") unsupported(path, "model_type is " + type);
    if (architectures != std::vector<std::string>{"LlamaForCausalLM"}) unsupported(path, "architectures is " + c["architectures"].dump());
    for (const char* key : {"attention_bias", "mlp_bias"})
        if (value_of<bool>(c, path, key, false)) unsupported(path, std::string(key) + " is true");
    std::string activation = value_of<std::string>(c, path, "hidden_act", "silu");
    if (activation != "silu") unsupported(path, "hidden_act is " + activation);
    if (c.contains("quantization_config") && !c["quantization_config"].is_null()) unsupported(path, "the weights are quantized (quantization_config)");

    LlamaShape s;
    s.hidden = positive(c, path, "hidden_size");
    s.intermediate = positive(c, path, "intermediate_size");
    s.layers = positive(c, path, "num_hidden_layers");
    s.heads = positive(c, path, "num_attention_heads");
    s.kv_heads = positive(c, path, "num_key_value_heads", s.heads);
    s.head_dim = positive(c, path, "head_dim", s.hidden / s.heads);
    s.vocab = positive(c, path, "vocab_size");
    s.max_positions = positive(c, path, "max_position_embeddings", s.max_positions);
    s.rms_eps = value_of<double>(c, path, "rms_norm_eps", 1e-6);
    s.rope_base = rope_base(c, path);
    s.tie_embeddings = value_of<bool>(c, path, "tie_word_embeddings", false);
    s.bos_id = token_id(c, "bos_token_id");
    s.eos_id = token_id(c, "eos_token_id");
    s.pad_id = token_id(c, "pad_token_id");
    return s;
}

}  // namespace

std::vector<WeightShape> llama_weights(const LlamaShape& s) {
    const int64_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
    std::vector<WeightShape> w = {{kEmbedding, {s.vocab, s.hidden}}};
    for (int64_t i = 0; i < s.layers; ++i) {
        std::string layer = "model.layers." + std::to_string(i) + ".";
        w.push_back({layer + "input_layernorm.weight", {s.hidden}});
        w.push_back({layer + "self_attn.q_proj.weight", {q, s.hidden}});
        w.push_back({layer + "self_attn.k_proj.weight", {kv, s.hidden}});
        w.push_back({layer + "self_attn.v_proj.weight", {kv, s.hidden}});
        w.push_back({layer + "self_attn.o_proj.weight", {s.hidden, q}});
        w.push_back({layer + "post_attention_layernorm.weight", {s.hidden}});
        w.push_back({layer + "mlp.gate_proj.weight", {s.intermediate, s.hidden}});
        w.push_back({layer + "mlp.up_proj.weight", {s.intermediate, s.hidden}});
        w.push_back({layer + "mlp.down_proj.weight", {s.hidden, s.intermediate}});
    }
    w.push_back({"model.norm.weight", {s.hidden}});
    if (!s.tie_embeddings) w.push_back({kHead, {s.vocab, s.hidden}});
    return w;
}

void export_huggingface(const std::string& directory, const LlamaShape& shape, const std::vector<HfTensor>& tensors, DType file_dtype,
                        const std::string& tokenizer_file, int64_t shard_bytes) {
    CHECK_INTERNAL(file_dtype == DType::f32 || file_dtype == DType::bf16, "export as %s", safetensors_name(file_dtype));
    std::map<std::string, std::vector<int64_t>> expected;
    for (const WeightShape& w : llama_weights(shape)) expected[w.name] = w.shape;
    for (const HfTensor& t : tensors) {
        auto it = expected.find(t.name);
        CHECK_INTERNAL(it != expected.end() && it->second == t.shape, "%s %s is not a weight of this model", t.name.c_str(), shape_text(t.shape).c_str());
        expected.erase(it);
    }
    CHECK_INTERNAL(expected.empty(), "%s is not among the weights to export", expected.begin()->first.c_str());

    std::string tokenizer = tokenizer_file.empty() ? "" : read_file(tokenizer_file);
    const bool existed = fs::exists(directory);
    if (existed && (!fs::is_directory(directory) || !fs::is_empty(directory)))
        throw UserError("export directory " + directory + " is not empty; choose a new directory or empty it first");
    make_directories(directory);

    std::vector<std::string> written;
    auto write_text = [&](const std::string& name, const std::string& text) {
        write_file(directory + "/" + name, text);
        written.push_back(name);
    };
    try {
        // Fill shards in order; a tensor larger than a shard gets one of its own.
        std::vector<std::vector<const HfTensor*>> shards(1);
        int64_t total = 0, parameters = 0, used = 0;
        for (const HfTensor& t : tensors) {
            int64_t bytes = numel(t.shape) * size_of(file_dtype);
            if (used > 0 && used + bytes > shard_bytes) shards.emplace_back(), used = 0;
            shards.back().push_back(&t);
            used += bytes, total += bytes, parameters += numel(t.shape);
        }
        ordered_json index;
        index["metadata"] = {{"total_parameters", parameters}, {"total_size", total}};
        for (size_t i = 0; i < shards.size(); ++i) {
            std::string name = shards.size() == 1 ? "model.safetensors" : format("model-%05zu-of-%05zu.safetensors", i + 1, shards.size());
            write_weights(directory + "/" + name, shards[i], file_dtype);
            written.push_back(name);
            for (const HfTensor* t : shards[i]) index["weight_map"][t->name] = name;
        }
        if (shards.size() > 1) write_text("model.safetensors.index.json", index.dump(2) + "\n");
        if (fs::path(tokenizer_file).extension() == ".json") {
            write_text("tokenizer.json", tokenizer);
            write_text("tokenizer_config.json", tokenizer_config_json(shape, tokenizer));
        } else if (!tokenizer_file.empty()) {
            // Not as tokenizer.model: AutoTokenizer would take it for LLaMA's BPE and, for a unigram model such as t5's, give other ids.
            write_text("sentencepiece.model", tokenizer);
        }
        write_text("generation_config.json", generation_config_json(shape));
        write_text("config.json", config_json(shape, file_dtype));  // last: without it the directory is no model
    } catch (...) {
        std::error_code ignored;  // the first error is the one to report
        for (const std::string& name : written) fs::remove(directory + "/" + name, ignored);
        if (!existed) fs::remove(directory, ignored);
        throw;
    }
}

HfModel::HfModel(const std::string& directory, const LlamaShape& shape) : shape_(shape), files_(directory) {}

HfModel HfModel::open(const std::string& directory) {
    const std::string config = directory + "/config.json";
    if (!fs::exists(config)) throw UserError(directory + " is no Hugging Face model: it has no config.json; give the directory of a model");
    HfModel model(directory, read_config(config));
    std::set<std::string> expected;
    for (const WeightShape& w : llama_weights(model.shape_)) {
        expected.insert(w.name);
        const SafetensorsEntry& e = model.files_.entry(w.name);
        if (e.shape != w.shape)
            throw UserError(directory + ": " + w.name + " is " + shape_text(e.shape) + " and config.json says " + shape_text(w.shape) + "; use another copy of the model");
    }
    for (const std::string& name : model.files_.names()) {
        // Old files carry the rotary frequencies, which follow from the config; tied ones may repeat the embedding as lm_head.
        bool redundant = name.find("rotary_emb.inv_freq") != std::string::npos || (model.shape_.tie_embeddings && name == kHead);
        if (!expected.count(name) && !redundant) unsupported(directory, "it has a weight " + name);
    }
    model.files_.verify();
    return model;
}

const std::string& HfModel::stored_name(const std::string& name) const { return shape_.tie_embeddings && name == kHead ? kEmbedding : name; }

void HfModel::read(const std::string& name, std::vector<float>& out, int64_t row_begin, int64_t row_count) const {
    const std::string& stored = stored_name(name);
    const SafetensorsEntry& e = files_.entry(stored);
    int64_t columns = e.shape.size() < 2 ? 1 : e.numel() / e.shape[0];
    files_.file_of(stored).read_floats(stored, out, row_begin * columns, row_count * columns);
}

void HfModel::read(const std::string& name, std::vector<float>& out) const {
    const std::string& stored = stored_name(name);
    files_.file_of(stored).read_floats(stored, out, 0, files_.entry(stored).numel());
}

// Hugging Face directories: export and import are inverse, transformers' own files are read, what cannot be trained is refused.
#include <algorithm>

#include "runtime/hf.h"
#include "test/support.h"
#include "test/temp_dir.h"

namespace {

LlamaShape small_shape() {
    LlamaShape s;
    s.hidden = 12, s.intermediate = 17, s.layers = 2, s.heads = 4, s.kv_heads = 2, s.head_dim = 3, s.vocab = 11, s.max_positions = 77;
    s.rms_eps = 1e-5, s.rope_base = 5e5, s.bos_id = 1, s.eos_id = 2;
    return s;
}

using Weights = std::map<std::string, std::vector<float>>;

Weights random_weights(const LlamaShape& shape, std::mt19937_64& rng) {
    Weights weights;
    for (const WeightShape& w : llama_weights(shape)) weights[w.name] = random_normal(rng, w.shape.size() == 2 ? w.shape[0] * w.shape[1] : w.shape[0]);
    return weights;
}

std::vector<HfTensor> to_export(const LlamaShape& shape, const Weights& weights) {
    std::vector<HfTensor> list;
    for (const WeightShape& w : llama_weights(shape)) {
        const std::vector<float>* values = &weights.at(w.name);
        list.push_back({w.name, w.shape, [values](std::vector<float>& out) { out = *values; }});
    }
    return list;
}

void check_weights(const HfModel& model, const Weights& weights, bool as_bf16, std::mt19937_64& rng) {
    for (const auto& [name, values] : weights) {
        INFO(name);
        std::vector<float> expected = as_bf16 ? round_to_bf16(values) : values, read;
        model.read(name, read);
        CHECK(read == expected);
        int64_t columns = name.find("norm") == std::string::npos ? (name.find("down_proj") == std::string::npos ? model.shape().hidden : model.shape().intermediate) : 1;
        int64_t rows = int64_t(values.size()) / columns, begin = int64_t(rng() % rows), count = int64_t(rng() % (rows - begin + 1));
        model.read(name, read, begin, count);
        CHECK(read == std::vector<float>(expected.begin() + begin * columns, expected.begin() + (begin + count) * columns));
    }
}

void check_shape(const LlamaShape& a, const LlamaShape& b) {
    CHECK(a.hidden == b.hidden);
    CHECK(a.intermediate == b.intermediate);
    CHECK(a.layers == b.layers);
    CHECK(a.heads == b.heads);
    CHECK(a.kv_heads == b.kv_heads);
    CHECK(a.head_dim == b.head_dim);
    CHECK(a.vocab == b.vocab);
    CHECK(a.max_positions == b.max_positions);
    CHECK(a.rms_eps == b.rms_eps);
    CHECK(a.rope_base == b.rope_base);
    CHECK(a.tie_embeddings == b.tie_embeddings);
    CHECK(a.bos_id == b.bos_id);
    CHECK(a.eos_id == b.eos_id);
    CHECK(a.pad_id == b.pad_id);
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
    REQUIRE(has(text, from));
    return text.replace(text.find(from), from.size(), to);
}

}  // namespace

TEST_CASE("hf: export and import are inverse", "[hf]") {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (DType dtype : {DType::f32, DType::bf16})
        for (bool tied : {false, true})
            for (int64_t shard_bytes : {int64_t(5000000000), int64_t(1500), int64_t(1)}) {
                LlamaShape shape = small_shape();
                shape.tie_embeddings = tied;
                shape.pad_id = tied ? 0 : -1;
                Weights weights = random_weights(shape, rng);
                TempDir dir;
                std::string out = dir / "export";
                export_huggingface(out, shape, to_export(shape, weights), dtype, "", shard_bytes);
                CHECK(std::filesystem::exists(out + "/model.safetensors.index.json") == (shard_bytes < 5000000000));
                CHECK(std::filesystem::exists(out + "/model.safetensors") == (shard_bytes == 5000000000));
                CHECK(std::filesystem::exists(out + "/generation_config.json"));
                HfModel model = HfModel::open(out);
                check_shape(model.shape(), shape);
                check_weights(model, weights, dtype == DType::bf16, rng);
                if (tied) {
                    std::vector<float> head, embedding;
                    model.read("lm_head.weight", head);
                    model.read("model.embed_tokens.weight", embedding);
                    CHECK(head == embedding);
                }
                // A directory with anything in it is left as it is.
                std::string text = user_error([&] { export_huggingface(out, shape, to_export(shape, weights), dtype, ""); });
                CHECK(has(text, out));
                CHECK(has(text, "not empty"));
            }
}

TEST_CASE("hf: a failed export leaves nothing behind", "[hf]") {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    LlamaShape shape = small_shape();
    Weights weights = random_weights(shape, rng);
    TempDir dir;
    std::string existing = dir / "empty";
    std::filesystem::create_directory(existing);
    for (int64_t shard_bytes : {int64_t(5000000000), int64_t(3000)})
        for (const std::string& out : {dir / "new", existing}) {
            {
                FileSizeLimit limit(2000);
                user_error([&] { export_huggingface(out, shape, to_export(shape, weights), DType::f32, "", shard_bytes); });
            }
            CHECK(std::filesystem::exists(out) == (out == existing));
            CHECK(dir.files() == 1);
            CHECK(std::filesystem::is_empty(existing));
        }
    CHECK(has(user_error([&] { export_huggingface(dir / "new", shape, to_export(shape, weights), DType::f32, dir / "no.model"); }), "no.model"));
    CHECK(dir.files() == 1);
    auto incomplete = to_export(shape, weights);
    incomplete.pop_back();
    CHECK_THROWS_AS(export_huggingface(dir / "new", shape, incomplete, DType::f32, ""), InternalError);
    export_huggingface(existing, shape, to_export(shape, weights), DType::f32, "");
    HfModel::open(existing);
}

TEST_CASE("hf: the tokenizer goes along", "[hf]") {
    std::mt19937_64 rng(1);
    LlamaShape shape = small_shape();
    Weights weights = random_weights(shape, rng);
    TempDir dir;
    put_file(dir / "spiece.model", "model bytes");
    put_file(dir / "t.json", "{\"added_tokens\":[{\"id\":2,\"content\":\"</s>\"},{\"id\":3,\"content\":\"x\"}]}");
    export_huggingface(dir / "a", shape, to_export(shape, weights), DType::f32, dir / "spiece.model");
    CHECK(file_bytes(dir / "a/sentencepiece.model") == "model bytes");
    export_huggingface(dir / "b", shape, to_export(shape, weights), DType::f32, dir / "t.json");
    CHECK(file_bytes(dir / "b/tokenizer.json") == file_bytes(dir / "t.json"));
    CHECK(has(file_bytes(dir / "b/tokenizer_config.json"), "\"eos_token\": \"</s>\""));
}

TEST_CASE("hf: models this program cannot train are refused in one line", "[hf]") {
    std::mt19937_64 rng(1);
    LlamaShape shape = small_shape();
    Weights weights = random_weights(shape, rng);
    TempDir dir;
    std::string out = dir / "m", config = out + "/config.json";
    export_huggingface(out, shape, to_export(shape, weights), DType::f32, "");
    const std::string good = file_bytes(config);
    auto refusal = [&](const std::string& from, const std::string& to) {
        put_file(config, replaced(good, from, to));
        std::string text = user_error([&] { HfModel::open(out); });
        CHECK(has(text, out));
        CHECK_FALSE(has(text, "\n"));
        return text;
    };
    CHECK(has(refusal("\"model_type\": \"llama\"", "\"model_type\": \"mistral\""), "mistral"));
    CHECK(has(refusal("LlamaForCausalLM", "LlamaForSequenceClassification"), "LlamaForSequenceClassification"));
    CHECK(has(refusal("\"attention_bias\": false", "\"attention_bias\": true"), "attention_bias"));
    CHECK(has(refusal("\"mlp_bias\": false", "\"mlp_bias\": true"), "mlp_bias"));
    CHECK(has(refusal("\"silu\"", "\"gelu\""), "gelu"));
    CHECK(has(refusal("\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2.0}"), "linear"));
    CHECK(has(refusal("\"rope_type\": \"default\"", "\"rope_type\": \"llama3\""), "llama3"));
    CHECK(has(refusal("\"use_cache\": true", "\"quantization_config\": {}"), "quantized"));
    CHECK(has(refusal("\"hidden_size\": 12", "\"hidden_size\": 13"), "[11, 12] and config.json says [11, 13]"));
    CHECK(has(refusal("\"hidden_size\": 12", "\"hidden_size\": \"twelve\""), "hidden_size"));
    CHECK(has(refusal("\"hidden_size\": 12,", ""), "hidden_size"));
    CHECK(has(refusal("\"vocab_size\": 11", "\"vocab_size\": -11"), "vocab_size"));
    CHECK(has(refusal("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3"), "model.layers.2"));
    CHECK(has(refusal("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1"), "model.layers.1"));
    CHECK(has(refusal("{", ""), "not valid JSON"));
    // Keys that say nothing new may be missing or null.
    put_file(config, replaced(replaced(good, "\"head_dim\": 3,", ""), "\"rope_parameters\"", "\"ignored\""));
    check_shape(HfModel::open(out).shape(), shape);
    put_file(config, replaced(good, "\"eos_token_id\": 2", "\"eos_token_id\": [2, 5]"));
    CHECK(HfModel::open(out).shape().eos_id == 2);
    put_file(config, good);
    std::string weights_file = out + "/model.safetensors", bytes = file_bytes(weights_file);
    bytes.back() = char(bytes.back() ^ 1);
    put_file(weights_file, bytes);
    CHECK(has(user_error([&] { HfModel::open(out); }), "checksum"));
    std::filesystem::remove(weights_file);
    CHECK(has(user_error([&] { HfModel::open(out); }), "neither"));
    CHECK(has(user_error([&] { HfModel::open(dir / "none"); }), "config.json"));
}

// Directories that transformers wrote (make_llama_fixture.py); exported again for test_safetensors_interop.py to load.
TEST_CASE("hf: models of transformers", "[hf]") {
    HfModel tiny = HfModel::open(repository_path("test/fixtures/llama_tiny"));
    LlamaShape s = tiny.shape();
    CHECK(s.hidden == 64);
    CHECK(s.intermediate == 171);
    CHECK(s.heads == 4);
    CHECK(s.kv_heads == 2);
    CHECK(s.head_dim == 16);
    CHECK(s.vocab == 97);
    CHECK(s.rope_base == 10000.0);
    CHECK(s.rms_eps == 1e-6);
    CHECK_FALSE(s.tie_embeddings);
    SafetensorsReader reference(repository_path("test/fixtures/llama_tiny/reference.safetensors"));
    for (const WeightShape& w : llama_weights(s)) CHECK(reference.entry("grad." + w.name).shape == w.shape);

    std::vector<HfTensor> list;
    for (const WeightShape& w : llama_weights(s)) list.push_back({w.name, w.shape, [&tiny, name = w.name](std::vector<float>& out) { tiny.read(name, out); }});
    const std::string output = repository_path("build/test-output");
    std::filesystem::remove_all(output + "/export_f32");
    std::filesystem::remove_all(output + "/export_bf16");
    export_huggingface(output + "/export_f32", s, list, DType::f32, "");
    export_huggingface(output + "/export_bf16", s, list, DType::bf16, "", 100000);
    std::vector<float> a, b;
    HfModel::open(output + "/export_f32").read("lm_head.weight", a);
    tiny.read("lm_head.weight", b);
    CHECK(a == b);

    // The weights of llama_gpu are stored in bf16.
    HfModel gpu = HfModel::open(repository_path("test/fixtures/llama_gpu"));
    CHECK(gpu.shape().head_dim == 64);
    gpu.read("lm_head.weight", a);
    CHECK(a == round_to_bf16(a));
    CHECK(SafetensorsModel(repository_path("test/fixtures/llama_gpu")).entry("lm_head.weight").dtype == "BF16");
}

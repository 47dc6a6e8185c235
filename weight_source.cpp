#include "weight_source.h"

#include <memory>
#include <mutex>
#include <utility>

#include "ops/random.h"
#include "runtime/hf.h"

namespace {

// FNV-1a: a tensor's random stream follows from its name, so layers can be added without moving the others' numbers.
uint32_t stream_of(const std::string& name) {
    uint32_t hash = 2166136261u;
    for (unsigned char c : name) hash = (hash ^ c) * 16777619u;
    return hash;
}

bool is_norm(const std::string& name) { return name.find("norm") != std::string::npos; }

}  // namespace

WeightSource random_weights(const Config& config) {
    uint64_t seed = uint64_t(config.train.seed);
    float std_dev = float(config.model.init_std);
    return [seed, std_dev](Device& device, const std::string& name, int64_t row_begin, Tensor rows) {
        if (is_norm(name)) fill(device, rows, 1.0f);
        else fill_normal(device, rows, std_dev, seed, stream_of(name), uint64_t(row_begin * rows.cols));
    };
}

WeightSource host_weights(HostWeights read) {
    struct Matrix {  // the last one read: a large one is asked for in pieces
        std::mutex mutex;
        std::string name;
        std::vector<float> values;
    };
    return [read = std::move(read), last = std::make_shared<Matrix>()](Device& device, const std::string& name, int64_t row_begin, Tensor rows) {
        std::lock_guard<std::mutex> lock(last->mutex);
        if (last->name != name) read(name, last->values);
        last->name = name;
        int64_t begin = row_begin * rows.cols;
        CHECK_INTERNAL(begin + rows.numel() <= int64_t(last->values.size()), "%s has %zu elements", name.c_str(), last->values.size());
        if (rows.contiguous()) return device.upload(rows.data, last->values.data() + begin, rows.bytes());
        for (int64_t r = 0; r < rows.rows; ++r) device.upload(rows.at(r, 0), last->values.data() + begin + r * rows.cols, rows.cols * int64_t(sizeof(float)));
    };
}

namespace {

void require_same(const char* key, int64_t configured, int64_t found, const std::string& directory) {
    if (configured != found)
        throw UserError(format("%s: %s has %lld, the configuration %lld", key, directory.c_str(), (long long)found, (long long)configured));
}

}  // namespace

WeightSource huggingface_weights(const Config& config, const std::string& directory) {
    auto model = std::make_shared<HfModel>(HfModel::open(directory));
    const LlamaShape& s = model->shape();
    require_same("model.hidden", config.model.hidden, s.hidden, directory);
    require_same("model.intermediate", config.model.intermediate, s.intermediate, directory);
    require_same("model.layers", config.model.layers, s.layers, directory);
    require_same("model.heads", config.model.heads, s.heads, directory);
    require_same("model.kv_heads", config.kv_heads(), s.kv_heads, directory);
    require_same("head size", config.model.head_dim(), s.head_dim, directory);
    require_same("model.vocab", config.model.vocab, s.vocab, directory);
    if (config.model.rms_eps != s.rms_eps) throw UserError(format("model.rms_eps: %s has %g, the configuration %g", directory.c_str(), s.rms_eps, config.model.rms_eps));
    if (config.model.rope_base != s.rope_base)
        throw UserError(format("model.rope_base: %s has %g, the configuration %g", directory.c_str(), s.rope_base, config.model.rope_base));
    return host_weights([model](const std::string& name, std::vector<float>& values) { model->read(name, values); });
}

void adopt_huggingface_shape(Config& config, const std::string& directory) {
    HfModel model = HfModel::open(directory);
    const LlamaShape& s = model.shape();
    if (s.head_dim * s.heads != s.hidden)
        throw UserError(format("%s: %lld heads of %lld are not the hidden width %lld; such models are not supported", directory.c_str(), (long long)s.heads, (long long)s.head_dim, (long long)s.hidden));
    ModelConfig& m = config.model;
    m.hidden = s.hidden, m.intermediate = s.intermediate, m.layers = s.layers, m.heads = s.heads, m.kv_heads = s.kv_heads;
    m.vocab = s.vocab, m.rms_eps = s.rms_eps, m.rope_base = s.rope_base;
}

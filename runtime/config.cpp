// Configuration: JSON, overrides, validation. See config.h.
#include "runtime/config.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "runtime/error.h"

using json = nlohmann::ordered_json;
namespace fs = std::filesystem;

namespace {

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
    return parts;
}

// Levenshtein distance, for "did you mean".
size_t edit_distance(const std::string& a, const std::string& b) {
    std::vector<size_t> row(b.size() + 1);
    for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
    for (size_t i = 1; i <= a.size(); ++i) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= b.size(); ++j) {
            size_t cost = std::min({row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1])});
            diagonal = row[j];
            row[j] = cost;
        }
    }
    return row[b.size()];
}

std::vector<std::string> all_keys() {
    std::vector<std::string> keys;
    Config c;
    visit_config(c, [&](const char* path, auto&, const char*, const char*) { keys.push_back(path); });
    return keys;
}

std::string last_part(const std::string& key) { return key.substr(key.rfind('.') + 1); }

// The candidate with the least edit distance to name, and that distance.
std::pair<std::string, size_t> nearest_of(const std::string& name, const std::vector<std::string>& others) {
    std::pair<std::string, size_t> best{"", size_t(-1)};
    auto consider = [&](const std::string& form, const std::string& meaning) {
        size_t distance = edit_distance(name, form);
        if (distance < best.second) best = {meaning, distance};
    };
    for (const std::string& key : all_keys()) consider(key, key), consider(last_part(key), key);
    for (const std::string& other : others) consider(other, other);
    return best;
}

std::string nearest_key(const std::string& name) { return nearest_of(name, {}).first; }

[[noreturn]] void bad_value(const std::string& key, const std::string& value, const std::string& wanted) {
    throw UserError(key + ": got " + value + ", expected " + wanted);
}

void check_choice(const std::string& key, const std::string& value, const std::string& choices) {
    if (choices.empty()) return;
    for (const std::string& choice : split(choices, '|'))
        if (choice == value) return;
    bad_value(key, '"' + value + '"', "one of " + choices);
}

// From JSON, strictly typed.
void assign(const std::string& key, int64_t& field, const json& value, const char*) {
    if (value == "auto" && key == "train.micro_batch") { field = 0; return; }
    if (value.is_number_integer()) { field = value.get<int64_t>(); return; }
    if (value.is_number_float() && std::floor(value.get<double>()) == value.get<double>()) { field = int64_t(value.get<double>()); return; }
    bad_value(key, value.dump(), "a whole number");
}
void assign(const std::string& key, double& field, const json& value, const char*) {
    if (!value.is_number()) bad_value(key, value.dump(), "a number");
    field = value.get<double>();
}
void assign(const std::string& key, bool& field, const json& value, const char*) {
    if (!value.is_boolean()) bad_value(key, value.dump(), "true or false");
    field = value.get<bool>();
}
void assign(const std::string& key, std::string& field, const json& value, const char* choices) {
    if (!value.is_string()) bad_value(key, value.dump(), "text in quotes");
    check_choice(key, value.get<std::string>(), choices);
    field = value.get<std::string>();
}

// From the command line: the text becomes the JSON value of the field's type.
json parse_text(const std::string& key, const std::string& text, int64_t) {
    if (text == "auto" && key == "train.micro_batch") return text;
    try {
        size_t used = 0;
        long long value = std::stoll(text, &used);
        if (used == text.size()) return value;
    } catch (const std::exception&) {
    }
    bad_value(key, '"' + text + '"', "a whole number");
}
json parse_text(const std::string& key, const std::string& text, double) {
    try {
        size_t used = 0;
        double value = std::stod(text, &used);
        if (used == text.size() && std::isfinite(value)) return value;
    } catch (const std::exception&) {
    }
    bad_value(key, '"' + text + '"', "a number");
}
json parse_text(const std::string& key, const std::string& text, bool) {
    if (text == "true" || text == "1") return true;
    if (text == "false" || text == "0") return false;
    bad_value(key, '"' + text + '"', "true or false");
}
json parse_text(const std::string&, const std::string& text, const std::string&) { return text; }

void set_key(Config& config, const std::string& key, const json& value) {
    visit_config(config, [&](const char* path, auto& field, const char*, const char* choices) {
        if (key == path) assign(key, field, value, choices);
    });
}

void require(bool condition, const std::string& message) {
    if (!condition) throw UserError(message);
}

}  // namespace

int64_t parse_bytes(const std::string& text) {
    char* end = nullptr;
    double value = std::strtod(text.c_str(), &end);
    std::string unit = end;
    double factor = unit == "B" ? 1 : unit == "KiB" ? 1024.0 : unit == "MiB" ? 1048576.0 : unit == "GiB" ? 1073741824.0
                  : unit == "kB" ? 1e3 : unit == "MB" ? 1e6 : unit == "GB" ? 1e9 : 0;
    if (end != text.c_str() && unit.empty()) throw UserError("\"" + text + "\" has no unit; write " + text + "GiB or " + text + "MiB");
    if (end == text.c_str() || factor == 0 || !(value * factor >= 1) || value * factor > 9e18)
        throw UserError("\"" + text + "\" is not an amount of memory; write it like 24GiB or 512MiB");
    return int64_t(value * factor);
}

std::string find_config_file(const std::string& name, const std::string& binary_path) {
    std::error_code ignored;
    fs::path presets = fs::absolute(binary_path, ignored).parent_path() / "configs";
    for (const fs::path& candidate : {fs::path(name), presets / name, presets / (name + ".json")})
        if (fs::is_regular_file(candidate, ignored)) return candidate.string();
    std::string list;
    if (fs::is_directory(presets, ignored)) {
        std::vector<std::string> names;
        for (auto& entry : fs::directory_iterator(presets)) names.push_back(entry.path().filename().string());
        std::sort(names.begin(), names.end());
        for (auto& preset : names) list += " " + preset;
    }
    throw UserError("--config " + name + ": no such file, here or in " + presets.string() + (list.empty() ? "" : " (presets:" + list + ")"));
}

void read_config_file(Config& config, const std::string& path) {
    std::ifstream file(path);
    require(bool(file), "cannot open config " + path);
    read_config_text(config, std::string(std::istreambuf_iterator<char>(file), {}), path);
}

void read_config_text(Config& config, const std::string& text, const std::string& path) {
    json root;
    try {
        root = json::parse(text, nullptr, true, /*ignore_comments=*/true);
    } catch (const json::parse_error& error) {
        throw UserError(path + ": not valid JSON at byte " + std::to_string(error.byte));
    } catch (const json::exception&) {
        throw UserError(path + ": it has a number beyond the range of double precision");
    }
    require(root.is_object(), path + ": expected one JSON object with sections model, method, optimizer, data, train, eval, checkpoint, run");
    std::vector<std::string> keys = all_keys();
    for (auto& [section, content] : root.items()) {
        if (!content.is_object()) {
            std::string nearest = nearest_key(section);
            throw UserError(path + ": \"" + section + "\" is not a section; did you mean \"" + last_part(nearest) + "\" inside \"" +
                            nearest.substr(0, nearest.find('.')) + "\"?");
        }
        for (auto& [name, value] : content.items()) {
            std::string key = section + "." + name;
            if (std::find(keys.begin(), keys.end(), key) == keys.end())
                throw UserError(path + ": unknown key \"" + key + "\"; did you mean \"" + nearest_key(key) + "\"?");
            set_key(config, key, value);
        }
    }
}

std::string short_name(const std::string& key) { return key == "method.name" ? "method" : last_part(key); }

std::string default_text(const std::string& key) {
    size_t dot = key.find('.');
    return json::parse(config_to_json(Config()))[key.substr(0, dot)][key.substr(dot + 1)].dump();
}

std::string resolve_key(const std::string& name, const std::vector<std::string>& other_options) {
    std::vector<std::string> candidates;
    for (const std::string& key : all_keys()) {
        if (key == name) return key;
        if (short_name(key) == name) candidates.push_back(key);
    }
    if (candidates.size() == 1) return candidates[0];
    if (candidates.empty()) {
        auto [nearest, distance] = nearest_of(name, other_options);
        bool near = distance <= std::max<size_t>(2, name.size() / 3);
        throw UserError("unknown option --" + name + (near ? "; did you mean --" + nearest + "?" : "; see --help"));
    }
    std::string list;
    for (auto& c : candidates) list += " --" + c;
    throw UserError("--" + name + " is ambiguous:" + list);
}

void apply_override(Config& config, const Override& override) {
    std::string key = resolve_key(override.key);
    visit_config(config, [&](const char* path, auto& field, const char*, const char* choices) {
        if (key == path) assign(key, field, parse_text(key, override.value, field), choices);
    });
}

std::string config_to_json(const Config& config) {
    json root;
    visit_config(config, [&](const std::string& path, const auto& field, const char*, const char*) {
        size_t dot = path.find('.');
        root[path.substr(0, dot)][path.substr(dot + 1)] = field;
    });
    return root.dump(2) + "\n";
}

std::string stored_config(const Config& config) {
    Config stored = config;
    if (stored.stored_micro_batch) stored.train.micro_batch = stored.stored_micro_batch;
    return config_to_json(stored);
}

void validate_config(Config& c) {
    auto positive = [](const char* key, auto value) {
        require(value > 0, std::string(key) + ": got " + json(value).dump() + ", must be positive");
    };
    // Far beyond what any device holds or run takes, and low enough that no size in bytes or sum of steps overflows.
    auto at_most = [](const char* key, int64_t value, int64_t limit) {
        require(value <= limit, std::string(key) + ": got " + json(value).dump() + ", must be at most " + json(limit).dump());
    };
    auto fraction = [](const char* key, double value) {
        require(value >= 0 && value <= 1, std::string(key) + ": got " + json(value).dump() + ", must lie in [0, 1]");
    };
    positive("model.hidden", c.model.hidden), positive("model.intermediate", c.model.intermediate), positive("model.heads", c.model.heads);
    positive("model.layers", c.model.layers), positive("model.vocab", c.model.vocab), positive("model.rms_eps", c.model.rms_eps);
    positive("model.rope_base", c.model.rope_base), positive("model.init_std", c.model.init_std);
    at_most("model.hidden", c.model.hidden, 1 << 20), at_most("model.intermediate", c.model.intermediate, 1 << 20), at_most("model.layers", c.model.layers, 1 << 12);
    at_most("model.vocab", c.model.vocab, 1 << 24);
    require(c.model.hidden % c.model.heads == 0, format("model.heads: %lld does not divide model.hidden %lld", (long long)c.model.heads, (long long)c.model.hidden));
    require(c.model.head_dim() % 2 == 0, format("model.heads: head size %lld is odd; rotary embedding needs an even one", (long long)c.model.head_dim()));
    require(c.model.kv_heads >= 0, "model.kv_heads: must not be negative");
    c.model.kv_heads = c.kv_heads();
    require(c.model.heads % c.model.kv_heads == 0, format("model.kv_heads: %lld does not divide model.heads %lld", (long long)c.model.kv_heads, (long long)c.model.heads));
    // Of all widths only the intermediate one is padded in memory where it is no multiple of 8 (see padded_width in loqt.h).
    require(c.model.hidden % 8 == 0, format("model.hidden: %lld is not a multiple of 8", (long long)c.model.hidden));
    require(c.kv_heads() * c.model.head_dim() % 8 == 0, format("model.kv_heads: %lld heads of %lld are %lld columns, not a multiple of 8", (long long)c.model.kv_heads,
                                                               (long long)c.model.head_dim(), (long long)(c.kv_heads() * c.model.head_dim())));

    if (c.method.name != "full") {
        positive("method.rank", c.method.rank);
        int64_t side = std::min(c.model.hidden, c.model.intermediate);  // narrower key/value matrices use min(rank, side)
        require(c.method.rank <= side, format("method.rank: %lld is larger than the matrix side %lld; lower it", (long long)c.method.rank, (long long)side));
        require(std::isfinite(c.method.scale) && c.method.scale > 0, "method.scale: must be positive");
        require(c.method.compensation_rounds >= 0, "method.compensation_rounds: must not be negative");
        require(std::isfinite(c.method.lora_alpha) && c.method.lora_alpha > 0, "method.lora_alpha: must be positive");
        require(c.method.loftq_rounds >= 1, "method.loftq_rounds: must be at least 1");
        fraction("method.relora_prune", c.method.relora_prune);
        require(c.method.relora_warmup >= 0, "method.relora_warmup: must not be negative");
        require(c.method.name != "galore" || c.optimizer.rounding != "master",
                "optimizer.rounding: master keeps what Adam's own updates lose, and galore's are not Adam's own; use stochastic or nearest");
        positive("method.merge_gap", c.method.merge_gap), positive("method.relora_gap", c.method.relora_gap);
        require(c.method.name != "relora" || c.method.relora_warmup < c.method.relora_gap,
                format("method.relora_warmup: got %lld, must be below method.relora_gap %lld, else the next restart comes before the rate has risen; lower it or raise relora_gap",
                       (long long)c.method.relora_warmup, (long long)c.method.relora_gap));
        const int64_t longest = int64_t(1) << 40;
        at_most("method.merge_gap", c.method.merge_gap, longest), at_most("method.max_gap", c.method.max_gap, longest), at_most("method.relora_gap", c.method.relora_gap, longest);
        require(c.method.merge_growth == 0 || c.method.merge_growth >= 1, "method.merge_growth: must be 0 (fixed gap) or at least 1");
        require(c.method.max_gap == 0 || c.method.max_gap >= c.method.merge_gap, "method.max_gap: must be 0 or at least method.merge_gap");
    }
    positive("optimizer.lr", c.optimizer.lr), positive("optimizer.eps", c.optimizer.eps);
    // Beyond these the arithmetic in single precision would make infinities and 0/0 of finite gradients.
    require(c.optimizer.lr <= 1e38, "optimizer.lr: got " + json(c.optimizer.lr).dump() + ", must be at most 1e38");
    require(c.optimizer.eps >= 1e-30, "optimizer.eps: got " + json(c.optimizer.eps).dump() + ", must be at least 1e-30");
    fraction("optimizer.min_lr_ratio", c.optimizer.min_lr_ratio), fraction("optimizer.warmup_ratio", c.optimizer.warmup_ratio);
    require(c.optimizer.beta1 >= 0 && c.optimizer.beta1 < 1, "optimizer.beta1: must lie in [0, 1)");
    require(c.optimizer.beta2 >= 0 && c.optimizer.beta2 < 1, "optimizer.beta2: must lie in [0, 1)");
    require(c.optimizer.weight_decay >= 0, "optimizer.weight_decay: must not be negative");
    require(c.optimizer.clip >= 0, "optimizer.clip: must not be negative");
    positive("train.steps", c.train.steps), positive("train.seq_len", c.train.seq_len), positive("train.batch", c.train.batch);
    at_most("train.steps", c.train.steps, 1000000000), at_most("train.seq_len", c.train.seq_len, 1 << 24), at_most("train.batch", c.train.batch, 1 << 24);
    require(c.train.micro_batch >= 0, "train.micro_batch: must be positive, or auto");
    require(c.run.gpus >= 0, "run.gpus: must be positive, or 0 for all");
    require(c.train.batch % c.world_size == 0,
            format("train.batch: %lld sequences cannot be shared evenly by %lld processes; take a number of GPUs that divides it, or in a new run another batch", (long long)c.train.batch, (long long)c.world_size));
    require(c.train.micro_batch == 0 || c.rank_batch() % c.train.micro_batch == 0,
            c.world_size == 1 ? format("train.micro_batch: %lld does not divide train.batch %lld", (long long)c.train.micro_batch, (long long)c.train.batch)
                              : format("train.micro_batch: %lld does not divide the %lld sequences that each of %lld GPUs has in a step (train.batch %lld)", (long long)c.train.micro_batch,
                                       (long long)c.rank_batch(), (long long)c.world_size, (long long)c.train.batch));
    if (c.train.updates == "per_layer") {
        // Each gradient is used up as soon as it is there: none is left to sum over micro-batches or to take a global norm of.
        std::string wrong;
        if (c.train.micro_batch != 0 && c.train.micro_batch != c.rank_batch())
            wrong = format("needs the whole batch in one micro-batch, but train.micro_batch is %lld of %lld sequences (set it to auto and train.batch as low as memory asks for)",
                           (long long)c.train.micro_batch, (long long)c.rank_batch());
        if (c.optimizer.clip != 0) wrong += std::string(wrong.empty() ? "" : ", and ") + "knows no global gradient norm to clip by (set optimizer.clip to 0)";
        require(wrong.empty(), "train.updates: per_layer " + wrong + "; or use ordinary updates");
    }
    require(c.eval.every >= 0 && c.eval.sequences >= 0, "eval.every and eval.sequences: must not be negative");
    require(c.checkpoint.every >= 0 && c.checkpoint.keep_every >= 0, "checkpoint.every and checkpoint.keep_every: must not be negative");
    require(c.checkpoint.keep_last >= 1, "checkpoint.keep_last: must be at least 1, else a run could not be resumed");
    positive("run.log_every", c.run.log_every);
    require(c.world_size == 1 || c.run.device.rfind("cuda:", 0) != 0,
            format("run.gpus: %lld processes take a GPU each, but run.device %s names one; leave out its number, and choose GPUs by CUDA_VISIBLE_DEVICES", (long long)c.world_size, c.run.device.c_str()));
    require(c.run.comm_timeout > 0, "run.comm_timeout: must be positive");
    require(c.run.verify_every >= 0, "run.verify_every: must not be negative");
    const std::string& device = c.run.device;
    require(device == "auto" || device == "cpu" || device == "cuda" || device.rfind("cuda:", 0) == 0, "run.device: got \"" + device + "\", expected auto, cpu, cuda or cuda:N");
    if (!c.run.memory_budget.empty()) parse_bytes(c.run.memory_budget);
}

std::vector<std::string> config_differences(const Config& a, const Config& b) {
    std::vector<std::string> differences;
    json ja = json::parse(config_to_json(a)), jb = json::parse(config_to_json(b));
    for (auto& [section, content] : ja.items())
        for (auto& [name, value] : content.items())
            if (jb[section][name] != value) differences.push_back(section + "." + name + ": " + value.dump() + " -> " + jb[section][name].dump());
    return differences;
}

bool fixed_for_resume(const std::string& key) {
    // rank and layer shapes decide the tensors, s of W + s·P·B what they mean; seed, sequence length and layout decide which sample comes next.
    static const std::vector<std::string> fixed = {"method.name", "method.rank", "method.scale", "method.lora_alpha", "method.double_quant", "method.quantize_projection", "optimizer.moments", "optimizer.embedding_moments",
                                                   "optimizer.rounding",
                                                   "train.seed", "train.seq_len", "train.batch", "data.layout", "data.shuffle", "data.pad_id"};
    return key.rfind("model.", 0) == 0 || std::find(fixed.begin(), fixed.end(), key) != fixed.end();
}

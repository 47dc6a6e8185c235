#include "arguments.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "parameter.h"
#include "remarks.h"
#include "runtime/device.h"
#include "weight_source.h"

namespace fs = std::filesystem;

namespace {

// What the paper's own runs did where the defaults do otherwise (README: What differs from the paper's code). Other options go on top.
const std::vector<Override> kPaper = {{"optimizer.moments", "bf16-nearest"}, {"optimizer.rounding", "nearest"}, {"optimizer.clip", "0"}, {"train.gradients", "bf16"},
                                      {"method.projection", "gram"}, {"method.projection_gradient", "last"}, {"method.moments_at_merge", "keep"},
                                      {"method.merge_gap", "100"}, {"method.merge_growth", "1.2"}, {"data.layout", "rows"}, {"eval.official_perplexity", "true"}};

// Every configuration key becomes an option under its full name, and under its last part where that is unambiguous.
void add_config_options(CLI::App& app, std::vector<std::pair<std::string, std::string>>& values) {
    Config defaults;
    visit_config(defaults, [&](const std::string& path, auto&, const char*, const char*) { values.push_back({path, ""}); });
    size_t i = 0;
    visit_config(defaults, [&](const std::string& path, auto&, const std::string& help, const std::string& choices) {
        std::string names = "--" + path, section = path.substr(0, path.find('.')), last = short_name(path);
        try {
            if (resolve_key(last) == path) names += ",--" + last;
        } catch (const UserError&) {  // ambiguous: the full name only
        }
        app.add_option(names, values[i++].second, help + (choices.empty() ? "" : " (" + choices + ")") + " [" + default_text(path) + "]")->group(section)->type_name("VALUE");
    });
}

std::vector<std::string> option_names(const CLI::App& app) {
    std::vector<std::string> names;
    for (const CLI::Option* option : app.get_options())
        for (const std::string& name : option->get_lnames()) names.push_back(name);
    return names;
}

// The arguments with configuration keys spelled as they are here: --init-from is --init_from.
std::vector<std::string> with_underscores(int argc, char** argv) {
    std::vector<std::string> arguments(argv, argv + argc);
    for (std::string& argument : arguments) {
        if (argument.rfind("--", 0) != 0) continue;
        size_t end = std::min(argument.find('='), argument.size());
        std::string key = argument.substr(2, end - 2);
        std::replace(key.begin(), key.end(), '-', '_');
        try {
            resolve_key(key);
            argument.replace(2, end - 2, key);
        } catch (const UserError&) {  // an option of another kind, or a mistake that parsing will name
        }
    }
    return arguments;
}

// A run is resumed with its own config.json: where the file named beside --resume differs, leaving out what a run resolves itself.
std::string ignored_file_remark(const std::string& name, Config file, const Config& stored) {
    file.run.dir = stored.run.dir, file.train.micro_batch = stored.train.micro_batch;
    file.train.effective_weights = stored.train.effective_weights, file.train.recompute = stored.train.recompute, file.model.kv_heads = stored.model.kv_heads;
    std::string list;
    for (const std::string& difference : config_differences(file, stored)) list += (list.empty() ? "" : ", ") + difference;
    return list.empty() ? "" : "resuming with the run's own config.json, which differs from " + name + ": " + list;
}

// On the command line, in so many words: what --paper sets does not count.
bool was_given(const Arguments& a, const char* key) {
    return std::any_of(a.overrides.begin() + (a.paper ? kPaper.size() : 0), a.overrides.end(), [&](const Override& o) { return o.key == key; });
}

// A stored micro-batch may be for another number of ranks: the largest up to it that every rank's share of a batch is a multiple of, for this time.
void fit_micro_batch(const Arguments& a, Config& config) {
    if (was_given(a, "train.micro_batch") || was_given(a, "train.updates")) return;
    int64_t& rows = config.train.micro_batch;
    if (rows == 0 || config.train.batch % config.world_size) return;
    const int64_t stored = rows;
    rows = std::min(rows, config.rank_batch());
    while (config.rank_batch() % rows) --rows;
    if (updates_per_layer(config)) rows = config.rank_batch();
    if (rows != stored) config.stored_micro_batch = stored;
}

}  // namespace

Arguments parse(int argc, char** argv) {
    Arguments a;
    std::error_code ignored;
    fs::path binary = fs::read_symlink("/proc/self/exe", ignored);
    a.program_dir = (ignored ? fs::absolute(argv[0]) : binary).parent_path().string();
    CLI::App app{"Pretrains LLaMA models with LoQT: quantized weights, low-rank adapters, one small GPU."};
    app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
    app.add_option("-c,--config", a.config_file, "configuration file, or the name of a preset in configs/");
    app.add_flag("--resume", a.resume, "continue the run in --run.dir from its newest valid checkpoint");
    app.add_flag("--plan", a.plan, "print the memory plan and exit; needs no GPU");
    app.add_flag("--json", a.json, "print the plan as JSON (docs/formats.md); only with --plan");
    app.add_flag("--paper", a.paper, "settings of the paper's own runs where the defaults differ");
    auto* sample = app.add_option("--sample", a.sampling.prompt, "generate text after this prompt from the run's newest checkpoint");
    app.add_option("--sample-tokens", a.sampling.tokens, "tokens to generate [128]");
    app.add_option("--temperature", a.sampling.temperature, "sampling temperature; 0 = the likeliest token [0.8]");
    app.add_option("--top-k", a.sampling.top_k, "sample from the k likeliest tokens; 0 = all [50]");
    app.add_option("--sample-seed", a.sampling.seed, "seed of the sample [0]");
    app.add_option("--export", a.export_dir, "write the run's newest checkpoint as a plain Hugging Face LLaMA to this directory");
    app.add_option("--export-dtype", a.export_dtype, "bf16 or f32 [bf16]")->check(CLI::IsMember({"bf16", "f32"}));
    std::vector<std::pair<std::string, std::string>> values;
    values.reserve(100);  // the options hold references
    add_config_options(app, values);
    app.allow_extras();
    std::vector<std::string> arguments = with_underscores(argc, argv);
    std::vector<const char*> pointers;
    for (const std::string& argument : arguments) pointers.push_back(argument.c_str());
    try {
        app.parse(argc, pointers.data());
    } catch (const CLI::CallForHelp&) {
        std::printf("%s", app.help().c_str());
        std::exit(0);
    } catch (const CLI::ParseError& error) {
        throw UserError(error.what());
    }
    for (const std::string& extra : app.remaining()) {
        if (extra.rfind("--", 0) == 0) resolve_key(extra.substr(2, extra.find('=') - 2), option_names(app));  // throws with the nearest
        throw UserError("unexpected argument \"" + extra + "\"; see --help");
    }
    a.sample = sample->count() > 0;
    if (a.json && !a.plan) throw UserError("--json is a way to print the plan; give --plan too");
    if (!(a.sampling.temperature >= 0)) throw UserError(format("--temperature: got %g, must not be negative", a.sampling.temperature));
    if (a.sampling.top_k < 0 || a.sampling.tokens < 0) throw UserError("--top-k and --sample-tokens: must not be negative");
    if (a.paper) a.overrides = kPaper;
    for (auto& [key, value] : values)
        if (app.count("--" + key)) a.overrides.push_back({key, value});
    return a;
}

int64_t processes_wanted(const Config& config) {
    const std::string& device = config.run.device;
    if (config.run.gpus == 1 || config.run.gpus < 0) return 1;
    if (device == "cpu" || device.rfind("cuda:", 0) == 0) return std::max<int64_t>(config.run.gpus, 1);  // of one GPU by its number: validate_config refuses several
    std::string why;
    const int64_t usable = Device::cuda_usable(&why) ? Device::cuda_count() : 0;
    if (usable == 0) throw UserError(format("run.gpus: no usable GPU: %s; --gpus 1 trains without one, --device cpu --gpus N by N processes on the CPU", why.c_str()));
    if (config.run.gpus > usable) throw UserError(format("run.gpus: %lld GPUs wanted, %lld are visible here", (long long)config.run.gpus, (long long)usable));
    return config.run.gpus ? config.run.gpus : usable;
}

Config configure(const Arguments& a, bool existing_run, const RankCount& ranks, std::vector<std::string>& changes, std::string& remark) {
    Config config;
    if (!a.config_file.empty()) {
        std::string file = find_config_file(a.config_file, a.program_dir + "/train_loqt");
        read_config_file(config, file);
        if (config.run.dir.empty()) config.run.dir = "runs/" + fs::path(file).stem().string();
    }
    Config given = config;
    for (const Override& o : a.overrides) apply_override(given, o);
    if (!existing_run) {
        if (a.config_file.empty()) throw UserError("no --config given; try --config tiny, or --help");
        if (!given.run.init_from.empty()) {
            // The model's shape replaces the config file's, but not what was asked for in so many words.
            Config adopted = given;
            adopt_huggingface_shape(adopted, given.run.init_from);
            for (const Override& o : a.overrides) {
                Config asked = adopted;
                apply_override(asked, o);
                if (o.key.rfind("model.", 0) == 0 && !config_differences(adopted, asked).empty())
                    throw UserError("--" + o.key + " " + o.value + " contradicts " + given.run.init_from + " (" + config_differences(adopted, asked)[0] + "); leave it out");
            }
            given = adopted;
        }
        given.world_size = ranks(given);
        validate_config(given);
        if (!a.plan) remark = method_remarks(a.config_file, config, given, [&](const char* key) { return was_given(a, key); });
        return given;
    }
    if (given.run.dir.empty()) throw UserError("which run? give --run.dir, or the --config it was started with");
    std::string file = (fs::path(given.run.dir) / "config.json").string();
    if (!fs::exists(file)) throw UserError(given.run.dir + " holds no run (no config.json)" + (a.resume ? "; start one without --resume" : "; which run do you mean?"));
    Config stored;
    stored.method.relora_gap = 0;  // stays 0 where the run is older than the key, when restarts went by merge_gap
    read_config_file(stored, file);
    if (stored.method.relora_gap == 0) stored.method.relora_gap = stored.method.name == "relora" ? stored.method.merge_gap : MethodConfig().relora_gap;
    Config resumed = stored;
    for (const Override& o : a.overrides) apply_override(resumed, o);
    resumed.run.dir = given.run.dir;
    for (const std::string& change : config_differences(stored, resumed))
        if (fixed_for_resume(change.substr(0, change.find(':'))))
            throw UserError("--resume cannot change " + change + "; the checkpoint was made with the first value");
    resumed.world_size = ranks(resumed);
    fit_micro_batch(a, resumed);
    validate_config(resumed);
    changes = config_differences(stored, resumed);
    if (a.resume && !a.config_file.empty()) remark = ignored_file_remark(a.config_file, config, stored);
    return resumed;
}

// train_loqt: pretrain LLaMA models with LoQT on one GPU, or on a CPU. See README.md; --help lists every option.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <unistd.h>

#include "flops.h"
#include "plan.h"
#include "runtime/hf.h"
#include "sample.h"
#include "trainer.h"
#include "weight_source.h"

namespace fs = std::filesystem;

namespace {

struct Arguments {
    std::string config_file, export_dir, export_dtype = "bf16";
    bool resume = false, plan = false, json = false, sample = false;
    SampleOptions sampling;
    std::vector<Override> overrides;
    std::string program_dir;
};

// What the paper's own runs did where the defaults do otherwise (README: What differs from the paper's code). Other options go on top.
const std::vector<Override> kPaper = {{"optimizer.moments", "bf16-nearest"}, {"optimizer.rounding", "nearest"}, {"optimizer.clip", "0"}, {"train.gradients", "bf16"},
                                      {"method.projection", "gram"}, {"method.moments_at_merge", "keep"}, {"data.layout", "rows"}, {"eval.official_perplexity", "true"}};

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
    bool paper = false;
    app.add_flag("--paper", paper, "settings of the paper's own runs where the defaults differ");
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
    if (paper) a.overrides = kPaper;
    for (auto& [key, value] : values)
        if (app.count("--" + key)) a.overrides.push_back({key, value});
    return a;
}

// A run is resumed with its own config.json; says where the file named beside --resume differs, leaving out what a run resolves itself.
void note_ignored_file(const std::string& name, Config file, const Config& stored) {
    file.run.dir = stored.run.dir, file.train.micro_batch = stored.train.micro_batch;
    file.train.effective_weights = stored.train.effective_weights, file.train.recompute = stored.train.recompute, file.model.kv_heads = stored.model.kv_heads;
    std::string list;
    for (const std::string& difference : config_differences(file, stored)) list += (list.empty() ? "" : ", ") + difference;
    if (!list.empty()) std::fprintf(stderr, "resuming with the run's own config.json, which differs from %s: %s\n", name.c_str(), list.c_str());
}

// The run's own config.json on --resume, --sample and --export; else the given file. Command-line values go on top.
Config configure(const Arguments& a, bool existing_run, std::vector<std::string>& changes) {
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
        validate_config(given);
        return given;
    }
    if (given.run.dir.empty()) throw UserError("which run? give --run.dir, or the --config it was started with");
    std::string file = (fs::path(given.run.dir) / "config.json").string();
    if (!fs::exists(file)) throw UserError(given.run.dir + " holds no run (no config.json)" + (a.resume ? "; start one without --resume" : "; which run do you mean?"));
    Config stored;
    read_config_file(stored, file);
    Config resumed = stored;
    for (const Override& o : a.overrides) apply_override(resumed, o);
    resumed.run.dir = given.run.dir;
    for (const std::string& change : config_differences(stored, resumed))
        if (fixed_for_resume(change.substr(0, change.find(':'))))
            throw UserError("--resume cannot change " + change + "; the checkpoint was made with the first value");
    validate_config(resumed);
    changes = config_differences(stored, resumed);
    if (a.resume && !a.config_file.empty()) note_ignored_file(a.config_file, config, stored);
    return resumed;
}

// manifest.json beside the training shards, which data.train names as a folder, a file or a pattern.
std::optional<Manifest> training_manifest(const Config& config) {
    fs::path train = config.data.train;
    return load_manifest((fs::is_directory(train) ? train : train.parent_path()).string());
}

void export_model(const Arguments& a, Config& config, Device& device) {
    auto model = load_trained_model(config, device);
    auto manifest = training_manifest(config);
    LlamaShape shape;
    shape.hidden = config.model.hidden, shape.intermediate = config.model.intermediate, shape.layers = config.model.layers;
    shape.heads = config.model.heads, shape.kv_heads = config.kv_heads(), shape.head_dim = config.model.head_dim(), shape.vocab = config.model.vocab;
    shape.max_positions = config.train.seq_len, shape.rms_eps = config.model.rms_eps, shape.rope_base = config.model.rope_base;
    if (manifest) shape.eos_id = manifest->eos_id, shape.pad_id = manifest->pad_id;
    std::vector<HfTensor> tensors;
    for (auto& t : model->exported_tensors()) tensors.push_back({t.name, t.shape, t.read});
    export_huggingface(a.export_dir, shape, tensors, a.export_dtype == "f32" ? DType::f32 : DType::bf16, manifest ? manifest->tokenizer_path : "");
    std::printf("wrote %s: %s parameters in %s\n", a.export_dir.c_str(), human_count(double(parameter_count(config))).c_str(), a.export_dtype.c_str());
}

void sample_text(const Arguments& a, Config& config, Device& device) {
    auto manifest = training_manifest(config);
    if (!manifest) throw UserError("--sample needs the tokenizer: no manifest.json beside the shards " + config.data.train);
    auto model = load_trained_model(config, device);
    std::printf("%s\n", generate(*model, Tokenizer(*manifest, a.program_dir), a.sampling).c_str());
}

// SIGINT, SIGTERM: finish the step, save, leave. A second Ctrl-C two seconds or more after the first ends the program at once; repeated
// SIGTERMs (and the pair of signals that some launchers send) do not cost the checkpoint.
void request_stop(int signal) {
    static volatile std::time_t first = 0;
    std::time_t now = std::time(nullptr);
    if (stop_requested && signal == SIGINT && now - first >= 2) _exit(130);
    if (!stop_requested) first = now;
    stop_requested = true;
}

void train(const Arguments& a, Config& config, Device& device, const std::vector<std::string>& changes) {
    if (!a.resume && fs::exists(fs::path(config.run.dir) / "config.json"))
        throw UserError(config.run.dir + " already holds a run; --resume continues it, --run.dir starts another elsewhere");
    int64_t budget = memory_budget(config, &device);
    MemoryPlan plan = choose_plan(config, device.kind(), budget, a.resume);
    if (budget) device.limit_memory(budget - library_bytes(device.kind()));  // held to, should the plan ever be wrong
    Trainer trainer(config, device, plan, a.resume, changes);
    // From here on Ctrl-C means: finish the step, save, leave.
    struct sigaction action {};
    action.sa_handler = request_stop;
    action.sa_flags = SA_RESTART;
    sigaction(SIGINT, &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
    trainer.run();
}

void print_plan(const Arguments& a, Config& config) {
    bool cuda = config.run.device != "cpu" && (config.run.device != "auto" || Device::cuda_usable() || !config.run.memory_budget.empty());
    DeviceKind kind = cuda ? DeviceKind::cuda : DeviceKind::cpu;
    // Within what the run itself would find free; for a GPU that is not here, 24 GiB: the card this program is made for.
    std::unique_ptr<Device> device;
    if (kind == DeviceKind::cpu) device = Device::open("cpu");
    else if (Device::cuda_usable()) device = Device::open(config.run.device == "auto" ? "cuda" : config.run.device);
    int64_t budget = memory_budget(config, device.get());
    if (budget == 0) budget = int64_t(24) << 30;
    // A micro-batch that was asked for is planned whether it fits here or not.
    bool anyhow = config.train.micro_batch != 0 && config.run.memory_budget.empty();
    const Config asked = config;
    MemoryPlan plan;
    try {
        plan = choose_plan(config, kind, budget, a.resume);
    } catch (const UserError&) {
        if (!anyhow) throw;
        config = asked, budget = 0;
        plan = choose_plan(config, kind, budget, a.resume);
    }
    std::printf("%s", (a.json ? plan_to_json : describe_plan)(config, plan, kind, budget).c_str());
}

int run(int argc, char** argv) {
    Arguments a = parse(argc, argv);
    std::vector<std::string> changes;
    bool existing_run = a.resume || a.sample || !a.export_dir.empty();
    Config config = configure(a, existing_run, changes);
    if (a.plan) return print_plan(a, config), 0;
    auto device = Device::open(config.run.device);
    if (a.sample) sample_text(a, config, *device);
    else if (!a.export_dir.empty()) export_model(a, config, *device);
    else train(a, config, *device, changes);
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    std::signal(SIGXFSZ, SIG_IGN);  // a file beyond ulimit -f is then an error like a full disk
    std::signal(SIGPIPE, SIG_IGN);  // a run goes on when whoever read its output has left
    try {
        return run(argc, argv);
    } catch (const UserError& error) {
        std::fprintf(stderr, "train_loqt: %s\n", error.what());
        return 2;
    } catch (const fs::filesystem_error& error) {  // a path that cannot be looked at: no permission, a loop of links
        std::fprintf(stderr, "train_loqt: %s: %s; check the path and its permissions\n", error.path1().c_str(), error.code().message().c_str());
        return 2;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "train_loqt: internal error: %s\n", error.what());
        return 1;
    }
}

// train_loqt: pretrain LLaMA models with LoQT on one GPU, on several, or on a CPU. See README.md; --help lists every option.
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <thread>
#include <unistd.h>

#include "arguments.h"
#include "comm/communicator.h"
#include "comm/launcher.h"
#include "flops.h"
#include "plan.h"
#include "runtime/hf.h"
#include "sample.h"
#include "trainer.h"
#include "weight_source.h"

namespace fs = std::filesystem;

namespace {

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

// What main says of an error on one line, and its exit code: 2 for what the user can mend, 1 for a fault of the program.
std::string message_of(const std::exception& error) {
    if (dynamic_cast<const UserError*>(&error)) return error.what();
    if (auto* path_error = dynamic_cast<const fs::filesystem_error*>(&error))  // a path that cannot be looked at: no permission, a loop of links
        return path_error->path1().string() + ": " + path_error->code().message() + "; check the path and its permissions";
    return std::string("internal error: ") + error.what();
}

int exit_code_of(const std::exception& error) {
    return dynamic_cast<const UserError*>(&error) || dynamic_cast<const fs::filesystem_error*>(&error) ? 2 : 1;
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

// remark: said once all mistakes would have shown.
void train(const Arguments& a, Config& config, Device& device, const std::vector<std::string>& changes, const std::string& remark) {
    Communicator* ranks = device.communicator();
    int64_t budget = memory_budget(config, &device);
    if (ranks)  // all by one plan: that of the GPU with the least
        for (const std::string& other : ranks->control().gather(std::to_string(budget))) budget = std::min<int64_t>(budget, std::stoll(other));
    MemoryPlan plan = choose_plan(config, device.kind(), budget, a.resume);
    if (budget) device.limit_memory(budget - library_bytes(device.kind()) - (ranks ? Communicator::library_bytes(device.kind()) : 0));  // held to, should the plan ever be wrong
    Trainer trainer(config, device, plan, a.resume, changes);
    if (!remark.empty()) std::fprintf(stderr, "%s\n", remark.c_str());
    // From here on Ctrl-C means: finish the step, save, leave.
    struct sigaction action {};
    action.sa_handler = request_stop;
    action.sa_flags = SA_RESTART;
    sigaction(SIGINT, &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
    trainer.run();
}

// Several GPUs of this machine: a process for each, which this one looks after.
int start_processes(const Config& config, char** argv) {
    const bool cuda = config.run.device != "cpu";
    std::string why;
    if (!Communicator::available(cuda ? DeviceKind::cuda : DeviceKind::cpu, &why)) throw UserError("run.gpus: " + why);
    constexpr double kGrace = 75;  // a checkpoint under way may take its 60 s (Control::Uninterrupted)
    return launch_processes(int(config.world_size), argv, kGrace);
}

void refuse_second_run(const Arguments& a, const Config& config) {
    if (!a.resume && fs::exists(fs::path(config.run.dir) / "config.json"))
        throw UserError(config.run.dir + " already holds a run; --resume continues it, --run.dir starts another elsewhere");
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

// One of several processes: rank 0 says what is to be done, so that the others need neither its files nor its arguments.
void train_together(const Arguments& a, const World& world, Control& control) {
    using json = nlohmann::json;
    Config config;
    std::vector<std::string> changes;
    std::string remark;
    if (world.root()) {
        config = configure(a, a.resume, [&](const Config&) { return int64_t(world.size); }, changes, remark);
        refuse_second_run(a, config);
        for (const Override& o : a.overrides)
            if (o.key == "run.gpus" && world.launcher != "train_loqt" && config.run.gpus != world.size)
                throw UserError(format("run.gpus: %lld, but %s has started %d processes; leave it out", (long long)config.run.gpus, world.launcher.c_str(), world.size));
    }
    json task = json::parse(control.broadcast(json{{"config", config_to_json(config)}, {"resume", a.resume}, {"changes", changes}}.dump()));
    Arguments arguments = a;
    arguments.resume = task["resume"];
    changes = task["changes"].get<std::vector<std::string>>();
    if (!world.root()) read_config_text(config, task["config"], "rank 0's configuration");
    config.world_size = world.size;
    control.set_timeout(config.run.comm_timeout);

    const std::string& wanted = config.run.device;
    const bool cuda = wanted == "cuda" || (wanted == "auto" && Device::cuda_usable());
    // Where the driver of one machine fails, auto is the CPU there.
    const std::vector<std::string> kinds = control.gather(cuda ? "a GPU" : "the CPU");
    for (size_t rank = 0; rank < kinds.size(); ++rank)
        if (kinds[rank] != kinds[0]) throw UserError(format("run.device: rank 0 trains on %s, rank %zu on %s; --device cuda says what is wrong", kinds[0].c_str(), rank, kinds[rank].c_str()));
    // Some launchers show every process its own GPU alone.
    const int count = cuda ? Device::cuda_count() : 0, gpu = count == 1 ? 0 : world.local_rank;
    if (count && gpu >= count) throw UserError(format("rank %d wants GPU %d of its machine, which has %d", world.rank, gpu, count));
    auto device = Device::open(cuda ? "cuda:" + std::to_string(gpu) : "cpu");
    auto communicator = Communicator::connect(*device, control);
    train(arguments, config, *device, changes, remark);
}

int run_together(const Arguments& a, const World& world) {
    std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);  // an end from elsewhere flushes nothing
    double timeout = RunConfig().comm_timeout;  // until rank 0 has sent the configuration
    Config given;
    for (const Override& o : a.overrides)
        if (o.key == "run.comm_timeout") apply_override(given, o), timeout = given.run.comm_timeout;
    Control control(world, timeout);
    try {
        train_together(a, world, control);
        return 0;
    } catch (const std::exception& error) {
        // Most mistakes are met by all ranks at once: rank 0 is to be the one that tells.
        if (!world.root()) std::this_thread::sleep_for(std::chrono::milliseconds(500));
        control.fail(message_of(error), exit_code_of(error));
    }
}

int run(int argc, char** argv, const World& world) {
    Arguments a = parse(argc, argv);
    const bool trains = !a.plan && !a.sample && a.export_dir.empty();
    if (!trains && !world.root()) return 0;
    if (trains && !world.alone()) return run_together(a, world);
    // A plan may be for GPUs that are not here; sampling and exporting take one process.
    auto planned = [](const Config& config) { return std::max<int64_t>(1, config.run.gpus); };
    auto one = [](const Config&) { return int64_t(1); };
    std::vector<std::string> changes;
    std::string remark;
    Config config = configure(a, a.resume || a.sample || !a.export_dir.empty(), trains ? RankCount(processes_wanted) : a.plan ? RankCount(planned) : RankCount(one), changes, remark);
    const bool starts_others = trains && config.world_size > 1;
    if (a.plan) return print_plan(a, config), 0;
    if (a.sample || !a.export_dir.empty()) {
        auto device = Device::open(config.run.device);
        if (a.sample) sample_text(a, config, *device);
        else export_model(a, config, *device);
        return 0;
    }
    refuse_second_run(a, config);
    if (starts_others) return start_processes(config, argv);
    auto device = Device::open(config.run.device);
    train(a, config, *device, changes, remark);
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    std::signal(SIGXFSZ, SIG_IGN);  // a file beyond ulimit -f is then an error like a full disk
    std::signal(SIGPIPE, SIG_IGN);  // a run goes on when whoever read its output has left
    World world;
    try {
        world = world_from_environment();
        return run(argc, argv, world);
    } catch (const std::exception& error) {
        // Before they are connected all ranks make the same mistakes; rank 0's word is enough.
        if (world.speaks()) std::fprintf(stderr, "train_loqt: %s\n", message_of(error).c_str());
        return exit_code_of(error);
    }
}

// How a run begins, what of it is saved, and how that is read again. See trainer.h.
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "runtime/checkpoint.h"
#include "trainer.h"
#include "weight_source.h"

namespace fs = std::filesystem;
using json = nlohmann::ordered_json;

namespace {

std::vector<CheckpointTensor> saved_tensors_of(Llama& model) {
    std::vector<CheckpointTensor> list;
    for (const TensorEntry& e : model.table().entries())
        if (e.saved) list.push_back({e.name, Tensor{e.holder->data, e.holder->dtype, e.rows, e.cols, e.holder->ld}, {e.rows, e.cols}});
    return list;
}

// Whether a matrix's first merge starts from its true weights.
bool merges_from_source(const Config& config) {
    const MethodPolicy policy = method_policy(config);
    return policy.adapters && policy.projects;
}

// Counters of the parameters that tensors do not hold.
std::string parameter_counters(Llama& model) {
    json counters = json::object();
    for (Parameter* p : model.parameters()) counters[p->name] = {p->updates, p->active};
    return counters.dump();
}

void restore_counters(Llama& model, const std::string& text) {
    json counters = json::parse(text);
    for (Parameter* p : model.parameters()) {
        p->updates = counters.at(p->name).at(0).get<int64_t>();
        p->active = counters.at(p->name).at(1).get<bool>();
    }
    for (LinearGroup* group : model.groups())
        group->restored();
}

// The newest checkpoint that verifies; says on stderr which were passed over.
CheckpointFile newest_checkpoint(const Config& config) {
    std::vector<std::string> skipped;
    auto found = find_newest_valid(checkpoint_folder(config.run.dir), &skipped);
    for (const std::string& reason : skipped) std::fprintf(stderr, "skipped checkpoint %s\n", reason.c_str());
    if (!found) throw UserError("no valid checkpoint in " + checkpoint_folder(config.run.dir) + "; start again in another --run.dir");
    return *found;
}

}  // namespace

void Trainer::open_initial_weights() {
    source_ = config_.run.init_from.empty() ? random_weights(config_) : huggingface_weights(config_, config_.run.init_from);
}

void Trainer::initialize() {
    Control::Activity busy(control(), Control::Kind::busy, "making the initial weights");
    model_->initialize(source_);
    if (!merges_from_source(config_)) source_ = nullptr;
}

void Trainer::start_fresh() {
    open_initial_weights();
    if (root()) {
        make_directories(checkpoint_folder(config_.run.dir));
        lock_ = std::make_unique<DirectoryLock>(config_.run.dir);
        write_file((fs::path(config_.run.dir) / "config.json").string(), stored_config(config_));
    }
    initialize();
}

// Rank 0 reads the newest checkpoint; the others get its tensors from rank 0 and need no common file system.
void Trainer::restore() {
    CheckpointFile file;
    json state;  // of the run; null: killed before its first checkpoint
    if (root()) {
        Control::Activity busy(control(), Control::Kind::busy, "reading the checkpoint");
        lock_ = std::make_unique<DirectoryLock>(config_.run.dir);
        if (!list_checkpoints(checkpoint_folder(config_.run.dir)).empty()) {
            file = newest_checkpoint(config_);
            state = load_checkpoint(device_, file.path, saved_tensors_of(*model_));
            trusted_checkpoints_.insert(file.path);
        }
    }
    if (ranks_) state = json::parse(ranks_->control().broadcast(state.dump()));
    if (state.is_null()) {
        // The same seed makes the same run again.
        open_initial_weights();
        initialize();
        return;
    }
    if (ranks_) {
        std::vector<Tensor> tensors;
        for (const CheckpointTensor& t : saved_tensors_of(*model_)) tensors.push_back(t.tensor.flat());
        ranks_->broadcast(tensors, 0);
        ranks_->finish();
    }
    const Metadata metadata = state.get<Metadata>();
    restore_counters(*model_, metadata.at("parameters"));
    step_ = std::stoll(metadata.at("step"));
    if (step_ > config_.train.steps) throw UserError(format("train.steps: %lld, but the run has done %lld steps already", (long long)config_.train.steps, (long long)step_));
    if (merges_from_source(config_) && model_->projected_matrices() < model_->matrices()) open_initial_weights();
    skipped_ = std::stoll(metadata.at("skipped"));
    // Allowed, but no longer the run that was interrupted: positions in the order of samples now mean other samples.
    if (root() && metadata.at("samples") != std::to_string(train_data_->samples()))
        std::fprintf(stderr, "data.train has other data than the checkpoint saw: %llu samples, then %s\n", (unsigned long long)train_data_->samples(),
                     metadata.at("samples").c_str());
    saved_step_ = step_;
    model_->invalidate();
}

void Trainer::save() {
    if (saved_step_ == step_) return;
    if (replicas_) replicas_->verify(step_);  // a checkpoint stands for all ranks
    saved_step_ = step_;
    if (!root()) return;
    double begin = wall_seconds();
    Control::Activity busy(control(), Control::Kind::busy, "writing a checkpoint");
    Control::Uninterrupted whole(control());
    std::string path = checkpoint_path(checkpoint_folder(config_.run.dir), step_);
    Metadata metadata{{"step", std::to_string(step_)},
                      {"next_sample", std::to_string(step_ * config_.train.batch)},
                      {"samples", std::to_string(train_data_->samples())},
                      {"skipped", std::to_string(skipped_)},
                      {"seed", std::to_string(config_.train.seed)},
                      {"parameters", parameter_counters(*model_)},
                      {"config", stored_config(config_)}};
    save_checkpoint(device_, path, saved_tensors_of(*model_), metadata);
    trusted_checkpoints_.insert(path);
    prune_checkpoints(checkpoint_folder(config_.run.dir), config_.checkpoint.keep_last, config_.checkpoint.keep_every, &trusted_checkpoints_);
    record("checkpoint", {{"step", step_}, {"path", path}, {"seconds", wall_seconds() - begin}});
}

std::unique_ptr<Llama> load_trained_model(Config& config, Device& device) {
    config.train.micro_batch = 1;
    device.time_products(false);  // every token of a sample makes a new shape
    CheckpointFile file = newest_checkpoint(config);
    auto model = std::make_unique<Llama>(config, device, false);
    model->allocate();
    Metadata metadata = load_checkpoint(device, file.path, saved_tensors_of(*model), LoadMode::weights);
    restore_counters(*model, metadata.at("parameters"));
    // A dry forward pass and a dry export tell the scratch they need.
    auto dry_device = Device::open_dry(device.kind());
    Llama dry(config, *dry_device, false);
    dry.allocate();
    dry.next_token_logits(std::vector<int32_t>(config.train.seq_len));
    std::vector<float> unused;
    for (auto& tensor : dry.exported_tensors()) tensor.read(unused);
    device.reserve_scratch(dry_device->scratch_high_water());
    std::fprintf(stderr, "checkpoint %s\n", file.path.c_str());
    return model;
}

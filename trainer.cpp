#include "trainer.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "flops.h"
#include "merge_schedule.h"
#include "runtime/checkpoint.h"
#include "weight_source.h"

namespace fs = std::filesystem;
using json = nlohmann::ordered_json;

std::atomic<bool> stop_requested{false};

namespace {

std::string checkpoint_folder(const Config& config) { return (fs::path(config.run.dir) / "checkpoints").string(); }

DataOptions data_options(const Config& config, const std::string& paths, const char* split, bool shuffle) {
    DataOptions options;
    if (!paths.empty()) options.paths = {paths};
    options.split = split;
    options.layout = data_layout(config.data.layout);
    options.seq_len = config.train.seq_len;
    options.vocab = config.model.vocab;
    options.pad_id = config.data.pad_id;
    options.shuffle = shuffle;
    options.seed = uint64_t(config.train.seed);
    return options;
}

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
    auto found = find_newest_valid(checkpoint_folder(config), &skipped);
    for (const std::string& reason : skipped) std::fprintf(stderr, "skipped checkpoint %s\n", reason.c_str());
    if (!found) throw UserError("no valid checkpoint in " + checkpoint_folder(config) + "; start again in another --run.dir");
    return *found;
}

}  // namespace

Trainer::Trainer(const Config& config, Device& device, const MemoryPlan& plan, bool resume, const std::vector<std::string>& changes)
    : config_(config), device_(device), planned_bytes_(plan.total), peak_(peak_flops(device)), started_(wall_seconds()) {
    train_data_ = std::make_unique<TokenDataset>(data_options(config_, config_.data.train, "train", config_.data.shuffle));
    if (!config_.data.val.empty()) val_data_ = std::make_unique<TokenDataset>(data_options(config_, config_.data.val, "val", false));

    // Making the weights of a large model on a CPU takes minutes: whoever expected a GPU should not wait for that.
    if (std::string why; config_.run.device == "auto" && !Device::cuda_usable(&why)) std::fprintf(stderr, "training on the CPU, without a usable GPU: %s\n", why.c_str());
    model_ = std::make_unique<Llama>(config_, device_, true);
    model_->allocate();
    device_.reserve_scratch(plan.scratch);
    if (plan.workers) workers_ = std::make_unique<Workers>(device_, plan.workers, plan.worker_scratch);
    sums_ = std::make_unique<StepSums>(device_, *model_, config_);
    merges_ = merge_steps(config_);

    if (resume) restore();
    else start_fresh();
    // What the user changed now holds for later resumes too.
    if (!changes.empty()) write_file((fs::path(config_.run.dir) / "config.json").string(), config_to_json(config_));
    metrics_ = std::make_unique<MetricsFile>((fs::path(config_.run.dir) / "metrics.jsonl").string());
    progress_ = std::make_unique<ProgressLine>();
    std::string changed;
    for (const std::string& change : changes) changed += (changed.empty() ? "" : ", ") + change;
    metrics_->write(resume ? "resume" : "start",
                    {{"step", step_}, {"device", device_.name()}, {"method", config_.method.name}, {"parameters", parameter_count(config_)},
                     {"micro_batch", config_.train.micro_batch}, {"effective_weights", config_.train.effective_weights}, {"recompute", config_.train.recompute}, {"merge_workers", int64_t(plan.workers)},
                     {"peak_tflops", peak_.flops > 0 ? peak_.flops * 1e-12 : NAN}, {"peak_source", peak_.source},
                     {"train_tokens", int64_t(train_data_->tokens())}, {"planned_bytes", planned_bytes_}, {"changed", changed}});
    progress_->note(format("%s: %s, %s parameters, %s on %s", config_.run.dir.c_str(), resume ? format("resumed at step %lld", (long long)step_).c_str() : "new run",
                           human_count(double(parameter_count(config_))).c_str(), config_.method.name.c_str(), device_.name().c_str()));
    progress_->note(format("data: %s training tokens (%.2f epochs in this run), %s validation tokens; each step %lld × %lld sequences of %lld tokens",
                           human_count(double(train_data_->tokens())).c_str(),
                           double(config_.train.steps * config_.train.batch) / double(train_data_->samples()),
                           human_count(val_data_ ? double(val_data_->tokens()) : 0.0).c_str(), (long long)config_.micro_batches(),
                           (long long)config_.train.micro_batch, (long long)config_.train.seq_len));
    if (peak_.flops > 0)
        progress_->note(format("MFU: FLOPs that %s needs, of a peak of %.0f TFLOP/s (%s); 6N: TFLOP/s of a full-rank run with as many tokens a second",
                               config_.method.name.c_str(), peak_.flops * 1e-12, peak_.source));
    stream_ = std::make_unique<BatchStream>(*train_data_, uint64_t(step_) * uint64_t(config_.train.batch), config_.train.micro_batch);
}

void Trainer::open_initial_weights() {
    source_ = config_.run.init_from.empty() ? random_weights(config_) : huggingface_weights(config_, config_.run.init_from);
}

void Trainer::initialize() {
    model_->initialize(source_);
    if (!merges_from_source(config_)) source_ = nullptr;
}

void Trainer::start_fresh() {
    open_initial_weights();
    fs::path dir = config_.run.dir;
    make_directories((dir / "checkpoints").string());
    lock_ = std::make_unique<DirectoryLock>(config_.run.dir);
    write_file((dir / "config.json").string(), config_to_json(config_));
    initialize();
}

void Trainer::restore() {
    lock_ = std::make_unique<DirectoryLock>(config_.run.dir);
    if (list_checkpoints(checkpoint_folder(config_)).empty()) {
        // Killed before its first checkpoint: the same seed makes the same run again.
        open_initial_weights();
        initialize();
        return;
    }
    CheckpointFile file = newest_checkpoint(config_);
    Metadata metadata = load_checkpoint(device_, file.path, saved_tensors_of(*model_));
    restore_counters(*model_, metadata.at("parameters"));
    step_ = std::stoll(metadata.at("step"));
    if (merges_from_source(config_) && model_->projected_matrices() < model_->matrices()) open_initial_weights();
    skipped_ = std::stoll(metadata.at("skipped"));
    // Allowed, but no longer the run that was interrupted: positions in the order of samples now mean other samples.
    if (metadata.at("samples") != std::to_string(train_data_->samples()))
        std::fprintf(stderr, "data.train has other data than the checkpoint saw: %llu samples, then %s\n", (unsigned long long)train_data_->samples(),
                     metadata.at("samples").c_str());
    saved_step_ = step_;
    trusted_checkpoints_.insert(file.path);
    model_->invalidate();
}

void Trainer::save() {
    if (saved_step_ == step_) return;
    double begin = wall_seconds();
    std::string path = checkpoint_path(checkpoint_folder(config_), step_);
    Metadata metadata{{"step", std::to_string(step_)},
                      {"next_sample", std::to_string(step_ * config_.train.batch)},
                      {"samples", std::to_string(train_data_->samples())},
                      {"skipped", std::to_string(skipped_)},
                      {"seed", std::to_string(config_.train.seed)},
                      {"parameters", parameter_counters(*model_)},
                      {"config", config_to_json(config_)}};
    save_checkpoint(device_, path, saved_tensors_of(*model_), metadata);
    trusted_checkpoints_.insert(path);
    saved_step_ = step_;
    prune_checkpoints(checkpoint_folder(config_), config_.checkpoint.keep_last, config_.checkpoint.keep_every, &trusted_checkpoints_);
    metrics_->write("checkpoint", {{"step", step_}, {"path", path}, {"seconds", wall_seconds() - begin}});
}

void Trainer::evaluate() {
    if (!val_data_ || evaluated_step_ == step_) return;
    double begin = wall_seconds();
    uint64_t samples = val_data_->samples();
    if (config_.eval.sequences > 0) samples = std::min(samples, uint64_t(config_.eval.sequences));
    BatchStream stream(*val_data_, 0, config_.train.micro_batch, 0, samples);
    double loss = 0, batch_means = 0;
    int64_t tokens = 0, batches = 0;
    for (Batch batch = stream.next(); batch.rows > 0; batch = stream.next()) {
        model_->evaluate(batch, sums_->losses(), 0);
        double sum = sums_->read_losses(1);
        loss += sum, tokens += batch.valid_targets, ++batches;
        batch_means += sum / double(std::max<int64_t>(batch.valid_targets, 1));
    }
    loss /= double(std::max<int64_t>(tokens, 1));
    evaluated_step_ = step_;
    std::vector<Field> fields{{"step", step_}, {"loss", loss}, {"perplexity", std::exp(loss)}, {"tokens", tokens}};
    std::string note = format("step %lld: validation loss %.4f, perplexity %.3f over %s tokens", (long long)step_, loss, std::exp(loss), human_count(double(tokens)).c_str());
    if (config_.eval.official_perplexity) {
        // The official code divides the sum of batch means by n + 1: too low by n/(n+1) in loss.
        double official = std::exp(batch_means / double(batches + 1));
        fields.push_back({"perplexity_official_biased", official});
        note += format(" (official code's biased figure over %lld batches: %.3f)", (long long)batches, official);
    }
    fields.push_back({"seconds", wall_seconds() - begin});
    metrics_->write("eval", fields);
    progress_->note(note);
}

// Ends the merges of the step under way. waited: seconds for those begun in the backward pass that were not done when it was.
void Trainer::merge(double waited) {
    double begin = wall_seconds();
    MergeStatistics s = model_->merge(step_, source_ ? &source_ : nullptr);
    s.projection_seconds += waited;
    if (model_->projected_matrices() == model_->matrices()) source_ = nullptr;
    device_.synchronize();
    double done = std::max(1, s.matrices - s.failed);
    metrics_->write("merge", {{"step", step_}, {"seconds", wall_seconds() - begin + s.projection_seconds}, {"projection_seconds", s.projection_seconds},
                              {"quant_error", s.quant_error / done},
                              {"quant_error_uncompensated", s.plain_quant_error / done}, {"captured_energy", s.captured_energy / done},
                              {"matrices", int64_t(s.matrices)}, {"failed", int64_t(s.failed)}});
    if (s.failed) progress_->note(format("step %lld: %d of %d matrices kept their projection (gradient zero or not finite)", (long long)step_, s.failed, s.matrices));
}

void Trainer::train_step() {
    double begin = wall_seconds();
    std::vector<Batch> batches;
    for (int64_t i = 0; i < config_.micro_batches(); ++i) batches.push_back(stream_->next());
    // Should step 0 be skipped as not finite, the first merge is made up for at the next step.
    bool never_merged = method_policy(config_).projects && model_->projected_matrices() == 0;
    StepPlan plan;
    plan.step = step_, plan.lr = learning_rate(config_, step_);
    plan.merges = never_merged || std::binary_search(merges_.begin(), merges_.end(), step_);
    // A matrix's first merge starts from its true weights, not from their NF4 round trip.
    plan.source = source_ ? &source_ : nullptr;
    StepGradients gradients = accumulate_gradients(device_, *model_, config_, *sums_, batches, plan);

    bool finite = std::isfinite(gradients.loss) && std::isfinite(gradients.norm);
    if (finite) apply_gradients(device_, *model_, config_, plan, gradients.norm);
    else handle_nonfinite(gradients);
    if (plan.merges && (finite || gradients.updated)) merge(gradients.waited);
    device_.synchronize();
    ++step_;
    ++steps_here_;
    report_step(gradients.loss, gradients.norm, plan.lr, wall_seconds() - begin);
}

// A step whose loss or gradient is not finite is left out, or ends the run.
void Trainer::handle_nonfinite(const StepGradients& gradients) {
    metrics_->write("nonfinite", {{"step", step_}, {"loss", gradients.loss}, {"grad_norm", gradients.norm}, {"policy", config_.optimizer.nonfinite}});
    ++skipped_;
    if (config_.optimizer.nonfinite != "stop") return;
    std::string text = format("step %lld: loss %g, gradient norm %g: not finite; ", (long long)step_, gradients.loss, gradients.norm);
    // As a rule nothing was changed yet. But updates inside the backward pass may have come before what is not finite did.
    if (gradients.updated) {
        text += saved_step_ < 0 ? "nothing was saved before" : format("the checkpoint of step %lld is the last", (long long)saved_step_);
    } else {
        --skipped_;
        save();
        text += "weights of the step before are saved";
    }
    throw UserError(text + "; lower optimizer.lr, " + (updates_per_layer(config_) ? "" : "set optimizer.clip, ") + "or use --nonfinite skip");
}

std::string Trainer::utilization(double rate) const {
    return format("MFU %.1f %% (6N: %.0f TFLOP/s)", 100 * mfu(rate), full_rank_tflops(rate));
}

void Trainer::report_step(double loss, double gradient_norm, double lr, double seconds) {
    double tokens = double(config_.train.batch * config_.train.seq_len), rate = tokens / seconds;
    rate_ = rate_ == 0 ? rate : 0.95 * rate_ + 0.05 * rate;
    training_seconds_ += seconds;
    int64_t memory = device_.process_peak_bytes();
    bool last = step_ == config_.train.steps;
    if (due(config_.run.log_every) || last)
        metrics_->write("train", {{"step", step_}, {"loss", loss}, {"lr", lr}, {"grad_norm", gradient_norm}, {"tokens", step_ * int64_t(tokens)},
                                  {"tokens_per_s", rate}, {"mfu", mfu(rate)}, {"full_rank_equivalent_tflops", full_rank_tflops(rate)},
                                  {"step_ms", seconds * 1e3}, {"memory_bytes", memory}, {"skipped", skipped_}});
    double remaining = double(config_.train.steps - step_) * training_seconds_ / double(steps_here_);
    std::string line = format("step %lld/%lld  loss %.4f  lr %.2e  |g| %.3f  %s tok/s", (long long)step_, (long long)config_.train.steps, loss, lr, gradient_norm, human_count(rate_).c_str());
    if (peak_.flops > 0) line += "  " + utilization(rate_);
    line += format("  ETA %s  %.2f GiB", human_duration(remaining).c_str(), double(memory) / double(int64_t(1) << 30));
    if (skipped_) line += format("  %lld skipped", (long long)skipped_);
    progress_->show(line, last || steps_here_ == 1);
}

void Trainer::run() {
    if (step_ == 0) evaluate();
    while (step_ < config_.train.steps && !stop_requested) {
        train_step();
        if (due(config_.eval.every)) evaluate();
        if (due(config_.checkpoint.every)) save();
    }
    bool finished = step_ >= config_.train.steps;
    if (finished) evaluate();
    save();
    metrics_->write("end", {{"step", step_}, {"finished", finished}, {"seconds", wall_seconds() - started_}, {"training_seconds", training_seconds_},
                            {"planned_bytes", planned_bytes_}, {"peak_bytes", device_.process_peak_bytes()}, {"skipped", skipped_}});
    if (steps_here_ > 0) {
        double rate = double(steps_here_ * config_.train.batch * config_.train.seq_len) / training_seconds_;
        progress_->note(format("mean speed, merges included: %s tok/s%s", human_count(rate).c_str(), peak_.flops > 0 ? (", " + utilization(rate)).c_str() : ""));
    }
    if (!finished) {
        progress_->note(format("stopped after step %lld; state saved, --resume continues exactly here", (long long)step_));
        return;
    }
    std::string path = checkpoint_path(checkpoint_folder(config_), step_), took = human_duration(wall_seconds() - started_);
    if (steps_here_) progress_->note(format("done: %lld steps in %s, final checkpoint %s", (long long)step_, took.c_str(), path.c_str()));
    else progress_->note(format("already finished: %lld steps, final checkpoint %s", (long long)step_, path.c_str()));
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

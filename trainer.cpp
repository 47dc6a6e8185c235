// The loop and what it reports. See trainer.h; beginnings and checkpoints are in trainer_state.cpp.
#include "trainer.h"

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "merge_schedule.h"
#include "runtime/checkpoint.h"

namespace fs = std::filesystem;

std::atomic<bool> stop_requested{false};

namespace {

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

}  // namespace

Trainer::Trainer(const Config& config, Device& device, const MemoryPlan& plan, bool resume, const std::vector<std::string>& changes)
    : config_(config), device_(device), ranks_(device.communicator()), planned_bytes_(plan.total), peak_(peak_flops(device)), started_(wall_seconds()) {
    train_data_ = std::make_unique<TokenDataset>(data_options(config_, config_.data.train, "train", config_.data.shuffle));
    if (!config_.data.val.empty()) val_data_ = std::make_unique<TokenDataset>(data_options(config_, config_.data.val, "val", false));
    check_same_data();

    // Making the weights of a large model on a CPU takes minutes: whoever expected a GPU should not wait for that.
    if (std::string why; root() && config_.run.device == "auto" && !Device::cuda_usable(&why)) std::fprintf(stderr, "training on the CPU, without a usable GPU: %s\n", why.c_str());
    model_ = std::make_unique<Llama>(config_, device_, true);
    model_->allocate();
    device_.reserve_scratch(plan.scratch);
    if (plan.workers) workers_ = std::make_unique<Workers>(device_, plan.workers, plan.worker_scratch);
    sums_ = std::make_unique<StepSums>(device_, *model_, config_);
    if (ranks_) replicas_ = std::make_unique<ReplicaCheck>(device_, *model_);
    merges_ = merge_steps(config_);

    if (resume) restore();
    else start_fresh();
    if (replicas_) replicas_->verify(step_);
    const uint64_t first = uint64_t(step_) * uint64_t(config_.train.batch), rows = uint64_t(config_.train.micro_batch), rank = ranks_ ? uint64_t(ranks_->rank()) : 0;
    stream_ = std::make_unique<BatchStream>(*train_data_, first + rank * rows, config_.train.micro_batch, rows * uint64_t(config_.world_size));
    if (root()) announce(resume, plan, changes);
}

// With other shards on one machine samples would be left out and others seen twice, and nobody would know.
void Trainer::check_same_data() const {
    if (!ranks_) return;
    std::string found = format("%llu training tokens", (unsigned long long)train_data_->tokens());
    if (val_data_) found += format(" and %llu validation tokens", (unsigned long long)val_data_->tokens());
    const std::vector<std::string> all = ranks_->control().gather(found);
    for (size_t rank = 0; rank < all.size(); ++rank)
        if (all[rank] != all[0])
            throw UserError(format("data.train, data.val: rank %zu finds %s, rank 0 %s; all machines need the same shards", rank, all[rank].c_str(), all[0].c_str()));
}

// What is being done, on the terminal and in metrics.jsonl.
void Trainer::announce(bool resume, const MemoryPlan& plan, const std::vector<std::string>& changes) {
    // What the user changed now holds for later resumes too.
    if (!changes.empty()) write_file((fs::path(config_.run.dir) / "config.json").string(), stored_config(config_));
    metrics_ = std::make_unique<MetricsFile>((fs::path(config_.run.dir) / "metrics.jsonl").string());
    progress_ = std::make_unique<ProgressLine>();
    std::string changed;
    for (const std::string& change : changes) changed += (changed.empty() ? "" : ", ") + change;
    record(resume ? "resume" : "start",
           {{"step", step_}, {"device", device_.name()}, {"gpus", config_.world_size}, {"method", config_.method.name}, {"parameters", parameter_count(config_)},
            {"micro_batch", config_.train.micro_batch}, {"effective_weights", config_.train.effective_weights}, {"recompute", config_.train.recompute}, {"merge_workers", int64_t(plan.workers)},
            {"peak_tflops", peak_.flops > 0 ? peak_.flops * 1e-12 : NAN}, {"peak_source", peak_.source},
            {"train_tokens", int64_t(train_data_->tokens())}, {"planned_bytes", planned_bytes_}, {"changed", changed}});
    const std::string ranks = ranks_ ? format("%lld ", (long long)config_.world_size) : "";
    note(format("%s: %s, %s parameters, %s on %s%s", config_.run.dir.c_str(), resume ? format("resumed at step %lld", (long long)step_).c_str() : "new run",
                human_count(double(parameter_count(config_))).c_str(), config_.method.name.c_str(), (ranks_ ? ranks + "× " : "").c_str(), device_.name().c_str()));
    note(format("data: %s training tokens (%.2f epochs in this run), %s validation tokens; each step %s%lld × %lld sequences of %lld tokens",
                human_count(double(train_data_->tokens())).c_str(), double(config_.train.steps * config_.train.batch) / double(train_data_->samples()),
                human_count(val_data_ ? double(val_data_->tokens()) : 0.0).c_str(), (ranks_ ? ranks + (device_.is_cuda() ? "GPUs × " : "processes × ") : "").c_str(),
                (long long)config_.micro_batches(), (long long)config_.train.micro_batch, (long long)config_.train.seq_len));
    if (peak_.flops > 0)
        note(format("MFU: FLOPs that %s needs, of a peak of %.0f TFLOP/s (%s); 6N: TFLOP/s of a full-rank run with as many tokens a second", config_.method.name.c_str(),
                    peak_.flops * 1e-12, peak_.source));
}

void Trainer::record(const char* event, const std::vector<Field>& fields) {
    if (metrics_) metrics_->write(event, fields);
}

void Trainer::note(const std::string& text) {
    if (progress_) progress_->note(text);
}

int64_t Trainer::most_of_all(int64_t value) const {
    if (!ranks_) return value;
    for (const std::string& other : ranks_->control().gather(std::to_string(value))) value = std::max<int64_t>(value, std::stoll(other));
    return value;
}

// Several ranks share the micro-batches out. Their sums are added up in the order of the data whoever computed them, so the result does not depend
// on the number of ranks.
void Trainer::evaluate() {
    if (!val_data_ || evaluated_step_ == step_) return;
    double begin = wall_seconds();
    uint64_t samples = val_data_->samples();
    if (config_.eval.sequences > 0) samples = std::min(samples, uint64_t(config_.eval.sequences));
    const uint64_t rows = uint64_t(config_.train.micro_batch), world = uint64_t(config_.world_size), rank = ranks_ ? uint64_t(ranks_->rank()) : 0;
    const size_t batches = size_t((samples + rows - 1) / rows);
    std::vector<double> losses(2 * batches);  // sum of the losses of every micro-batch, then their counted targets
    BatchStream stream(*val_data_, rank * rows, config_.train.micro_batch, rows * world, samples);
    for (size_t k = size_t(rank); k < batches; k += size_t(world)) {
        Batch batch = stream.next();
        model_->evaluate(batch, sums_->losses(), 0);
        losses[k] = sums_->read_losses(1);
        losses[batches + k] = double(batch.valid_targets);
    }
    if (ranks_) ranks_->sum(losses, "an evaluation");
    double loss = 0, batch_means = 0, tokens = 0;
    for (size_t k = 0; k < batches; ++k) {
        loss += losses[k], tokens += losses[batches + k];
        batch_means += losses[k] / std::max(losses[batches + k], 1.0);
    }
    loss /= std::max(tokens, 1.0);
    evaluated_step_ = step_;
    std::vector<Field> fields{{"step", step_}, {"loss", loss}, {"perplexity", std::exp(loss)}, {"tokens", int64_t(tokens)}};
    std::string text = format("step %lld: validation loss %.4f, perplexity %.3f over %s tokens", (long long)step_, loss, std::exp(loss), human_count(tokens).c_str());
    if (config_.eval.official_perplexity) {
        // The official code divides the sum of batch means by n + 1: too low by n/(n+1) in loss.
        double official = std::exp(batch_means / double(batches + 1));
        fields.push_back({"perplexity_official_biased", official});
        text += format(" (official code's biased figure over %zu batches: %.3f)", batches, official);
    }
    fields.push_back({"seconds", wall_seconds() - begin});
    record("eval", fields);
    note(text);
}

// Ends the merges of the step under way. waited: seconds for those begun in the backward pass that were not done when it was.
void Trainer::merge(double waited) {
    double begin = wall_seconds();
    MergeStatistics s = model_->merge(step_, source_ ? &source_ : nullptr);
    s.projection_seconds += waited;
    if (model_->projected_matrices() == model_->matrices()) source_ = nullptr;
    Communicator::synchronize(device_, "a merge");
    double done = std::max(1, s.matrices - s.failed);
    record("merge", {{"step", step_}, {"seconds", wall_seconds() - begin + s.projection_seconds}, {"projection_seconds", s.projection_seconds},
                              {"quant_error", s.quant_error / done},
                              {"quant_error_uncompensated", s.plain_quant_error / done}, {"captured_energy", s.captured_energy / done},
                              {"matrices", int64_t(s.matrices)}, {"failed", int64_t(s.failed)}});
    if (s.failed) note(format("step %lld: %d of %d matrices kept their projection (gradient zero or not finite)", (long long)step_, s.failed, s.matrices));
}

Trainer::StepInput Trainer::next_input() {
    StepInput input;
    for (int64_t i = 0; i < config_.micro_batches(); ++i) input.batches.push_back(stream_->next());
    input.stop = stop_requested;
    if (!ranks_) return input;
    // A signal may have reached one rank only, or some before a step and others after it: all have to stop at the same one.
    std::vector<double> totals{0, input.stop ? 1.0 : 0.0};
    for (const Batch& batch : input.batches) totals[0] += double(batch.valid_targets);
    ranks_->sum(totals, "the start of a step");
    input.targets = totals[0], input.stop = totals[1] > 0;
    return input;
}

bool Trainer::train_step() {
    double begin = wall_seconds();
    Control::Activity computing(control(), Control::Kind::computing, format("step %lld", (long long)step_ + 1));
    const StepInput input = next_ ? std::move(*next_) : next_input();
    next_.reset();
    if (input.stop) return false;
    // Should step 0 be skipped as not finite, the first merge is made up for at the next step.
    bool never_merged = method_policy(config_).projects && model_->projected_matrices() == 0;
    StepPlan plan;
    plan.step = step_, plan.lr = learning_rate(config_, step_);
    plan.merges = never_merged || std::binary_search(merges_.begin(), merges_.end(), step_);
    // A matrix's first merge starts from its true weights, not from their NF4 round trip.
    plan.source = source_ ? &source_ : nullptr;
    plan.targets = input.targets;
    StepGradients gradients = accumulate_gradients(device_, *model_, config_, *sums_, input.batches, plan);

    bool finite = std::isfinite(gradients.loss) && std::isfinite(gradients.norm);
    if (finite) apply_gradients(device_, *model_, config_, plan, gradients.norm);
    else handle_nonfinite(gradients);
    if (plan.merges && (finite || gradients.updated)) merge(gradients.waited);
    ++step_;
    // The device is still busy with updates, and several ranks need a moment to agree. Not where an evaluation or a checkpoint comes between: a signal in
    // the meantime is to end the run before another step.
    if (ranks_ && step_ < config_.train.steps && !due(config_.eval.every) && !due(config_.checkpoint.every)) next_ = next_input();
    Communicator::synchronize(device_, "the end of a step");
    ++steps_here_;
    report_step(gradients.loss, gradients.norm, plan.lr, wall_seconds() - begin);
    if (replicas_ && due(config_.run.verify_every)) replicas_->verify(step_);
    return true;
}

// A step whose loss or gradient is not finite is left out, or ends the run.
void Trainer::handle_nonfinite(const StepGradients& gradients) {
    record("nonfinite", {{"step", step_}, {"loss", gradients.loss}, {"grad_norm", gradients.norm}, {"policy", config_.optimizer.nonfinite}});
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
        if (ranks_) ranks_->control().broadcast("");  // rank 0 has written them: all may end
    }
    const char* clip = updates_per_layer(config_) ? "" : config_.optimizer.clip > 0 ? " or optimizer.clip" : " or set optimizer.clip";
    throw UserError(text + "; lower optimizer.lr" + clip + ", or use --nonfinite skip");
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
        record("train", {{"step", step_}, {"loss", loss}, {"lr", lr}, {"grad_norm", gradient_norm}, {"tokens", step_ * int64_t(tokens)},
                                  {"tokens_per_s", rate}, {"mfu", mfu(rate)}, {"full_rank_equivalent_tflops", full_rank_tflops(rate)},
                                  {"step_ms", seconds * 1e3}, {"memory_bytes", memory}, {"skipped", skipped_}});
    double remaining = double(config_.train.steps - step_) * training_seconds_ / double(steps_here_);
    std::string line = format("step %lld/%lld  loss %.4f  lr %.2e  |g| %.3f  %s tok/s", (long long)step_, (long long)config_.train.steps, loss, lr, gradient_norm, human_count(rate_).c_str());
    if (peak_.flops > 0) line += "  " + utilization(rate_);
    line += format("  ETA %s  %.2f GiB", human_duration(remaining).c_str(), double(memory) / double(int64_t(1) << 30));
    if (skipped_) line += format("  %lld skipped", (long long)skipped_);
    if (progress_) progress_->show(line, last || steps_here_ == 1);
}

void Trainer::run() {
    if (step_ == 0) evaluate();
    while (step_ < config_.train.steps && train_step()) {
        if (due(config_.eval.every)) evaluate();
        if (due(config_.checkpoint.every)) save();
    }
    bool finished = step_ >= config_.train.steps;
    if (finished) evaluate();
    save();
    record("end", {{"step", step_}, {"finished", finished}, {"seconds", wall_seconds() - started_}, {"training_seconds", training_seconds_},
                            {"planned_bytes", planned_bytes_}, {"peak_bytes", most_of_all(device_.process_peak_bytes())}, {"skipped", skipped_}});
    if (steps_here_ > 0) {
        double rate = double(steps_here_ * config_.train.batch * config_.train.seq_len) / training_seconds_;
        note(format("mean speed, merges included: %s tok/s%s", human_count(rate).c_str(), peak_.flops > 0 ? (", " + utilization(rate)).c_str() : ""));
    }
    if (!finished) {
        note(format("stopped after step %lld; state saved, --resume continues exactly here", (long long)step_));
        return;
    }
    std::string path = checkpoint_path(checkpoint_folder(config_.run.dir), step_), took = human_duration(wall_seconds() - started_);
    if (steps_here_) note(format("done: %lld steps in %s, final checkpoint %s", (long long)step_, took.c_str(), path.c_str()));
    else note(format("already finished: %lld steps, final checkpoint %s", (long long)step_, path.c_str()));
}

// The training loop: Algorithm 1 of LoQT around data, evaluation, checkpoints and metrics.
#pragma once
#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <set>

#include "comm/communicator.h"
#include "flops.h"
#include "plan.h"
#include "replica_check.h"
#include "runtime/data.h"
#include "runtime/files.h"
#include "runtime/metrics.h"
#include "runtime/workers.h"
#include "training_step.h"

// Set by SIGINT and SIGTERM: the loop finishes its step, saves and returns.
extern std::atomic<bool> stop_requested;

// Several ranks (device.communicator()): rank 0 alone reads and writes the run directory and reports; data are read by all.
class Trainer {
  public:
    // Builds the model within `plan`, opens the data, and starts from scratch or (resume) from the newest valid checkpoint of the run directory.
    Trainer(const Config& config, Device& device, const MemoryPlan& plan, bool resume, const std::vector<std::string>& changes);
    // Trains to the last step (or until stopped), evaluates, saves. Throws UserError on a non-finite loss under policy stop.
    void run();

  private:
    void open_initial_weights();  // random numbers or another model
    void initialize();            // from these, which stay open only as long as a first merge may start from them
    void announce(bool resume, const MemoryPlan& plan, const std::vector<std::string>& changes);
    void check_same_data() const;  // on all ranks
    void start_fresh();
    void restore();
    // What a step trains on, and what the ranks have to agree on before it.
    struct StepInput {
        std::vector<Batch> batches;
        double targets = 0;  // counted, of all ranks; 0 where this process is alone
        bool stop = false;   // some rank was asked to
    };
    StepInput next_input();
    // False, and no step taken, if any rank was asked to stop.
    bool train_step();
    void handle_nonfinite(const StepGradients& gradients);
    void merge(double waited);
    void evaluate();
    void save();
    void report_step(double loss, double gradient_norm, double lr, double seconds);
    void record(const char* event, const std::vector<Field>& fields);  // in metrics.jsonl
    void note(const std::string& text);                                // on the terminal
    bool root() const { return !ranks_ || ranks_->rank() == 0; }
    Control* control() const { return ranks_ ? &ranks_->control() : nullptr; }
    int64_t most_of_all(int64_t value) const;  // the largest of the ranks'
    // Speed figures at a rate in tokens per second (docs/formats.md): MFU, NaN without a known peak; 6·N·rate in TFLOP/s; both as text.
    double mfu(double rate) const { return peak_.flops > 0 ? training_flops_per_token(config_) * rate / (peak_.flops * double(config_.world_size)) : NAN; }
    double full_rank_tflops(double rate) const { return full_rank_flops_per_token(config_) * rate * 1e-12; }
    std::string utilization(double rate) const;
    bool due(int64_t every) const { return every > 0 && step_ % every == 0; }

    Config config_;
    Device& device_;
    Communicator* ranks_;  // null: this process is alone
    int64_t planned_bytes_;
    PeakFlops peak_;
    std::unique_ptr<DirectoryLock> lock_;  // two processes in one run directory would spoil each other's checkpoints
    std::unique_ptr<TokenDataset> train_data_, val_data_;
    WeightSource source_;
    std::unique_ptr<Llama> model_;
    std::unique_ptr<Workers> workers_;  // after the model and the source, which their jobs use
    std::unique_ptr<StepSums> sums_;
    std::unique_ptr<BatchStream> stream_;
    std::unique_ptr<ReplicaCheck> replicas_;   // several ranks
    std::unique_ptr<MetricsFile> metrics_;     // rank 0
    std::unique_ptr<ProgressLine> progress_;   // rank 0
    std::vector<int64_t> merges_;
    std::optional<StepInput> next_;  // agreed on while the device was still busy with the step before
    int64_t step_ = 0;             // steps done
    int64_t skipped_ = 0;          // non-finite steps left out
    int64_t saved_step_ = -1, evaluated_step_ = -1;
    std::set<std::string> trusted_checkpoints_;
    double started_ = 0, training_seconds_ = 0, rate_ = 0;
    int64_t steps_here_ = 0;
};

// For --sample and --export: the weights of the newest valid checkpoint of a run. config.train.micro_batch is set to 1.
std::unique_ptr<Llama> load_trained_model(Config& config, Device& device);

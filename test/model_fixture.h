// A small LLaMA on a device for tests, its weights and reference values from transformers (test/fixtures/make_llama_fixture.py).
#pragma once
#include <memory>

#include "llama.h"
#include "runtime/hf.h"
#include "runtime/safetensors.h"
#include "test/support.h"
#include "training_step.h"
#include "weight_source.h"

// Configuration of a fixture directory with a method; batch 3 × 24 tokens as the reference has it.
inline Config fixture_config(const std::string& directory, const std::string& method, int64_t micro_batch = 3) {
    Config c;
    adopt_huggingface_shape(c, directory);
    c.method.name = method;
    c.method.rank = 16;
    c.method.compensation_rounds = 3;
    c.optimizer.clip = 1e9;  // changes nothing, but merges then wait for the end of the backward pass, and a test can look in between
    c.train.batch = 3, c.train.micro_batch = micro_batch, c.train.seq_len = 24, c.train.steps = 1000;
    validate_config(c);
    return c;
}

struct ReferenceModel {
    SafetensorsReader file;
    Batch batch;
    double loss;

    explicit ReferenceModel(const std::string& directory, int64_t vocab) : file(directory + "/reference.safetensors") {
        batch.rows = 3, batch.seq = 24;
        batch.tokens.resize(72), batch.targets.resize(72);
        file.read("tokens", batch.tokens.data(), 72 * 4);
        file.read("targets", batch.targets.data(), 72 * 4);
        for (int32_t& t : batch.targets) {
            if (t < 0) t = -1;
            batch.valid_targets += t >= 0;
        }
        batch.groups = group_tokens(batch.tokens.data(), 72, vocab);
        std::vector<float> value;
        file.read_floats("loss", value, 0, 1);
        loss = value[0];
    }
    std::vector<float> gradient(const std::string& name, int64_t numel) const {
        std::vector<float> out;
        file.read_floats("grad." + name, out, 0, numel);
        return out;
    }
    // Row r alone.
    Batch row(int64_t r, int64_t vocab) const {
        Batch b;
        b.rows = 1, b.seq = batch.seq;
        b.tokens.assign(batch.tokens.begin() + r * 24, batch.tokens.begin() + (r + 1) * 24);
        b.targets.assign(batch.targets.begin() + r * 24, batch.targets.begin() + (r + 1) * 24);
        for (int32_t t : b.targets) b.valid_targets += t >= 0;
        b.groups = group_tokens(b.tokens.data(), 24, vocab);
        return b;
    }
};

struct SmallModel {
    Device& device;
    Config config;
    Llama model;
    StepSums sums;

    SmallModel(Device& d, const Config& c, const WeightSource& source) : device(d), config(c), model(c, d, true), sums(d, model, c) {
        model.allocate();
        model.initialize(source);
    }
    // Forward and backward; returns the mean loss.
    double pass(const Batch& batch, const BackwardPass& pass = {}) {
        model.zero_gradients();
        model.train(batch, float(1.0 / double(batch.valid_targets)), sums.losses(), 0, pass);
        return sums.read_losses(1) / double(batch.valid_targets);
    }
    Parameter& parameter(const std::string& name) {
        for (Parameter* p : model.parameters())
            if (p->name == name) return *p;
        throw InternalError("no parameter " + name);
    }
    std::vector<float> read(Tensor t) {  // logical elements as fp32
        std::vector<char> host(t.bytes());
        device.download(host.data(), t.data, (t.rows - 1) * t.ld * size_of(t.dtype) + t.cols * size_of(t.dtype));
        std::vector<float> out(t.numel());
        for (int64_t r = 0; r < t.rows; ++r)
            for (int64_t c = 0; c < t.cols; ++c)
                out[r * t.cols + c] = t.dtype == DType::f32 ? reinterpret_cast<float*>(host.data())[r * t.ld + c] : to_float(reinterpret_cast<bf16*>(host.data())[r * t.ld + c]);
        return out;
    }
    std::vector<float> gradient(const std::string& name) {
        Parameter& p = parameter(name);
        return read(p.logical(p.grad));
    }
    std::vector<float> p_of(const Linear& l) {  // (r, h)
        if (config.method.name != "loqt") return read(l.p);
        OnDevice p(device, DType::f32, l.rank, l.h());
        nf4_dequantize(device, p, l.p_q);
        return p.read();
    }
};

// The fixture that a device can run.
inline std::string fixture_for(const Device& device) { return device.is_cuda() ? "test/fixtures/llama_gpu" : "test/fixtures/llama_tiny"; }

// A fixture's model from random weights (or given ones), trained on its batch a step at a time as the trainer does it.
struct TrainingRun {
    Config config;
    WeightSource source;
    ReferenceModel reference;
    SmallModel small;
    std::vector<Batch> batches;
    StepPlan plan;  // of the last step

    TrainingRun(Device& device, const Config& c, WeightSource weights = nullptr)
        : config(c), source(weights ? weights : random_weights(c)), reference(fixture_for(device), c.model.vocab), small(device, c, source), batches{reference.batch} {
        if (c.micro_batches() > 1) batches = {reference.row(0, c.model.vocab), reference.row(1, c.model.vocab), reference.row(2, c.model.vocab)};
    }
    // The gradients of a step, with what is updated and merged inside the backward pass.
    StepGradients backward(int64_t number, double lr, bool merges) {
        plan.step = number, plan.lr = lr, plan.merges = merges, plan.source = number ? nullptr : &source;
        return accumulate_gradients(small.device, small.model, config, small.sums, batches, plan);
    }
    StepGradients step(int64_t number, double lr, bool merges) {
        StepGradients gradients = backward(number, lr, merges);
        apply_gradients(small.device, small.model, config, plan, gradients.norm);
        if (merges) {
            MergeStatistics merged = small.model.merge(number, plan.source);
            CHECK(merged.failed == 0);
            CHECK(merged.matrices == small.model.matrices());
        }
        return gradients;
    }
};

inline double cosine(const std::vector<float>& a, const std::vector<float>& b) {
    double ab = 0, aa = 0, bb = 0;
    for (size_t i = 0; i < a.size(); ++i) ab += double(a[i]) * b[i], aa += double(a[i]) * a[i], bb += double(b[i]) * b[i];
    return ab / std::sqrt(aa * bb);
}

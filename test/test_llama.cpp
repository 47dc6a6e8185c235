// The whole model against transformers (losses and every gradient), and the LoQT layer against the dense one.
#include "test/model_fixture.h"

namespace {

struct Limits {
    double loss, cosine, relative;
};

void check_full_model(Device& device, const std::string& directory, const Limits& limits) {
    Config c = fixture_config(directory, "full");
    c.optimizer.moments = "fp32";
    ReferenceModel reference(directory, c.model.vocab);
    SmallModel m(device, c, huggingface_weights(c, directory));
    double loss = m.pass(reference.batch);
    INFO(directory << ": loss " << loss << ", transformers " << reference.loss);
    CHECK(std::fabs(loss - reference.loss) < limits.loss);
    for (Parameter* p : m.model.parameters()) {
        std::vector<float> ours = m.gradient(p->name), theirs = reference.gradient(p->name, p->rows * p->cols);
        INFO(p->name << " cosine " << cosine(ours, theirs) << " relative error " << relative_error(ours, theirs));
        CHECK(cosine(ours, theirs) >= limits.cosine);
        CHECK(relative_error(ours, theirs) < limits.relative);
    }
    m.model.evaluate(reference.batch, m.sums.losses(), 0);
    CHECK(m.sums.read_losses(1) / double(reference.batch.valid_targets) == Approx(loss).epsilon(1e-6));
}

BackwardPass merging(int64_t step) {
    BackwardPass pass;
    pass.merges = true, pass.step = step;
    return pass;
}

// First merge from the true weights, then a few optimizer steps, so that P, B and moments are all non-trivial.
void warm_up(SmallModel& m, const Batch& batch, const WeightSource& source, int steps) {
    m.pass(batch, merging(0));
    m.model.merge(0, &source);
    for (int t = 0; t < steps; ++t) {
        m.pass(batch);
        update_parameters(m.device, m.model, m.config, t, 1e-3, 1.0);
    }
}

// dB = s·dW·Pᵀ (left), s·dWᵀ·Pᵀ (right), with dW from a dense model at W_eff.
void check_factor_gradients(Device& device, const std::string& directory, const std::string& method, const Limits& limit) {
    Config c = fixture_config(directory, method);
    ReferenceModel reference(directory, c.model.vocab);
    WeightSource source = huggingface_weights(c, directory);
    SmallModel low(device, c, source);
    warm_up(low, reference.batch, source, 3);

    std::map<std::string, std::vector<float>> effective;
    for (auto& t : low.model.exported_tensors()) t.read(effective[t.name]);
    Config dense_config = fixture_config(directory, "full");
    SmallModel dense(device, dense_config, host_weights([&](const std::string& name, std::vector<float>& values) { values = effective.at(name); }));
    double a = low.pass(reference.batch), b = dense.pass(reference.batch);
    INFO(method << ": loss " << a << " against " << b << " of the merged dense model");
    CHECK(std::fabs(a - b) < limit.loss);
    for (LinearGroup* group : low.model.groups())
        for (Linear& l : group->linears()) {
            std::vector<float> dw = dense.gradient(l.name), p = low.p_of(l), db = low.gradient(l.name + ".B");
            std::vector<double> expected(l.n() * l.rank, 0.0);
            for (int64_t i = 0; i < l.n(); ++i)
                for (int64_t r = 0; r < l.rank; ++r)
                    for (int64_t k = 0; k < l.h(); ++k)
                        expected[i * l.rank + r] += c.method.scale * double(l.right ? dw[k * l.in + i] : dw[i * l.in + k]) * double(p[r * l.h() + k]);
            INFO(l.name << (l.right ? " right" : " left") << " relative error " << relative_error(db, expected));
            CHECK(relative_error(db, expected) < limit.relative);
        }
}

// W_eff before and after a merge of every matrix: relative change in the Frobenius norm.
std::vector<double> change_by_merge(SmallModel& m, const Batch& batch) {
    std::map<std::string, std::vector<float>> before;
    for (auto& t : m.model.exported_tensors()) t.read(before[t.name]);
    m.pass(batch, merging(5));
    m.model.merge(5, nullptr);
    std::vector<double> changes;
    for (LinearGroup* group : m.model.groups())
        for (Linear& l : group->linears()) {
            std::vector<float> after;
            group->read_effective(m.device, l, after);
            changes.push_back(relative_error(after, before.at(l.name)));
        }
    return changes;
}

void check_merges(Device& device, const std::string& directory, double exact_limit) {
    Config c = fixture_config(directory, "loqt-nq");
    ReferenceModel reference(directory, c.model.vocab);
    WeightSource source = huggingface_weights(c, directory);
    {
        SmallModel m(device, c, source);
        warm_up(m, reference.batch, source, 3);
        for (double change : change_by_merge(m, reference.batch)) CHECK(change < exact_limit);
        for (LinearGroup* group : m.model.groups())
            for (Linear& l : group->linears())
                for (float b : m.read(l.b.logical(l.b.value))) REQUIRE(b == 0.0f);
    }
    // Quantized, first merge, against the true weights: NF4 alone is off by about 9.2 %, and every round of compensation helps.
    double previous = 0.11;
    for (int64_t rounds : {0, 1, 5}) {
        Config q = fixture_config(directory, "loqt");
        q.method.compensation_rounds = rounds;
        SmallModel m(device, q, source);
        warm_up(m, reference.batch, source, 0);
        double mean = 0;
        int matrices = 0;
        for (LinearGroup* group : m.model.groups())
            for (Linear& l : group->linears()) {
                std::vector<float> effective;
                group->read_effective(device, l, effective);
                OnDevice truth(device, DType::f32, l.out, l.in);
                source(device, l.name, 0, truth);
                mean += relative_error(effective, truth.read()), ++matrices;
            }
        mean /= matrices;
        INFO("rounds " << rounds << " mean error " << mean);
        CHECK(mean < previous);
        CHECK(mean > 0.04);
        previous = mean - 0.005;
        // Later merges move W_eff by no more than a quantization.
        for (double change : change_by_merge(m, reference.batch)) CHECK(change < 0.1);
    }
}

// m ← m·R, v ← v·(R∘R), R = P_old·P_new⁺, in fp64.
void check_projected_moments(Device& device, const std::string& directory, double limit) {
    Config c = fixture_config(directory, "loqt-nq");  // P is orthonormal up to storage, so P⁺ = Pᵀ(PPᵀ)⁻¹ ≈ Pᵀ
    c.method.moments_at_merge = "project";
    ReferenceModel reference(directory, c.model.vocab);
    WeightSource source = huggingface_weights(c, directory);
    SmallModel m(device, c, source);
    warm_up(m, reference.batch, source, 3);
    std::map<std::string, std::vector<float>> old_p, old_m, old_v;
    for (LinearGroup* group : m.model.groups())
        for (Linear& l : group->linears()) old_p[l.name] = m.p_of(l), old_m[l.name] = m.read(l.b.moments.m), old_v[l.name] = m.read(l.b.moments.v);
    m.pass(reference.batch, merging(5));
    m.model.merge(5, nullptr);
    for (LinearGroup* group : m.model.groups())
        for (Linear& l : group->linears()) {
            std::vector<float> p = m.p_of(l), &po = old_p[l.name];
            int64_t r = l.rank, h = l.h();
            std::vector<double> R(r * r, 0.0), em(l.n() * r, 0.0), ev(l.n() * r, 0.0);
            for (int64_t i = 0; i < r; ++i)
                for (int64_t j = 0; j < r; ++j)
                    for (int64_t k = 0; k < h; ++k) R[i * r + j] += double(po[i * h + k]) * double(p[j * h + k]);
            for (int64_t n = 0; n < l.n(); ++n)
                for (int64_t i = 0; i < r; ++i)
                    for (int64_t j = 0; j < r; ++j) {
                        em[n * r + j] += double(old_m[l.name][n * r + i]) * R[i * r + j];
                        ev[n * r + j] += double(old_v[l.name][n * r + i]) * R[i * r + j] * R[i * r + j];
                    }
            INFO(l.name);
            CHECK(relative_error(m.read(l.b.moments.m), em) < limit);
            CHECK(relative_error(m.read(l.b.moments.v), ev) < limit);
        }
}

// keep: the same bits and Adam's t as before the merge; reset: zeros, and t starts over.
void check_kept_and_reset_moments(Device& device, const std::string& directory) {
    for (const char* policy : {"keep", "reset"}) {
        Config c = fixture_config(directory, "loqt");
        c.method.moments_at_merge = policy;
        bool reset = c.method.moments_at_merge == "reset";
        ReferenceModel reference(directory, c.model.vocab);
        SmallModel m(device, c, huggingface_weights(c, directory));
        warm_up(m, reference.batch, huggingface_weights(c, directory), 3);
        m.pass(reference.batch, merging(5));
        std::map<std::string, std::vector<float>> before;
        for (LinearGroup* group : m.model.groups())
            for (Linear& l : group->linears())
                for (const Tensor& t : {l.b.moments.m, l.b.moments.v}) {
                    std::vector<float> values = m.read(t);
                    CHECK(std::any_of(values.begin(), values.end(), [](float x) { return x != 0.0f; }));
                    before[l.name].insert(before[l.name].end(), values.begin(), values.end());
                }
        m.model.merge(5, nullptr);
        for (LinearGroup* group : m.model.groups())
            for (Linear& l : group->linears()) {
                INFO(policy << " " << l.name);
                std::vector<float> after = m.read(l.b.moments.m), second = m.read(l.b.moments.v);
                after.insert(after.end(), second.begin(), second.end());
                CHECK(after == (reset ? std::vector<float>(after.size(), 0.0f) : before[l.name]));
                CHECK(l.b.updates == (reset ? 0 : 3));
            }
    }
}

// Micro-batches of one row sum to the gradient of the whole batch.
void check_accumulation(Device& device, const std::string& directory, double limit) {
    for (const char* method : {"full", "loqt"}) {
        Config whole = fixture_config(directory, method), parts = fixture_config(directory, method, 1);
        ReferenceModel reference(directory, whole.model.vocab);
        WeightSource source = huggingface_weights(whole, directory);
        SmallModel a(device, whole, source), b(device, parts, source);
        bool loqt = whole.method.name == "loqt";
        for (int round = 0; round < (loqt ? 2 : 1); ++round) {  // loqt: first the projections of the summed gradient, then dB
            BackwardPass pass;
            pass.merges = loqt && round == 0;
            double loss_a = a.pass(reference.batch, pass), loss_b = 0;
            b.model.zero_gradients();
            pass.whole_batch = true;
            for (int64_t r = 0; r < 3; ++r) {
                pass.first = r == 0, pass.last = r == 2;
                b.model.train(reference.row(r, whole.model.vocab), float(1.0 / double(reference.batch.valid_targets)), b.sums.losses(), r, pass);
            }
            loss_b = b.sums.read_losses(3) / double(reference.batch.valid_targets);
            CHECK(loss_a == Approx(loss_b).epsilon(round ? 2e-3 : limit));
            for (Parameter* p : a.model.parameters()) {
                INFO(method << " round " << round << " " << p->name);
                std::vector<float> ga = a.gradient(p->name), gb = b.gradient(p->name);
                if (loqt && round == 0 && !p->active) continue;
                // After the merge a code of P or W may differ where a gradient differed in its last bit; a lost micro-batch would be far above 3 %.
                CHECK(relative_error(gb, ga) < (round ? 0.03 : limit));
            }
            if (pass.merges) a.model.merge(0, &source), b.model.merge(0, &source);
        }
    }
}

// Same inputs, same bits: losses and gradients of a step, a merge and another step.
void check_determinism(Device& device, const std::string& directory) {
    Config c = fixture_config(directory, "loqt");
    ReferenceModel reference(directory, c.model.vocab);
    WeightSource source = huggingface_weights(c, directory);
    std::vector<std::vector<float>> first;
    for (const char* way : {"rebuilt", "rebuilt", "cached"}) {  // keeping W_eff changes no bit either
        c.train.effective_weights = way;
        SmallModel m(device, c, source);
        warm_up(m, reference.batch, source, 2);
        m.pass(reference.batch);
        std::vector<std::vector<float>> gradients;
        for (Parameter* p : m.model.parameters()) gradients.push_back(m.gradient(p->name));
        if (first.empty()) first = gradients;
        CHECK(first == gradients);
    }
}

// Padding of odd widths stays zero through steps and merges.
void check_padding(Device& device, const std::string& directory) {
    Config c = fixture_config(directory, "loqt");
    ReferenceModel reference(directory, c.model.vocab);
    WeightSource source = huggingface_weights(c, directory);
    SmallModel m(device, c, source);
    warm_up(m, reference.batch, source, 2);
    for (LinearGroup* group : m.model.groups())
        for (Linear& l : group->linears()) {
            std::vector<float> b = m.read(l.b.value);
            for (size_t i = size_t(l.n() * l.rank); i < b.size(); ++i) REQUIRE(b[i] == 0.0f);
        }
}

const char* kTiny = "test/fixtures/llama_tiny";  // intermediate 171: padded in memory
const char* kGpu = "test/fixtures/llama_gpu";    // head size 64, weights exact in bf16

}  // namespace

TEST_CASE("llama: loss and gradients of transformers", "[llama]") {
    auto device = test_device("cpu");
    check_full_model(*device, kTiny, {1e-4, 0.99999, 1e-4});
    check_full_model(*device, kGpu, {1e-4, 0.9999, 6e-3});  // reference gradients are stored in bf16
}
TEST_CASE("llama on the GPU: loss and gradients of transformers", "[llama][gpu]") {
    auto device = test_device("cuda");
    check_full_model(*device, kGpu, {5e-3, 0.999, 4e-2});
}
TEST_CASE("loqt: the gradient of B is the projected dense gradient", "[loqt]") {
    auto device = test_device("cpu");
    for (const char* method : {"loqt", "loqt-nq"}) check_factor_gradients(*device, kTiny, method, {1e-4, 0, 1e-4});
}
TEST_CASE("loqt on the GPU: the gradient of B is the projected dense gradient", "[loqt][gpu]") {
    auto device = test_device("cuda");
    for (const char* method : {"loqt", "loqt-nq"}) check_factor_gradients(*device, kGpu, method, {5e-3, 0, 0.12});
    // The two models round W_eff at different places, and bf16 noise is large in what is left of dS after its rows cancel. The layer
    // itself is held to 6e-3 in test_loqt.cpp.
}
TEST_CASE("loqt: a merge keeps the function", "[loqt]") {
    auto device = test_device("cpu");
    check_merges(*device, kTiny, 1e-6);
}
TEST_CASE("loqt on the GPU: a merge keeps the function", "[loqt][gpu]") {
    auto device = test_device("cuda");
    check_merges(*device, kGpu, 2.5e-3);
}
TEST_CASE("loqt: moments projected into the new basis", "[loqt]") {
    auto device = test_device("cpu");
    check_projected_moments(*device, kTiny, 1e-4);
}
TEST_CASE("loqt on the GPU: moments projected into the new basis", "[loqt][gpu]") {
    auto device = test_device("cuda");
    check_projected_moments(*device, kGpu, 2e-2);
}
TEST_CASE("loqt: moments kept or reset at a merge", "[loqt]") { check_kept_and_reset_moments(*test_device("cpu"), kTiny); }
TEST_CASE("loqt on the GPU: moments kept or reset at a merge", "[loqt][gpu]") { check_kept_and_reset_moments(*test_device("cuda"), kGpu); }
TEST_CASE("llama: micro-batches add up to the batch", "[llama]") {
    auto device = test_device("cpu");
    check_accumulation(*device, kTiny, 2e-4);
}
TEST_CASE("llama on the GPU: micro-batches add up to the batch", "[llama][gpu]") {
    auto device = test_device("cuda");
    check_accumulation(*device, kGpu, 3e-2);
}
TEST_CASE("llama: same inputs, same bits", "[llama]") {
    auto device = test_device("cpu");
    check_determinism(*device, kTiny);
}
TEST_CASE("llama on the GPU: same inputs, same bits", "[llama][gpu]") {
    auto device = test_device("cuda");
    check_determinism(*device, kGpu);
}
TEST_CASE("loqt: padding stays zero", "[loqt]") {
    auto device = test_device("cpu");
    check_padding(*device, kTiny);
}
TEST_CASE("export: a dry run counts the scratch of merging an adapter", "[loqt]") {
    Config c;
    c.model.vocab = 64, c.model.hidden = 512, c.model.intermediate = 1376, c.model.layers = 1;  // a vocabulary that does not hide it
    c.method.rank = 512;
    c.train.batch = c.train.micro_batch = 1, c.train.seq_len = 16;
    auto device = Device::open_dry(DeviceKind::cuda);
    Llama model(c, *device, false);
    model.allocate();
    std::vector<float> unused;
    for (auto& t : model.exported_tensors()) t.read(unused);
    CHECK(device->scratch_high_water() >= 4 * (1376 * 512 + 512 * 512 + 1376 * 512));  // W, P and B in fp32
}
TEST_CASE("llama: a head size without a GPU kernel is the user's mistake", "[llama]") {
    Config c;
    c.model.hidden = 96, c.model.heads = 3, c.train.micro_batch = 1;
    auto cpu = Device::open_dry(DeviceKind::cpu), cuda = Device::open_dry(DeviceKind::cuda);
    CHECK_NOTHROW(Llama(c, *cpu, true));
    CHECK_THROWS_AS(Llama(c, *cuda, true), UserError);
}

// The other methods of Table 1, each against what its authors define.
#include <algorithm>

#include "test/model_fixture.h"

namespace {

struct Run : TrainingRun {
    using TrainingRun::TrainingRun;
    std::vector<std::vector<float>> effective_weights() {
        std::vector<std::vector<float>> all;
        for (LinearGroup* group : small.model.groups())
            for (Linear& l : group->linears()) {
                all.emplace_back();
                group->read_effective(small.device, l, all.back());
            }
        return all;
    }
    template <class F> void each(F&& f) {
        for (LinearGroup* group : small.model.groups())
            for (Linear& l : group->linears()) f(l);
    }
};

Config method_config(const Device& device, const std::string& method) {
    Config c = fixture_config(fixture_for(device), method);
    c.optimizer.clip = 0;
    c.train.seed = int64_t(fresh_seed());
    return c;
}

// As initializations have it that begin with the identity: no gradient reaches q, k and v at first.
WeightSource without_o_proj(const Config& c) {
    return [source = random_weights(c)](Device& device, const std::string& name, int64_t row_begin, Tensor rows) {
        if (name.find("o_proj") == std::string::npos) return source(device, name, row_begin, rows);
        device.zero(rows);
    };
}

std::vector<float> difference(const std::vector<float>& a, const std::vector<float>& b) {
    std::vector<float> d(a.size());
    for (size_t i = 0; i < a.size(); ++i) d[i] = a[i] - b[i];
    return d;
}

// In exact arithmetic the two follow one trajectory between refreshes (LoQT section 3.2). Both start from the same weights and the same P: a
// first step with learning rate 0 that only projects, and moments set back to nothing.
void check_galore_is_loqt_nq(Device& device) {
    Config nq_config = method_config(device, "loqt-nq");
    nq_config.optimizer.eps = 1e-20;  // Adam's update then does not depend on the scale of its gradient, which is s in one and 1 in the other
    nq_config.optimizer.rounding = "nearest";
    Config galore_config = nq_config;
    galore_config.method.name = "galore";
    INFO("seed " << nq_config.train.seed);
    Run nq(device, nq_config), galore(device, galore_config);
    auto before = nq.effective_weights();
    CHECK(galore.effective_weights() == before);
    for (Run* run : {&nq, &galore}) {
        run->step(0, 0.0, true);
        for (Parameter* p : run->small.model.parameters()) {
            for (Tensor t : {p->moments.m, p->moments.v})
                if (t) device.zero(t);
            p->updates = 0;
        }
        run->each([&](Linear& l) {
            for (Tensor t : {l.b.moments.m, l.b.moments.v})
                if (t) device.zero(t);
        });
    }
    for (int64_t step = 1; step <= 6; ++step) CHECK(galore.step(step, 2e-3, false).loss == Approx(nq.step(step, 2e-3, false).loss).epsilon(2e-5));
    auto a = nq.effective_weights(), b = galore.effective_weights();
    for (size_t i = 0; i < a.size(); ++i) {
        std::vector<float> moved = difference(a[i], before[i]), other = difference(b[i], before[i]);
        INFO("matrix " << i);
        CHECK(std::any_of(moved.begin(), moved.end(), [](float x) { return x != 0; }));
        CHECK(relative_error(other, std::vector<double>(moved.begin(), moved.end())) < 5e-3);
    }
}

// GaLore's step stays within the span of P, and its moments have rank r.
void check_galore_step(Device& device) {
    Config c = method_config(device, "galore");
    Run run(device, c);
    auto before = run.effective_weights();
    run.step(0, 1e-2, true);
    auto after = run.effective_weights();
    size_t i = 0;
    run.each([&](Linear& l) {
        INFO(l.name << (l.right ? " right" : " left"));
        CHECK(l.b.moments.m.cols == l.n() * l.rank);
        std::vector<float> p = run.small.p_of(l), d = difference(after[i], before[i]);
        ++i;
        // d minus its projection onto the rows of P, which are orthonormal up to their storage type.
        double outside = 0, all = 0;
        for (int64_t line = 0; line < l.n(); ++line) {
            auto at = [&](int64_t k) { return l.right ? d[k * l.in + line] : d[line * l.in + k]; };
            std::vector<double> rest(l.h());
            for (int64_t k = 0; k < l.h(); ++k) rest[k] = at(k);
            for (int64_t q = 0; q < l.rank; ++q) {
                double dot = 0;
                for (int64_t k = 0; k < l.h(); ++k) dot += double(p[q * l.h() + k]) * at(k);
                for (int64_t k = 0; k < l.h(); ++k) rest[k] -= dot * p[q * l.h() + k];
            }
            for (int64_t k = 0; k < l.h(); ++k) outside += rest[k] * rest[k], all += double(at(k)) * at(k);
        }
        CHECK(all > 0);
        CHECK(std::sqrt(outside / all) < (device.is_cuda() ? 0.2 : 1e-4));  // W in bf16: rounding of W itself lies anywhere
    });
}

// A matrix without a gradient at the refresh has no P, takes no step, and counts none: so it is after a resume too, which goes by the counters.
void check_galore_without_gradient(Device& device) {
    Config c = method_config(device, "galore");
    c.optimizer.weight_decay = 0.1;
    Run run(device, c, without_o_proj(c));
    auto before = run.effective_weights();
    for (int64_t step = 0; step < 3; ++step) {
        StepGradients gradients = run.backward(step, 1e-2, step == 0);
        apply_gradients(device, run.small.model, c, run.plan, gradients.norm);
        if (step == 0) CHECK(run.small.model.merge(step, nullptr).failed == 3 * int(c.model.layers));
    }
    auto after = run.effective_weights();
    for (LinearGroup* group : run.small.model.groups()) group->restored();
    size_t i = 0;
    run.each([&](Linear& l) {
        INFO(l.name);
        const bool left_out = l.name.find("q_proj") != std::string::npos || l.name.find("k_proj") != std::string::npos || l.name.find("v_proj") != std::string::npos;
        CHECK(l.dense.updates == (left_out ? 0 : 3));
        CHECK(l.projected == !left_out);
        CHECK((after[i] == before[i]) == left_out);
        ++i;
    });
}

void check_lora_start(Device& device) {
    for (const char* method : {"lora", "qlora", "relora"}) {
        Config c = method_config(device, method), plain = c;
        plain.method.name = "full";
        INFO(method << " seed " << c.train.seed);
        Run run(device, c), reference(device, plain);
        auto w = run.effective_weights(), w0 = reference.effective_weights();
        for (size_t i = 0; i < w.size(); ++i) {
            if (method == std::string("qlora")) CHECK(relative_error(w[i], std::vector<double>(w0[i].begin(), w0[i].end())) == Approx(0.092).margin(0.006));
            else CHECK(w[i] == w0[i]);
        }
        run.each([&](Linear& l) {  // uniform within ±1/√in on the side of x, zeros on the other
            std::vector<float> x = run.small.read(l.right ? l.b.logical(l.b.value) : l.a.value), zero = run.small.read(l.right ? l.a.value : l.b.logical(l.b.value));
            double bound = 1 / std::sqrt(double(l.in)), squares = 0;
            for (float v : x) {
                REQUIRE(std::fabs(v) <= bound * 1.004);  // bf16 may round up
                squares += double(v) * v;
            }
            CHECK(std::sqrt(squares / double(x.size())) == Approx(bound / std::sqrt(3.0)).epsilon(0.1));
            CHECK(std::all_of(zero.begin(), zero.end(), [](float v) { return v == 0; }));
        });
        double first = run.step(0, 1e-2, false).loss, last = first;
        for (int64_t step = 1; step < 25; ++step) last = run.step(step, 1e-2, false).loss;
        CHECK(last < first - 0.3);
    }
}

double residual(Device& device, const Config& c, const std::vector<std::vector<float>>& w0) {
    Run run(device, c);
    auto w = run.effective_weights();
    double squares = 0, all = 0;
    for (size_t i = 0; i < w.size(); ++i)
        for (size_t k = 0; k < w[i].size(); ++k) squares += std::pow(double(w[i][k]) - w0[i][k], 2), all += double(w0[i][k]) * w0[i][k];
    return std::sqrt(squares / all);
}

void check_loftq(Device& device) {
    Config c = method_config(device, "loftq"), plain = c;
    INFO("seed " << c.train.seed);
    plain.method.name = "full";
    auto w0 = Run(device, plain).effective_weights();
    Config qlora = c;
    qlora.method.name = "qlora";
    double last = residual(device, qlora, w0);
    CHECK(last == Approx(0.092).margin(0.003));
    for (int64_t rounds : {1, 2, 5}) {
        c.method.loftq_rounds = rounds;
        double error = residual(device, c, w0);
        CHECK(error < last - 1e-3);
        last = error;
    }
    Run run(device, c);  // both factors carry the same: row i of P is as long as column i of B
    run.each([&](Linear& l) {
        std::vector<float> p = run.small.read(l.a.value), b = run.small.read(l.b.logical(l.b.value));
        for (int64_t i = 0; i < l.rank; ++i) {
            double pp = 0, bb = 0;
            for (int64_t k = 0; k < l.h(); ++k) pp += double(p[i * l.h() + k]) * p[i * l.h() + k];
            for (int64_t k = 0; k < l.n(); ++k) bb += double(b[k * l.rank + i]) * b[k * l.rank + i];
            REQUIRE(pp == Approx(bb).epsilon(0.03));
        }
    });
}

// Where quantization loses nothing there is no residual to start from, and two factors of zeros would have no gradient for ever.
void check_loftq_without_residual(Device& device) {
    Config c = method_config(device, "loftq");
    INFO("seed " << c.train.seed);
    Run run(device, c, without_o_proj(c));
    auto before = run.effective_weights();
    for (int64_t step = 0; step < 3; ++step) run.step(step, 1e-2, false);
    auto after = run.effective_weights();
    size_t i = 0;
    run.each([&](Linear& l) {
        INFO(l.name);
        if (l.name.find("o_proj") != std::string::npos) CHECK(std::all_of(before[i].begin(), before[i].end(), [](float x) { return x == 0; }));
        CHECK(after[i] != before[i]);
        ++i;
    });
}

void check_restart(Device& device) {
    Config c = method_config(device, "relora");
    c.method.relora_prune = 0.9;
    Run run(device, c);
    INFO("seed " << c.train.seed);
    for (int64_t step = 0; step < 5; ++step) run.step(step, 1e-2, false);
    auto before = run.effective_weights();
    std::map<std::string, std::vector<float>> moments, first_moments;
    run.each([&](Linear& l) {
        moments[l.name] = run.small.read(l.a.moments.v);
        first_moments[l.name] = run.small.read(l.a.moments.m);
    });
    run.small.model.merge(5, nullptr);
    auto after = run.effective_weights();
    for (size_t i = 0; i < before.size(); ++i)
        CHECK(relative_error(after[i], std::vector<double>(before[i].begin(), before[i].end())) < (device.is_cuda() ? 2.5e-3 : 1e-6));
    run.each([&](Linear& l) {
        INFO(l.name);
        std::vector<float> second = run.small.read(l.right ? l.a.value : l.b.logical(l.b.value)), old = moments.at(l.name), v = run.small.read(l.a.moments.v);
        std::vector<float> m = run.small.read(l.a.moments.m), old_m = first_moments.at(l.name);
        CHECK(std::all_of(second.begin(), second.end(), [](float x) { return x == 0; }));
        std::vector<float> sorted = old;
        std::sort(sorted.begin(), sorted.end());
        size_t zeros = size_t(std::llround(0.9 * double(v.size()))), kept = 0;
        for (size_t i = 0; i < v.size(); ++i) {
            // An element that kept m and lost v would move by lr·m/√(0.001·g²): without bound.
            if (v[i] == 0) { CHECK(m[i] == 0); continue; }
            CHECK(m[i] == old_m[i]);
            ++kept;
            CHECK(v[i] == old[i]);
            CHECK(old[i] >= sorted[zeros]);
        }
        CHECK(kept <= v.size() - zeros);
        CHECK(kept + 2 >= v.size() - zeros);
    });
}

}  // namespace

TEST_CASE("galore and loqt-nq follow one trajectory between refreshes", "[methods]") { check_galore_is_loqt_nq(*test_device("cpu")); }
TEST_CASE("a galore step lies in the span of P", "[methods]") { check_galore_step(*test_device("cpu")); }
TEST_CASE("galore: a matrix without a gradient waits for the next refresh", "[methods]") { check_galore_without_gradient(*test_device("cpu")); }
TEST_CASE("loftq trains a matrix that quantization leaves as it is", "[methods]") { check_loftq_without_residual(*test_device("cpu")); }
TEST_CASE("lora, qlora and relora start from W and learn", "[methods]") { check_lora_start(*test_device("cpu")); }
TEST_CASE("loftq loses less with every alternation", "[methods]") { check_loftq(*test_device("cpu")); }
TEST_CASE("a relora restart leaves the function and prunes the moments", "[methods]") { check_restart(*test_device("cpu")); }

TEST_CASE("every method has a policy, and the configuration knows which have adapters", "[methods]") {
    Config c;
    std::string names;
    visit_config(c, [&](const std::string& path, auto&, const char*, const char* choices) {
        if (path == "method.name") names = choices;
    });
    int count = 0;
    for (size_t begin = 0, end; begin < names.size(); begin = end + 1, ++count) {
        end = std::min(names.find('|', begin), names.size());
        c.method.name = names.substr(begin, end - begin);
        INFO(c.method.name);
        CHECK(c.low_rank() == method_policy(c).adapters);
    }
    CHECK(count == 8);
}

TEST_CASE("relora: the rate rises anew after every restart", "[methods]") {
    Config c;
    c.method.name = "relora", c.method.relora_gap = 100, c.method.relora_warmup = 20, c.train.steps = 1000;
    CHECK(merge_steps(c) == std::vector<int64_t>{100, 200, 300, 400, 500, 600, 700, 800});
    Config plain = c;
    plain.method.name = "lora";
    CHECK(merge_steps(plain).empty());
    for (int64_t step = 0; step < 1000; ++step) {
        int64_t since = step > 800 ? step - 800 : step > 100 ? (step - 1) % 100 + 1 : 1000;
        CHECK(learning_rate(c, step) == Approx(learning_rate(plain, step) * std::min(1.0, double(since) / 20.0)));
    }
}

TEST_CASE("a galore step on the GPU", "[methods][gpu]") { check_galore_step(*test_device("cuda")); }
TEST_CASE("lora, qlora and relora on the GPU", "[methods][gpu]") { check_lora_start(*test_device("cuda")); }
TEST_CASE("loftq on the GPU", "[methods][gpu]") { check_loftq(*test_device("cuda")); }
TEST_CASE("a relora restart on the GPU", "[methods][gpu]") { check_restart(*test_device("cuda")); }

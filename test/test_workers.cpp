// Forked devices and the threads that work on them: own scratch, shared memory, order, failures, the same results whoever computes them.
#include "runtime/workers.h"

#include "loqt.h"
#include "ops/elementwise.h"
#include "ops/matmul.h"
#include "test/support.h"
#include "weight_source.h"

namespace {

constexpr int64_t kScratch = int64_t(64) << 20;

void check_fork(Device& device) {
    auto fork = device.fork();
    CHECK(fork->kind() == device.kind());
    CHECK_FALSE(fork->dry());
    CHECK(fork->workers() == nullptr);
    fork->reserve_scratch(1 << 20);
    int64_t used = device.scratch_high_water();
    {
        ScratchScope scope(*fork);
        scope.tensor("own", DType::f32, 1, 1000);
    }
    CHECK(fork->scratch_high_water() >= 4000);
    CHECK(device.scratch_high_water() == used);

    // Back and forth: each product waits for the one on the other device.
    std::mt19937_64 rng(fresh_seed());
    const int64_t n = 300;
    OnDevice a(device, DType::f32, n, n, random_normal(rng, n * n, 0.05f)), b(device, DType::f32, n, n), c(device, DType::f32, n, n), expected(device, DType::f32, n, n);
    matmul(device, b, 1.0f, a, Op::none, a, Op::none);
    matmul(device, c, 1.0f, b, Op::none, a, Op::none);
    matmul(device, expected, 1.0f, c, Op::none, a, Op::none);
    std::vector<float> wanted = expected.read();
    for (int trial = 0; trial < 20; ++trial) {
        for (OnDevice* t : {&b, &c, &expected}) device.zero(*t);
        matmul(device, b, 1.0f, a, Op::none, a, Op::none);
        fork->wait_for(device);
        matmul(*fork, c, 1.0f, b, Op::none, a, Op::none);
        device.wait_for(*fork);
        matmul(device, expected, 1.0f, c, Op::none, a, Op::none);
        REQUIRE(expected.read() == wanted);
    }
}

void check_jobs(Device& device) {
    Workers workers(device, 3, 1 << 20);
    CHECK(device.workers() == &workers);
    CHECK(workers.count() == 3);
    // More jobs than workers, each with scratch of its own that outlives the call that starts it.
    const int64_t n = 64;
    std::vector<std::unique_ptr<OnDevice>> results;
    for (int i = 0; i < 20; ++i) results.push_back(std::make_unique<OnDevice>(device, DType::f32, n, n));
    for (int i = 0; i < 20; ++i) {
        Device& helper = workers.idle();
        CHECK(helper.scratch_mark() == 0);
        auto scope = std::make_shared<ScratchScope>(helper);
        Tensor t = scope->tensor("input", DType::f32, n, n);
        OnDevice value(device, DType::f32, n, n, std::vector<float>(n * n, float(i)));
        convert(device, t, value);
        workers.start(helper, [t, scope, out = results[i]->t](Device& d) {
            ScratchScope inner(d);
            Tensor twice = inner.tensor("twice", DType::f32, out.rows, out.cols);
            axpby(d, twice, 2.0f, t, 0.0f);
            convert(d, out, twice);
        });
    }
    workers.finish();
    for (int i = 0; i < 20; ++i) CHECK(results[i]->read() == std::vector<float>(n * n, 2.0f * float(i)));
    CHECK(workers.scratch_high_water() == 2 * n * n * 4);

    // What a job throws reaches the thread that waits, once, and the worker works on.
    workers.start(workers.idle(), [](Device&) { throw UserError("no such luck"); });
    CHECK_THROWS_AS(workers.finish(), UserError);
    bool ran = false;
    workers.start(workers.idle(), [&](Device&) { ran = true; });
    workers.finish();
    CHECK(ran);
}

// A group of matrices through two merges: everything that is stored afterwards, and the energies.
struct Merged {
    std::vector<std::vector<char>> state;
    std::vector<float> energies;
};

struct MergeCase {
    int64_t T, in, rank, scratch;
    std::vector<LinearGroup::Spec> outs;
};
const MergeCase kSmall{300, 96, 24, kScratch, {{"a", 160}, {"b", 96}, {"c", 64}, {"d", 171}, {"e", 200}}};
// Products large enough for a GPU to choose their algorithm by timing, which forks do not do.
const MergeCase kLarge{2048, 1024, 256, int64_t(512) << 20, {{"a", 2736}, {"b", 1024}, {"c", 512}}};

// inside: each matrix is merged inside the backward pass, else all of them after it.
Merged merge_twice(Device& device, const MergeCase& shape, const std::string& projection, int worker_count, bool inside) {
    Config c;
    c.optimizer.clip = inside ? 0 : 1;
    c.method.rank = shape.rank, c.method.projection = projection, c.method.compensation_rounds = 2, c.method.moments_at_merge = "project";
    c.train.micro_batch = c.train.batch = 1;
    const int64_t T = shape.T, in = shape.in;
    std::mt19937_64 rng(7);
    TensorTable table;
    LinearGroup group;
    group.configure(c, in, shape.outs);
    group.register_tensors(Registration{table, device, c, true});
    table.allocate(device);
    WeightSource source = random_weights(c);
    std::unique_ptr<Workers> workers;  // after what their jobs use
    if (worker_count) workers = std::make_unique<Workers>(device, worker_count, shape.scratch);
    group.initialize(device, source);
    OnDevice x(device, device.activation_dtype(), T, group.in_padded(), random_normal(rng, T * group.in_padded())),
        dy(device, device.activation_dtype(), T, group.out_padded(), random_normal(rng, T * group.out_padded()));
    Merged merged;
    for (int64_t step : {0, 10}) {
        BackwardPass pass;
        pass.merges = true, pass.step = step, pass.source = step ? nullptr : &source;
        if (inside) pass.update = [](Parameter&) {};
        group.parameter_gradients(device, dy, x, pass);
        if (workers) workers->finish();
        MergeStatistics statistics;
        group.start_reinitialization(device, step, pass.source);
        if (workers) workers->finish();
        group.finish_reinitialization(statistics);
        CHECK(statistics.failed == 0);
        merged.energies.push_back(float(statistics.captured_energy));
        for (Linear& l : group.linears())
            for (Tensor t : {l.w_q.codes, l.w_q.codes8, l.p_q.codes, l.p_q.scale2, l.b.value}) {
                merged.state.emplace_back(t.bytes());
                device.download(merged.state.back().data(), t.data, t.bytes());
            }
    }
    return merged;
}

void check_independence(Device& device, const MergeCase& shape) {
    for (const char* projection : {"gram", "subspace"}) {
        Merged reference = merge_twice(device, shape, projection, 0, false);
        for (auto [count, inside] : {std::pair<int, bool>{1, false}, {2, true}, {5, false}, {5, true}, {5, true}, {0, true}}) {
            INFO(projection << ", " << count << " workers, " << (inside ? "inside the backward pass" : "after it"));
            Merged merged = merge_twice(device, shape, projection, count, inside);
            CHECK(merged.state == reference.state);
            CHECK(merged.energies == reference.energies);
        }
    }
}

}  // namespace

TEST_CASE("a forked device has its own scratch and waits when told", "[workers]") { check_fork(*test_device("cpu")); }
TEST_CASE("workers run jobs, hand failures on and give their scratch back", "[workers]") { check_jobs(*test_device("cpu")); }
TEST_CASE("a merge does not depend on the number of workers, nor on its place in the step", "[workers]") { check_independence(*test_device("cpu"), kSmall); }

TEST_CASE("a dry device's workers count scratch and run nothing", "[workers]") {
    auto device = Device::open_dry(DeviceKind::cuda);
    Workers workers(*device, 2, 0);
    for (int i = 0; i < 3; ++i) {
        auto scope = std::make_shared<ScratchScope>(workers.idle());
        scope->tensor("kept for the job", DType::f32, 1, 1024);
        workers.start(workers.idle(), [scope](Device& d) {
            CHECK(d.dry());
            ScratchScope inner(d);
            inner.tensor("of the job", DType::f32, 1, 2048);
        });
    }
    workers.finish();
    CHECK(workers.scratch_high_water() == 3 * 4096);
    CHECK(device->scratch_high_water() == 0);
    CHECK(Device::fork_bytes(DeviceKind::cpu) == 0);
    CHECK(Device::fork_bytes(DeviceKind::cuda) > 0);
}

TEST_CASE("a forked device on the GPU", "[workers][gpu]") { check_fork(*test_device("cuda")); }
TEST_CASE("workers on the GPU", "[workers][gpu]") { check_jobs(*test_device("cuda")); }
TEST_CASE("a merge on the GPU does not depend on the number of workers, nor on its place in the step", "[workers][gpu]") {
    check_independence(*test_device("cuda"), kSmall);
    check_independence(*test_device("cuda", int64_t(1) << 30), kLarge);
}

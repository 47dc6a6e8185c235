// Collective operations between processes: sums against fp64, the same bits on all ranks and every time, ranks that are lost.
#include "comm/communicator.h"

#include <cstring>
#include <set>

#include "ops/elementwise.h"
#include "runtime/profile.h"
#include "test/ranks.h"
#include "test/support.h"

namespace {

using Values = std::vector<float>;

std::unique_ptr<Device> device_of_rank(const World& world, const std::string& kind) {
    return test_device(kind == "cuda" ? format("cuda:%d", world.local_rank) : kind, 1 << 20);
}

// Every rank can tell what any rank has.
Values values_of(uint64_t seed, int rank, int64_t n, DType type) {
    std::mt19937_64 rng(seed + 1000003 * uint64_t(rank));
    Values values(n);
    for (float& x : values) x = float(int64_t(rng())) * 0x1p-60f;
    for (int64_t i = 0; i < n; i += 7) values[i] *= 1e3f;
    return type == DType::bf16 ? round_to_bf16(values) : values;
}

// The sum over ranks in fp64 and the error that any order of additions keeps to.
struct Exact {
    double sum = 0, bound = 0;
};
std::vector<Exact> exact_sums(uint64_t seed, int size, int64_t n, DType type) {
    std::vector<Exact> exact(n);
    for (int rank = 0; rank < size; ++rank) {
        const Values values = values_of(seed, rank, n, type);
        for (int64_t i = 0; i < n; ++i) exact[i].sum += values[i], exact[i].bound += std::fabs(values[i]);
    }
    for (Exact& e : exact) e.bound *= size * std::ldexp(1.0, type == DType::bf16 ? -8 : -24);
    return exact;
}

void check_sums(const Values& got, const std::vector<Exact>& exact) {
    REQUIRE(got.size() == exact.size());
    for (size_t i = 0; i < got.size(); ++i)
        if (!(std::fabs(got[i] - exact[i].sum) <= exact[i].bound)) FAIL("element " << i << ": " << got[i] << ", expected " << exact[i].sum << " ± " << exact[i].bound);
}

std::string bytes_of(const OnDevice& t) {
    const auto bytes = t.raw<char>();
    return std::string(bytes.begin(), bytes.end());
}

// Tensors of the same shapes on all ranks, filled from a seed.
struct Tensors {
    Communicator& ranks;
    std::vector<uint64_t> seeds;
    std::vector<std::unique_ptr<OnDevice>> list;

    Tensors(Device& device, std::mt19937_64& rng, const std::vector<int64_t>& sizes) : ranks(*device.communicator()) {
        for (int64_t n : sizes) {
            const int64_t rows = n % 3 == 0 ? 3 : 1;
            const DType type = device.is_cuda() && rng() % 2 ? DType::bf16 : DType::f32;
            seeds.push_back(rng());
            list.push_back(std::make_unique<OnDevice>(device, type, rows, n / rows));
        }
    }
    void fill() {
        for (size_t i = 0; i < list.size(); ++i) list[i]->write(values_of(seeds[i], ranks.rank(), list[i]->t.numel(), list[i]->t.dtype));
    }
    std::vector<Tensor> views() const {
        std::vector<Tensor> views;
        for (auto& t : list) views.push_back(*t);
        return views;
    }
    void check_exact() const {
        for (size_t i = 0; i < list.size(); ++i) {
            INFO("tensor " << i << ", " << safetensors_name(list[i]->t.dtype));
            check_sums(list[i]->read(), exact_sums(seeds[i], ranks.size(), list[i]->t.numel(), list[i]->t.dtype));
        }
    }
    std::string bytes() const {
        std::string all;
        for (auto& t : list) all += bytes_of(*t);
        return all;
    }
};

void check_same_everywhere(Communicator& ranks, const std::string& bytes) {
    const std::string hash = std::to_string(std::hash<std::string>{}(bytes));
    for (const std::string& other : ranks.control().gather(hash)) REQUIRE(other == hash);
}

void check_collectives(Device& device, Communicator& ranks, uint64_t seed) {
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    const auto size_up_to = [&](int64_t most) { return int64_t(1 + rng() % uint64_t(most)); };
    std::vector<std::vector<int64_t>> cases{{1}, {2}, {ranks.size()}, {1, 1, 1}, {(int64_t(5) << 18) + size_up_to(1000)}, {0}, {0, 5, 0}, {}};
    for (int i = 0; i < 8; ++i) {
        std::vector<int64_t> sizes(1 + rng() % 20);
        for (int64_t& n : sizes) n = size_up_to(int64_t(1) << (1 + rng() % 16));
        cases.push_back(sizes);
    }
    for (const auto& sizes : cases) {
        INFO(sizes.size() << " tensors, the first of " << (sizes.empty() ? 0 : sizes[0]));
        Tensors tensors(device, rng, sizes);
        tensors.fill();
        ranks.all_reduce(tensors.views());
        ranks.finish();
        tensors.check_exact();
        const std::string once = tensors.bytes();
        check_same_everywhere(ranks, once);
        tensors.fill();
        ranks.all_reduce(tensors.views());
        ranks.finish();
        REQUIRE(tensors.bytes() == once);

        const int root = int(rng() % uint64_t(ranks.size()));
        tensors.fill();
        for (const Tensor& t : tensors.views()) ranks.reduce(t, root);
        ranks.finish();
        if (ranks.rank() == root) tensors.check_exact();
        const std::string reduced = tensors.bytes();
        tensors.fill();
        for (const Tensor& t : tensors.views()) ranks.reduce(t, root);
        ranks.finish();
        if (ranks.rank() == root) REQUIRE(tensors.bytes() == reduced);

        ranks.broadcast(tensors.views(), root);
        ranks.finish();
        check_same_everywhere(ranks, tensors.bytes());
        if (ranks.rank() == root) REQUIRE(tensors.bytes() == reduced);
    }

    // Values in f64, beside others in one call.
    for (int64_t n : {int64_t(1), size_up_to(5000)}) {
        std::vector<double> exact(n), own(n);
        OnDevice values(device, DType::f64, 1, n), ones(device, DType::f32, 1, 3, Values(3, 1.0f));
        for (int rank = 0; rank < ranks.size(); ++rank) {
            std::mt19937_64 content(seed + 7 * uint64_t(rank));
            for (int64_t i = 0; i < n; ++i) {
                const double x = double(int64_t(content())) * 0x1p-60;
                exact[i] += x;
                if (rank == ranks.rank()) own[i] = x;
            }
        }
        values.raw_write(own);
        ranks.all_reduce({ones, values});
        ranks.finish();
        CHECK(ones.read() == Values(3, float(ranks.size())));
        const std::vector<double> got = values.raw<double>();
        for (int64_t i = 0; i < n; ++i) REQUIRE(std::fabs(got[i] - exact[i]) <= 8 * ranks.size() * ranks.size() * std::ldexp(1.0, -53));
        check_same_everywhere(ranks, bytes_of(values));
    }

    // Bytes of any type, odd numbers of them.
    for (DType type : {DType::u8, DType::i16, DType::i32, DType::f64, DType::f32, DType::bf16})
        for (int root = 0; root < ranks.size(); ++root) {
            OnDevice t(device, type, 1, size_up_to(3000)), beside(device, type, 1, 1);
            std::mt19937_64 content(seed + uint64_t(root) + 100 * uint64_t(ranks.rank()));
            std::vector<char> bytes(t.t.bytes());
            for (char& b : bytes) b = char(content());
            t.raw_write(bytes);
            ranks.broadcast({t, beside}, root);
            ranks.finish();
            if (ranks.rank() == root) REQUIRE(t.raw<char>() == bytes);
            check_same_everywhere(ranks, bytes_of(t));
        }

    for (int64_t n : {int64_t(1), int64_t(3), int64_t(512), int64_t(513), size_up_to(5000), int64_t(0)}) {
        std::vector<double> values(n), exact(n);
        std::uniform_real_distribution<double> uniform(-1, 1);
        for (int rank = 0; rank < ranks.size(); ++rank) {
            std::mt19937_64 content(seed + uint64_t(rank));
            for (int64_t i = 0; i < n; ++i) {
                const double x = uniform(content) * 1e9 + uniform(content);
                exact[i] += x;
                if (rank == ranks.rank()) values[i] = x;
            }
        }
        ranks.sum(values, "the sums of a test");
        for (int64_t i = 0; i < n; ++i) REQUIRE(std::fabs(values[i] - exact[i]) <= 1e9 * ranks.size() * ranks.size() * std::ldexp(1.0, -53));
        check_same_everywhere(ranks, std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(double)));
    }
}

// Operations that the device and the communicator take in turns: each must see what came before. (A race shows on a GPU only.)
void check_order(Device& device, Communicator& ranks) {
    const int64_t n = int64_t(1) << (device.is_cuda() ? 24 : 16);
    const int rounds = 20;
    OnDevice x(device, DType::f32, 1, n, Values(n, 1.0f)), y(device, DType::f32, 1, n, Values(n, 0.0f));
    double expected = 1, doubled = 0;
    for (int round = 0; round < rounds; ++round) {
        ranks.all_reduce({x});                          // x·size
        axpby(device, y, 1.0f, y, 0.0f);                // beside it
        ranks.finish();
        axpby(device, y, 2.0f, x, 0.0f);                // 2·x·size
        axpby(device, x, 1.0f / float(ranks.size()), x, 0.0f);
        axpby(device, x, 0.5f, x, 0.0f);
        doubled = 2 * expected * ranks.size(), expected /= 2;
    }
    const Values got = x.read(), other = y.read();
    for (int64_t i = 0; i < n; i += 997) {
        REQUIRE(got[i] == Approx(expected));
        REQUIRE(other[i] == Approx(doubled));
    }
}

void check_alone(Device& device) {
    const uint64_t seed = fresh_seed();
    Control control(World{}, 60);
    CHECK(device.communicator() == nullptr);
    {
        auto ranks = Communicator::connect(device, control);
        CHECK(device.communicator() == ranks.get());
        CHECK(device.fork()->communicator() == nullptr);
        CHECK((ranks->rank() == 0 && ranks->size() == 1));
        CHECK_THROWS_AS(Communicator::connect(device, control), InternalError);
        check_collectives(device, *ranks, seed);
        check_order(device, *ranks);

        std::mt19937_64 rng(seed);
        OnDevice padded(device, DType::f32, 3, 5, 8), codes(device, DType::u8, 1, 10), x(device, DType::f32, 1, 10, random_normal(rng, 10));
        CHECK_THROWS_AS(ranks->all_reduce({x, padded}), InternalError);
        CHECK_THROWS_AS(ranks->broadcast({padded}, 0), InternalError);
        CHECK_THROWS_AS(ranks->reduce(codes, 0), InternalError);
        CHECK_THROWS_AS(ranks->reduce(OnDevice(device, DType::f64, 1, 4), 0), InternalError);

        Profiler profiler(device);
        ranks->all_reduce({x, x});
        ranks->reduce(x, 0);
        ranks->broadcast({x, codes}, 0);
        ranks->finish();
        std::map<std::string, double> bytes;
        for (const OperationProfile& p : profiler.take()) bytes[p.name] = p.calls == 1 && p.flops == 0 ? p.bytes : -1;
        CHECK(bytes == std::map<std::string, double>{{"all_reduce", 160}, {"reduce", 80}, {"broadcast", 50}, {"wait_for_ranks", 0}});
    }
    CHECK(device.communicator() == nullptr);
}

// What a run that lost a rank has printed, of all ranks.
std::vector<std::string> messages(const std::vector<RankEnd>& ends) {
    std::vector<std::string> lines;
    for (const RankEnd& end : ends)
        for (size_t at = end.output.find("train_loqt: "); at != std::string::npos; at = end.output.find("train_loqt: ", at + 1))
            lines.push_back(end.output.substr(at, end.output.find('\n', at) - at));
    return lines;
}

// A rank that ends, or never comes: all others end with code 3, one of them says which.
void check_lost(const std::string& argument, int size, int lost_rank, const std::string& named) {
    const std::vector<RankEnd> ends = run_ranks("rank: one is lost", size, argument, 60);
    std::string all;
    for (int rank = 0; rank < size; ++rank) {
        all += format("rank %d:\n", rank) + ends[rank].output;
        if (rank != lost_rank) CHECK(ends[rank].status == 3);
    }
    INFO(all);
    const auto lines = messages(ends);
    REQUIRE(lines.size() == 1);
    CHECK_THAT(lines[0], ContainsSubstring(format("rank %d", lost_rank)) && ContainsSubstring(named));
}

}  // namespace

TEST_CASE("rank: collectives", "[.rank]") {
    const std::string kind = rank_argument().substr(0, rank_argument().find(' '));
    const uint64_t seed = std::strtoull(rank_argument().c_str() + kind.size(), nullptr, 10);
    const World world = world_from_environment();
    Control control(world, 60);
    auto device = device_of_rank(world, kind);
    auto ranks = Communicator::connect(*device, control);
    CHECK((ranks->rank() == world.rank && ranks->size() == world.size));
    check_collectives(*device, *ranks, seed);
    check_order(*device, *ranks);
}

TEST_CASE("rank: one is lost", "[.rank]") {
    const std::string kind = rank_argument().substr(0, rank_argument().find(' '));
    const bool dies = rank_argument().find("dies") != std::string::npos;
    const World world = world_from_environment();
    Control control(world, 30);
    auto device = device_of_rank(world, kind);
    auto ranks = Communicator::connect(*device, control);
    if (!dies) control.set_timeout(3);
    OnDevice x(*device, DType::f32, 1, 1 << 20, Values(1 << 20, 1.0f));
    std::vector<double> value{1};
    for (int round = 0;; ++round) {
        ranks->all_reduce({x});
        ranks->finish();
        ranks->sum(value, "the loss");
        if (round == 3 && world.rank == world.size - 1) {
            if (dies) raise(SIGKILL);
            std::this_thread::sleep_for(std::chrono::seconds(50));
        }
    }
}

TEST_CASE("what is missing to connect ranks is named", "[communicator]") {
    for (DeviceKind kind : {DeviceKind::cpu, DeviceKind::cuda}) {
        std::string why_not;
        if (Communicator::available(kind, &why_not)) CHECK(why_not.empty());
        else CHECK_THAT(why_not, ContainsSubstring("this binary was built without "));
    }
    CHECK(Communicator::library_bytes(DeviceKind::cpu) == 0);
    Control control(World{}, 5);
    auto dry = Device::open_dry(DeviceKind::cpu);
    CHECK_THROWS_AS(Communicator::connect(*dry, control), InternalError);
    auto device = test_device("cpu", 1 << 20);
    if (!Communicator::available(DeviceKind::cpu)) CHECK_THROWS_WITH(Communicator::connect(*device, control), ContainsSubstring("libgloo-dev"));
}

TEST_CASE("a rank alone", "[communicator][gloo]") { check_alone(*test_device("cpu", 1 << 20)); }
TEST_CASE("a rank alone on the GPU", "[communicator][gpu][nccl]") { check_alone(*test_device("cuda", 1 << 20)); }

TEST_CASE("two to four ranks add up and share what they have", "[communicator][gloo]") {
    for (int size : {2, 3, 4}) check_ranks("rank: collectives", size, "cpu " + std::to_string(fresh_seed()));
}
TEST_CASE("ranks on GPUs add up and share what they have", "[communicator][gpus]") {
    for (int size = 2; size <= Device::cuda_count(); ++size) check_ranks("rank: collectives", size, "cuda " + std::to_string(fresh_seed()));
}

TEST_CASE("a rank that dies ends the others", "[communicator][gloo]") { check_lost("cpu dies", 3, 2, ""); }
TEST_CASE("a rank that never comes ends the others", "[communicator][gloo]") { check_lost("cpu sleeps", 3, 2, "all_reduce"); }
TEST_CASE("a rank that dies ends the others on GPUs", "[communicator][gpus]") { check_lost("cuda dies", 2, 1, ""); }
TEST_CASE("a rank that never comes ends the others on GPUs", "[communicator][gpus]") { check_lost("cuda sleeps", 2, 1, "the loss"); }

// Ranks that no longer hold the same model are found, and told what differs on which.
#include "replica_check.h"

#include "comm/communicator.h"
#include "test/model_fixture.h"
#include "test/ranks.h"

namespace {

// What verify says; empty if all agree.
std::string verdict(ReplicaCheck& check, int64_t step) {
    try {
        check.verify(step);
        return "";
    } catch (const InternalError& error) {
        return error.what();
    }
}

void flip(Device& device, Tensor t, int64_t bit) {
    unsigned char byte = 0;
    char* place = static_cast<char*>(t.data) + bit / 8;
    device.download(&byte, place, 1);
    byte = static_cast<unsigned char>(byte ^ (1 << bit % 8));
    device.upload(place, &byte, 1);
}

// Rank `where` is made to differ in `name` by change() and the same again by back(): all ranks have to say so, and who.
template <class Change, class Back> void check_found(ReplicaCheck& check, Communicator& ranks, const std::string& name, int where, int64_t step, Change change, Back back) {
    INFO(name << " on rank " << where);
    if (ranks.rank() == where) change();
    const std::string said = verdict(check, step);
    if (ranks.rank() == where) back();
    const int named = where ? where : 1;  // what rank 0 has is the measure
    CHECK_THAT(said, ContainsSubstring(format("after step %lld rank %d holds another %s than rank 0 (they agreed after step %lld)", (long long)step, named, name.c_str(), (long long)step - 1)));
    for (const std::string& other : ranks.control().gather(said)) CHECK(other == said);
    REQUIRE(verdict(check, step) == "");
}

}  // namespace

TEST_CASE("rank: replicas", "[.rank]") {
    const std::string kind = rank_argument().substr(0, rank_argument().find(' '));
    const uint64_t seed = std::strtoull(rank_argument().c_str() + kind.size(), nullptr, 10);
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);  // the same on all ranks
    const World world = world_from_environment();
    Control control(world, 60);
    auto device = test_device(kind == "cuda" ? format("cuda:%d", world.local_rank) : kind);
    auto ranks = Communicator::connect(*device, control);
    Config config = fixture_config(fixture_for(*device), rng() % 2 ? "loqt" : "full");
    config.optimizer.moments = rng() % 2 ? "int8" : "fp32";
    SmallModel small(*device, config, random_weights(config));
    ReplicaCheck check(*device, small.model);

    if (world.rank == 1) small.model.parameters()[0]->updates = 3;
    CHECK_THAT(verdict(check, 0), ContainsSubstring("rank 1") && ContainsSubstring("model.embed_tokens.weight (its count of updates)") && ContainsSubstring("never agreed"));
    small.model.parameters()[0]->updates = 0;
    int64_t step = 7;
    REQUIRE(verdict(check, step) == "");

    std::vector<const TensorEntry*> saved, tried;
    for (const TensorEntry& e : small.model.table().entries()) {
        if (e.saved) saved.push_back(&e);
        else if (e.family == Family::gradients || e.family == Family::activations) flip(*device, *e.holder, world.rank);  // each has its own
    }
    for (const TensorEntry* e : {saved.front(), saved.back()}) tried.push_back(e);
    for (int i = 0; i < 20; ++i) tried.push_back(saved[rng() % saved.size()]);
    for (const TensorEntry* e : tried) {
        const int64_t bit = int64_t(rng() % uint64_t(8 * e->rows * e->cols * size_of(e->holder->dtype)));
        const int where = int(rng() % uint64_t(world.size));
        auto change = [&] { flip(*device, *e->holder, bit); };
        check_found(check, *ranks, e->name, where, ++step, change, change);
    }
    for (int i = 0; i < 4; ++i) {
        Parameter& p = *small.model.parameters()[rng() % small.model.parameters().size()];
        const int where = int(rng() % uint64_t(world.size));
        check_found(check, *ranks, p.name + " (its count of updates)", where, ++step, [&] { ++p.updates; }, [&] { --p.updates; });
        check_found(check, *ranks, p.name + " (its count of updates)", where, ++step, [&] { p.active = !p.active; }, [&] { p.active = !p.active; });
    }
}

TEST_CASE("replicas that differ are found", "[replicas][gloo]") {
    for (int size : {2, 3}) check_ranks("rank: replicas", size, "cpu " + std::to_string(fresh_seed()));
}
TEST_CASE("replicas on GPUs that differ are found", "[replicas][gpus]") { check_ranks("rank: replicas", 2, "cuda " + std::to_string(fresh_seed())); }

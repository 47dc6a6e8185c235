// The merge schedule against the list of docs/algorithm (LoQT with tau 100, growth 1.2) and the learning rate against its definition.
#include "merge_schedule.h"
#include "optimizer_step.h"
#include "test/support.h"

TEST_CASE("merge schedule: the published steps for tau 100, growth 1.2", "[schedule]") {
    const std::vector<int64_t> expected = {0,    100,  201,  302,  403,  505,  607,  709,  812,  916,  1021, 1127, 1234, 1342, 1452, 1564, 1679, 1797, 1919,
                                           2045, 2176, 2314, 2460, 2615, 2781, 2960, 3155, 3369, 3606, 3870, 4167, 4504, 4888, 5329, 5839, 6431, 7121, 7929, 8879};
    CHECK(merge_schedule(100, 1.2, 0, 10000) == expected);
    std::vector<int64_t> longer = expected;
    for (int64_t u : {9999, 11323, 12892, 14755, 16971, 19610, 22757, 26514, 31002, 36368, 42787, 50470, 59670, 70690, 83894, 99719}) longer.push_back(u);
    CHECK(merge_schedule(100, 1.2, 0, 100000) == longer);
}

TEST_CASE("merge schedule: fixed gaps, caps and ends", "[schedule]") {
    CHECK(merge_schedule(10, 0, 0, 45) == std::vector<int64_t>{0, 10, 20, 30});
    CHECK(merge_schedule(10, 0, 0, 40) == std::vector<int64_t>{0, 10, 20});  // 30 + 10 < 40 fails
    CHECK(merge_schedule(100, 1.2, 0, 50) == std::vector<int64_t>{0});
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (int i = 0; i < 200; ++i) {
        int64_t tau = 1 + int64_t(rng() % 50), steps = 1 + int64_t(rng() % 5000), cap = rng() % 2 ? tau + int64_t(rng() % 100) : 0;
        double growth = rng() % 3 ? 1.0 + double(rng() % 100) / 100.0 : 0.0;
        auto merges = merge_schedule(tau, growth, cap, steps);
        REQUIRE(merges.at(0) == 0);
        int64_t previous_gap = tau;
        for (size_t k = 1; k < merges.size(); ++k) {
            int64_t gap = merges[k] - merges[k - 1];
            REQUIRE(gap >= previous_gap);
            REQUIRE((cap == 0 || gap <= cap));
            REQUIRE(merges[k] + tau < steps);
            previous_gap = gap;
        }
    }
}

TEST_CASE("learning rate: linear warm-up, cosine to the floor", "[schedule]") {
    Config c;
    c.train.steps = 1000;
    c.optimizer.lr = 0.01;
    CHECK(learning_rate(c, 0) == Approx(0.01 / 100));
    CHECK(learning_rate(c, 99) == Approx(0.01));
    CHECK(learning_rate(c, 100) == Approx(0.01));
    CHECK(learning_rate(c, 550) == Approx(0.01 * (0.1 + 0.9 * 0.5)));
    CHECK(learning_rate(c, 1000) == Approx(0.001));
    c.optimizer.warmup_ratio = 0;
    CHECK(learning_rate(c, 0) == Approx(0.01));
}

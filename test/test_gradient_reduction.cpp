// Joined tensors: what they cover, and in which order. Sums themselves are tested by runs of several processes (test_parallel.py).
#include "gradient_reduction.h"

#include <map>

#include "runtime/tensor_table.h"
#include "test/support.h"

namespace {

// Tensors of an arena as a TensorTable lays them out, at an address of one's own; which of them are to be joined.
struct Arena {
    std::vector<char> memory;
    std::vector<Tensor> all;
    std::vector<bool> chosen;
    char* base = nullptr;

    Arena(uint64_t seed, int64_t shift) {
        std::mt19937_64 rng(seed);
        int64_t bytes = 0;
        std::vector<int64_t> offsets;
        for (int i = int(rng() % 40); i >= 0; --i) {
            const int64_t rows = int64_t(1 + rng() % 5), cols = int64_t(1 + rng() % 300);
            all.push_back(Tensor{nullptr, rng() % 4 ? DType::f32 : DType::bf16, rows, cols, cols});
            chosen.push_back(rng() % 4 != 0);
            offsets.push_back(bytes);
            bytes += round_up(all.back().bytes(), kTensorAlignment);
        }
        memory.resize(size_t(bytes + shift + kTensorAlignment));
        base = memory.data() + shift;
        base += (kTensorAlignment - int64_t(reinterpret_cast<uintptr_t>(base) % kTensorAlignment)) % kTensorAlignment;
        for (size_t i = 0; i < all.size(); ++i) all[i].data = base + offsets[i];
    }
    std::vector<Tensor> picked(uint64_t seed) const {
        std::vector<Tensor> list;
        for (size_t i = 0; i < all.size(); ++i)
            if (chosen[i]) list.push_back(all[i].flat());
        std::shuffle(list.begin(), list.end(), std::mt19937_64(seed));
        return list;
    }
    int64_t offset(const void* p) const { return static_cast<const char*>(p) - base; }
};

}  // namespace

TEST_CASE("joined tensors cover what was to be joined and nothing else", "[reduction]") {
    const uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    for (uint64_t k = 0; k < 300; ++k) {
        const Arena arena(seed + k, 0);
        std::map<const void*, std::pair<Tensor, bool>> at;
        for (size_t i = 0; i < arena.all.size(); ++i) at[arena.all[i].data] = {arena.all[i].flat(), arena.chosen[i]};
        const std::vector<Tensor> ranges = joined(arena.picked(k));
        size_t covered = 0;
        for (size_t r = 0; r < ranges.size(); ++r) {
            const Tensor& range = ranges[r];
            REQUIRE(range.rows == 1);
            const char *begin = static_cast<const char*>(range.data), *end = begin + range.bytes();
            // From its first tensor to the end of its last, all of them to be joined and of its type.
            const char* last_end = begin;
            for (auto it = at.find(begin); it != at.end() && static_cast<const char*>(it->first) < end; ++it, ++covered) {
                REQUIRE(it->second.second);
                REQUIRE(it->second.first.dtype == range.dtype);
                last_end = static_cast<const char*>(it->first) + it->second.first.bytes();
            }
            REQUIRE(last_end == end);
            // Neighbours of one type are one range.
            const auto next = at.lower_bound(end);
            if (next != at.end()) REQUIRE(!(next->second.second && next->second.first.dtype == range.dtype));
        }
        REQUIRE(covered == size_t(std::count(arena.chosen.begin(), arena.chosen.end(), true)));
    }
}

TEST_CASE("joined tensors are in the same order wherever they lie", "[reduction]") {
    const uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    for (uint64_t k = 0; k < 300; ++k) {
        // Ranks have the same arena at other addresses, and values in f64 before or after it.
        std::vector<std::vector<std::pair<DType, int64_t>>> orders;
        for (int rank = 0; rank < 2; ++rank) {
            const Arena arena(seed + k, 64 * rank);
            std::vector<Tensor> list = arena.picked(k + 1000 * uint64_t(rank));
            char* before = const_cast<char*>(arena.memory.data()) - sizeof(double);
            char* after = const_cast<char*>(arena.memory.data()) + arena.memory.size();
            list.push_back(Tensor{rank ? before : after, DType::f64, 1, 1, 1});  // only looked at
            orders.emplace_back();
            for (const Tensor& t : joined(list)) orders.back().push_back({t.dtype, t.dtype == DType::f64 ? t.cols : arena.offset(t.data) * 100000 + t.cols});
        }
        REQUIRE(orders[0] == orders[1]);
    }
}

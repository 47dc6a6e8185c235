#include <algorithm>
#include <map>
#include <numeric>

#include "ops/embedding.h"
#include "test/padding.h"

namespace {

// Half uniform, half from a few hot tokens, so that some groups have several segments.
std::vector<int32_t> random_tokens(std::mt19937_64& rng, int64_t count, int64_t vocab) {
    std::vector<int32_t> tokens(count);
    for (auto& t : tokens) t = int32_t(rng() % 2 ? rng() % vocab : rng() % std::min<int64_t>(vocab, 3));
    return tokens;
}

// The arrays of TokenGroups in device memory, one after the other.
class UploadedGroups {
  public:
    DeviceTokenGroups view;
    UploadedGroups(Device& device, const TokenGroups& g) : device_(device) {
        std::vector<int32_t> all;
        for (auto* part : {&g.order, &g.segment_begin, &g.group_begin, &g.group_token}) all.insert(all.end(), part->begin(), part->end());
        data_ = device.allocate(int64_t(all.size()) * 4, "test");
        device.upload(data_, all.data(), int64_t(all.size()) * 4);
        const int32_t* p = static_cast<const int32_t*>(data_);
        view.order = p, p += g.order.size();
        view.segment_begin = p, p += g.segment_begin.size();
        view.group_begin = p, p += g.group_begin.size();
        view.group_token = p;
        view.segments = int64_t(g.segment_begin.size()) - 1;
        view.groups = int64_t(g.group_token.size());
    }
    ~UploadedGroups() { device_.release(data_); }

  private:
    Device& device_;
    void* data_;
};

struct Shape {
    int64_t tokens, vocab, h, pad;
};
const Shape kShapes[] = {{1, 1, 1, 0}, {5, 3, 7, 2}, {64, 10, 64, 0}, {65, 1, 33, 0}, {300, 40, 264, 8}, {1000, 50, 96, 0}, {513, 5000, 128, 3}};

void check_embedding(Device& device) {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    const DType type = device.activation_dtype();
    for (const Shape& s : kShapes) {
        INFO("T " << s.tokens << " V " << s.vocab << " h " << s.h << " pad " << s.pad);
        auto tokens = random_tokens(rng, s.tokens, s.vocab);
        OnDevice device_tokens(device, DType::i32, 1, s.tokens, std::vector<float>(tokens.begin(), tokens.end()));
        const int32_t* ids = static_cast<const int32_t*>(device_tokens.t.data);

        auto table = as_activation(device, random_normal(rng, s.vocab * s.h));
        OnDevice table_(device, type, s.vocab, s.h, table, s.h + s.pad), y(device, type, s.tokens, s.h, s.h + s.pad);
        embedding_forward(device, y, table_, ids);
        auto gathered = y.read();
        int64_t wrong = 0;
        for (int64_t t = 0; t < s.tokens; ++t)
            for (int64_t c = 0; c < s.h; ++c) wrong += !(gathered[t * s.h + c] == table[tokens[t] * s.h + c]);
        CHECK(wrong == 0);
        CHECK(padding_untouched(y));

        auto dy = as_activation(device, random_normal(rng, s.tokens * s.h));
        OnDevice dy_(device, type, s.tokens, s.h, dy, s.h + s.pad);
        UploadedGroups groups(device, group_tokens(tokens.data(), s.tokens, s.vocab));
        for (DType grad_type : {DType::f32, DType::bf16}) {
            auto before = random_normal(rng, s.vocab * s.h);
            if (grad_type == DType::bf16) before = round_to_bf16(before);
            std::vector<double> expected(before.begin(), before.end());
            for (int64_t t = 0; t < s.tokens; ++t)
                for (int64_t c = 0; c < s.h; ++c) expected[tokens[t] * s.h + c] += dy[t * s.h + c];
            OnDevice dtable(device, grad_type, s.vocab, s.h, before, s.h + s.pad), again(device, grad_type, s.vocab, s.h, before, s.h + s.pad);
            const RoundingDraws draws{seed, 5, 1};
            embedding_backward(device, dtable, dy_, groups.view, draws);
            embedding_backward(device, again, dy_, groups.view, draws);
            auto got = dtable.read();
            CHECK(relative_error(got, expected) < (grad_type == DType::f32 ? 1e-6 : s.vocab * s.h < 1000 ? 8e-3 : 4e-3));  // a bf16 step is 2⁻⁷ at most
            std::vector<char> used(s.vocab, 0);
            for (int32_t t : tokens) used[t] = 1;
            int64_t changed = 0;
            for (int64_t i = 0; i < s.vocab * s.h; ++i) changed += !used[i / s.h] && got[i] != before[i];
            CHECK(changed == 0);
            CHECK(padding_untouched(dtable));
            CHECK(dtable.raw<uint8_t>() == again.raw<uint8_t>());
        }
    }
}

// With numbers whose fp32 sums are exact, a bf16 table holds exactly those sums, rounded by the draws of their row-major element numbers.
void check_stochastic_rounding(Device& device) {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (const Shape& s : kShapes) {
        INFO("T " << s.tokens << " V " << s.vocab << " h " << s.h << " pad " << s.pad);
        auto tokens = random_tokens(rng, s.tokens, s.vocab);
        UploadedGroups groups(device, group_tokens(tokens.data(), s.tokens, s.vocab));
        std::vector<float> dy(s.tokens * s.h), table(s.vocab * s.h);
        for (float& x : dy) x = float(int64_t(rng() % 255) - 127) / 1024;
        for (float& x : table) x = float(int64_t(rng() % 511) - 255) / 16;
        OnDevice dy_(device, device.activation_dtype(), s.tokens, s.h, dy, s.h + s.pad), dtable(device, DType::bf16, s.vocab, s.h, table, s.h + s.pad);
        for (const uint64_t begin : {0, 1 << 20}) {
            std::vector<float> sum(s.vocab * s.h, 0.0f);
            for (int64_t t = 0; t < s.tokens; ++t)
                for (int64_t c = 0; c < s.h; ++c) sum[tokens[t] * s.h + c] += dy[t * s.h + c];
            const auto before = dtable.read();
            embedding_backward(device, dtable, dy_, groups.view, RoundingDraws{seed, 5, 9, begin});
            const auto after = dtable.read();
            int64_t wrong = 0;
            for (int64_t i = 0; i < s.vocab * s.h; ++i) {
                const uint64_t element = begin + uint64_t(i);
                const uint32_t draw = rounding_draw16(rounding_draws(seed, element / 8, 5, 9), int(element % 8));
                wrong += after[i] != to_float(to_bf16_stochastic(before[i] + sum[i], draw));
            }
            CHECK(wrong == 0);
        }
    }
}

// 256 micro-batches that each add 1/1024 to ones: lost when rounded to nearest, kept on average here.
void check_small_gradients(Device& device) {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    const int64_t vocab = 5, h = 1000;
    const std::vector<int32_t> tokens = {3};
    UploadedGroups groups(device, group_tokens(tokens.data(), 1, vocab));
    OnDevice dy(device, device.activation_dtype(), 1, h, std::vector<float>(h, 1.0f / 1024)), dtable(device, DType::bf16, vocab, h, std::vector<float>(vocab * h, 1.0f));
    for (uint32_t step = 0; step < 256; ++step) embedding_backward(device, dtable, dy, groups.view, RoundingDraws{seed, 5, step});
    const auto sum = dtable.read();
    const double mean = std::accumulate(sum.begin() + 3 * h, sum.begin() + 4 * h, 0.0) / double(h);
    // Each add goes up by 1/128 with probability ⅛, else by nothing.
    CHECK(std::fabs(mean - 1.25) < 4.5 / 128 * std::sqrt(256 * 0.125 * 0.875 / double(h)));
    CHECK(std::count(sum.begin(), sum.begin() + 3 * h, 1.0f) == 3 * h);
}

}  // namespace

TEST_CASE("group_tokens sorts positions stably and cuts groups into segments", "[embedding]") {
    auto seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (const Shape& s : kShapes) {
        auto tokens = random_tokens(rng, s.tokens, s.vocab);
        TokenGroups g = group_tokens(tokens.data(), s.tokens, s.vocab);
        std::vector<int32_t> order(s.tokens);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return tokens[a] < tokens[b]; });
        CHECK(g.order == order);
        std::map<int32_t, int64_t> counts;
        for (int32_t t : tokens) ++counts[t];
        REQUIRE(g.group_token.size() == counts.size());
        REQUIRE(g.group_begin.size() == counts.size() + 1);
        REQUIRE(g.group_begin.back() + 1 == int32_t(g.segment_begin.size()));
        CHECK(g.segment_begin.back() == s.tokens);
        size_t i = 0;
        int64_t position = 0;
        for (auto [token, count] : counts) {
            CHECK(g.group_token[i] == token);
            int32_t first = g.group_begin[i], last = g.group_begin[i + 1];
            CHECK(last - first == (count + kEmbeddingSegment - 1) / kEmbeddingSegment);
            for (int32_t k = first; k < last; ++k) CHECK(g.segment_begin[k] == position + int64_t(k - first) * kEmbeddingSegment);
            position += count, ++i;
        }
    }
    TokenGroups empty = group_tokens(nullptr, 0, 10);
    CHECK(empty.segment_begin == std::vector<int32_t>{0});
    CHECK(empty.group_begin == std::vector<int32_t>{0});
    const int32_t bad[] = {0, 5};
    CHECK_THROWS_AS(group_tokens(bad, 2, 5), InternalError);
    const int32_t negative[] = {-1};
    CHECK_THROWS_AS(group_tokens(negative, 1, 5), InternalError);
}

TEST_CASE("embedding gathers exactly and scatters like an fp64 sum", "[embedding]") { check_embedding(*test_device("cpu")); }
TEST_CASE("embedding on the GPU", "[embedding][gpu]") { check_embedding(*test_device("cuda")); }

TEST_CASE("embedding gradients in bf16 are rounded stochastically", "[embedding]") {
    check_stochastic_rounding(*test_device("cpu"));
    check_small_gradients(*test_device("cpu"));
}
TEST_CASE("embedding gradients in bf16 on the GPU are rounded stochastically", "[embedding][gpu]") {
    check_stochastic_rounding(*test_device("cuda"));
    check_small_gradients(*test_device("cuda"));
}

TEST_CASE("embedding on an empty batch and a dry device", "[embedding]") {
    auto device = test_device("cpu");
    OnDevice table(*device, DType::f32, 4, 8, std::vector<float>(32, 1.0f)), y(*device, DType::f32, 0, 8);
    embedding_forward(*device, y, table, nullptr);
    UploadedGroups groups(*device, group_tokens(nullptr, 0, 4));
    embedding_backward(*device, table, y, groups.view, RoundingDraws{});
    CHECK(table.read() == std::vector<float>(32, 1.0f));
    auto dry = Device::open_dry(DeviceKind::cpu);
    DeviceTokenGroups many{nullptr, nullptr, nullptr, nullptr, 1000, 10};
    embedding_backward(*dry, Tensor{nullptr, DType::f32, 10, 64, 64}, Tensor{nullptr, DType::f32, 500, 64, 64}, many, RoundingDraws{});
    CHECK(dry->scratch_high_water() == 1000 * 64 * 4);
}

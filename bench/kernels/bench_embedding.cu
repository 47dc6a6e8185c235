// Token embedding: time and bandwidth on one GPU, see bench.h. Tokens follow Zipf's law, as those of text do.
//   make build/bench_embedding && build/bench_embedding
#include "bench/kernels/bench.h"
#include "ops/embedding.h"

namespace {

constexpr int64_t kVocab = 32000;

std::vector<int32_t> zipf_tokens(int64_t count) {
    std::mt19937_64 rng(1);
    std::uniform_real_distribution<double> uniform;
    std::vector<int32_t> tokens(count);
    for (int32_t& t : tokens) t = int32_t(std::pow(double(kVocab), uniform(rng))) - 1;  // density ~ 1/rank
    return tokens;
}

DeviceTokenGroups upload(Tensors& tensors, const TokenGroups& g) {
    return {tensors.upload(g.order), tensors.upload(g.segment_begin), tensors.upload(g.group_begin), tensors.upload(g.group_token),
            int64_t(g.segment_begin.size()) - 1, int64_t(g.group_token.size())};
}

}  // namespace

int main() {
    return run_bench([](Bench& bench) {
        bench.check("embedding", 5e-3, [](Tensors& tensors) {
            const std::vector<int32_t> tokens = zipf_tokens(5000);
            Tensor y = tensors.activation(5000, 512), table = tensors.activation(kVocab, 512), d_table = tensors.zeros(DType::f32, kVocab, 512);
            embedding_forward(tensors.device(), y, table, tensors.upload(tokens));
            embedding_backward(tensors.device(), d_table, y, upload(tensors, group_tokens(tokens.data(), 5000, kVocab)), RoundingDraws{});
            return std::vector<Tensor>{y, d_table};
        });
        for (const ModelShape& model : kModels)
            for (int64_t count : kTokens) {
                const std::vector<int32_t> tokens = zipf_tokens(count);
                Tensors tensors(bench.gpu());
                Tensor y = tensors.activation(count, model.hidden), table = tensors.activation(kVocab, model.hidden);
                Tensor d_table = tensors.zeros(DType::f32, kVocab, model.hidden);
                const int32_t* ids = tensors.upload(tokens);
                const DeviceTokenGroups groups = upload(tensors, group_tokens(tokens.data(), count, kVocab));
                const std::string shape = format("%s: %lld × %lld, %lld distinct", model.name, (long long)count, (long long)model.hidden, (long long)groups.groups);
                const double distinct = double(groups.groups * model.hidden);
                bench.time("embedding_forward", shape.c_str(), double(y.bytes()) + 2 * distinct, [&] { embedding_forward(bench.gpu(), y, table, ids); });
                bench.time("embedding_backward", shape.c_str(), double(y.bytes()) + 8 * distinct, [&] { embedding_backward(bench.gpu(), d_table, y, groups, RoundingDraws{}); });
            }
    });
}

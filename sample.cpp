#include "sample.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "runtime/philox.h"

namespace {

int32_t draw(const std::vector<float>& logits, const SampleOptions& options, int64_t position) {
    std::vector<int32_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    size_t keep = options.top_k > 0 ? std::min<size_t>(size_t(options.top_k), order.size()) : order.size();
    std::partial_sort(order.begin(), order.begin() + int64_t(keep), order.end(),
                      [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
    if (options.temperature <= 0) return order[0];
    std::vector<double> weights(keep);
    for (size_t i = 0; i < keep; ++i) weights[i] = std::exp((double(logits[order[i]]) - double(logits[order[0]])) / options.temperature);
    Philox4 random = philox4x32(uint32_t(position), 0, 0, 0x53414d50u /* "SAMP" */, uint32_t(options.seed), uint32_t(options.seed >> 32));
    double left = double(uniform01(random.x[0])) * std::accumulate(weights.begin(), weights.end(), 0.0);
    for (size_t i = 0; i < keep; ++i)
        if ((left -= weights[i]) <= 0) return order[i];
    return order[keep - 1];
}

}  // namespace

std::string generate(Llama& model, const Tokenizer& tokenizer, const SampleOptions& options) {
    std::vector<int32_t> text = tokenizer.encode(options.prompt);
    for (int32_t id : text)
        if (id >= model.config().model.vocab) throw UserError(format("the prompt has token %d, the model's vocabulary ends at %lld", id, (long long)model.config().model.vocab));
    // A document begins after the end of another: that is what the model has seen in training.
    size_t invisible = 0;
    if (text.empty() && tokenizer.eos() >= 0) text.push_back(int32_t(tokenizer.eos())), invisible = 1;
    if (text.empty()) throw UserError("--sample: the prompt is empty and the tokenizer has no end-of-document token to start from");
    for (int64_t i = 0; i < options.tokens; ++i) {
        size_t context = std::min<size_t>(text.size(), size_t(model.config().train.seq_len));
        int32_t next = draw(model.next_token_logits({text.end() - int64_t(context), text.end()}), options, i);
        if (next == tokenizer.eos()) break;
        text.push_back(next);
    }
    return tokenizer.decode({text.begin() + int64_t(invisible), text.end()});
}

// What the plan may choose from, and what it advises where nothing of that fits. See plan_options.h.
#include <algorithm>
#include <initializer_list>

#include "method.h"
#include "parameter.h"
#include "plan_options.h"

namespace {

// Larger micro-batches than this gain nothing: GPUs are saturated, CPU caches overflow.
constexpr int64_t kMostTokensCuda = 131072, kMostTokensCpu = 2048;

}  // namespace

std::vector<int64_t> micro_batch_sizes(const Config& config, DeviceKind kind) {
    if (config.train.micro_batch) return {config.train.micro_batch};
    if (config.train.updates == "per_layer") return {config.rank_batch()};
    int64_t most_tokens = kind == DeviceKind::cuda ? kMostTokensCuda : kMostTokensCpu;
    std::vector<int64_t> sizes;
    for (int64_t m = std::min(config.rank_batch(), std::max<int64_t>(1, most_tokens / config.train.seq_len)); m >= 1; --m)
        if (config.rank_batch() % m == 0) sizes.push_back(m);
    return sizes;
}

std::vector<std::string> recomputations(const Config& config, DeviceKind kind) {
    if (config.train.recompute != "auto") return {config.train.recompute};
    if (kind == DeviceKind::cpu) return {"light", "block"};  // what is kept only pushes more out of the caches
    return {"light", "none", "block"};
}

std::vector<std::string> effective_weights(const Config& config) {
    if (config.train.effective_weights != "auto") return {config.train.effective_weights};
    if (!config.low_rank()) return {"rebuilt"};
    return {"cached", "rebuilt", "factored"};
}

namespace {

// Settings changed together, as on the command line.
using Change = std::vector<Override>;

std::string option_text(const std::vector<Change>& changes) {
    std::string text;
    for (const Change& change : changes)
        for (const Override& o : change) text += " --" + short_name(o.key) + " " + o.value;
    return text;
}

Config with(Config config, const std::vector<Change>& changes) {
    for (const Change& change : changes)
        for (const Override& o : change) apply_override(config, o);
    validate_config(config);
    return config;
}

// Whether choose_plan would find something: tries the least that auto allows.
bool can_fit(Config config, DeviceKind kind, int64_t budget) {
    std::vector<int64_t> sizes = micro_batch_sizes(config, kind);
    std::vector<std::string> weights = effective_weights(config);
    if (weights.size() > 1) weights.erase(weights.begin());  // kept ones never take less
    if (sizes.size() > 1) sizes = {sizes.back(), sizes.front()};
    config.train.recompute = recomputations(config, kind).back();
    for (int64_t size : sizes)
        for (const std::string& way : weights) {
            config.train.micro_batch = size, config.train.effective_weights = way;
            if (plan_memory(config, kind).total <= budget) return true;
        }
    return false;
}

bool allowed_for_resume(const Config& config, const Change& change) {
    for (const std::string& difference : config_differences(config, with(config, {change})))
        if (fixed_for_resume(difference.substr(0, difference.find(':')))) return false;
    return true;
}

// What saves memory, the least harmful first. Later changes of a key take the place of earlier ones.
std::vector<Change> memory_savers(const Config& config, DeviceKind kind, bool resumed) {
    std::vector<Change> changes;
    auto offer = [&](bool applies, const Change& change) {
        if (applies) changes.push_back(change);
    };
    bool low_rank = config.low_rank(), cuda = kind == DeviceKind::cuda, per_layer = config.train.updates == "per_layer";
    const std::string embedding = embedding_moments(config);
    offer(config.train.micro_batch > 1 && !per_layer, {{"train.micro_batch", "auto"}});
    offer(config.train.recompute != "auto" && config.train.recompute != "block", {{"train.recompute", "auto"}});
    offer(low_rank && config.train.effective_weights != "auto", {{"train.effective_weights", "auto"}});
    offer(cuda && config.train.gradients == "fp32", {{"train.gradients", "bf16"}});
    offer(config.optimizer.moments != "int8", {{"optimizer.moments", "int8"}});
    offer(cuda && low_rank && config.train.gradients != "int8" && !per_layer, {{"train.gradients", "int8"}});
    offer(embedding == "fp32", {{"optimizer.embedding_moments", "bf16"}});
    offer(low_rank && config.method.projection_gradient == "full", {{"method.projection_gradient", "last"}});  // no harm at 60m with clipping, more than all before without (docs/experiments.md)
    // From here on what is trained changes, and not only how it is kept.
    offer(config.method.name == "lora", {{"method.name", "qlora"}});
    const MethodPolicy policy = method_policy(config);
    offer(policy.adapters && policy.projects && config.optimizer.clip > 0, {{"optimizer.clip", "0"}});  // new projections need not wait
    const bool ranked = config.method.name != "full";
    int64_t rank = config.method.rank / 2;
    for (int i = 0; i < 2 && rank >= 16; ++i, rank /= 2) offer(ranked, {{"method.rank", std::to_string(rank)}});
    for (int64_t batch = per_layer ? config.train.batch / 2 : config.train.batch; batch >= 1; batch /= 2) {
        if (batch % config.world_size) break;
        Change change{{"train.batch", std::to_string(batch)}};
        if (!per_layer) change.insert(change.begin(), {"train.updates", "per_layer"});
        if (config.train.micro_batch) change.insert(change.begin(), {"train.micro_batch", "auto"});
        if (config.optimizer.clip > 0) change.push_back({"optimizer.clip", "0"});
        changes.push_back(change);
    }
    for (; rank >= 16; rank /= 2) offer(ranked, {{"method.rank", std::to_string(rank)}});
    offer(embedding != "int8", {{"optimizer.embedding_moments", "int8"}});
    for (int64_t length = config.train.seq_len / 2; length >= 64; length /= 2) offer(true, {{"train.seq_len", std::to_string(length)}});
    if (resumed) changes.erase(std::remove_if(changes.begin(), changes.end(), [&](const Change& change) { return !allowed_for_resume(config, change); }), changes.end());
    return changes;
}

// The changes with another one, in place of one of the same kind.
std::vector<Change> with_change(std::vector<Change> changes, const Change& change) {
    auto alike = [&](const Change& other) { return other.front().key == change.front().key; };
    changes.erase(std::remove_if(changes.begin(), changes.end(), alike), changes.end());
    changes.push_back(change);
    return changes;
}

// The changes with the i-th left out, or the mildest of its kind in its place, if that fits too: beside those after it, it may be more than is needed.
template <class Fits> std::vector<Change> milder(const std::vector<Change>& changes, size_t i, const std::vector<Change>& savers, Fits&& fits) {
    std::vector<Change> fewer = changes;
    fewer.erase(fewer.begin() + int64_t(i));
    if (fits(fewer)) return fewer;
    for (const Change& saver : savers) {
        if (saver.front().key != changes[i].front().key) continue;
        std::vector<Change> other = changes;
        other[i] = saver;
        if (fits(other)) return other;
    }
    return changes;
}

// No more of the changes than it takes to fit.
template <class Fits> std::vector<Change> pruned(std::vector<Change> changes, const std::vector<Change>& savers, Fits&& fits) {
    for (size_t i = changes.size(); i-- > 0;) changes = milder(changes, i, savers, fits);
    return changes;
}

}  // namespace

std::string what_would_fit(const Config& config, DeviceKind kind, int64_t budget, bool resumed) {
    auto fits = [&](const std::vector<Change>& changes) { return can_fit(with(config, changes), kind, budget); };
    std::vector<Change> savers = memory_savers(config, kind, resumed), applied;  // applied: all of the stages before
    auto first_of = [&](std::initializer_list<const char*> keys) {
        return std::find_if(savers.begin(), savers.end(), [&](const Change& change) { return std::find(keys.begin(), keys.end(), change.back().key) != keys.end(); });
    };
    // In stages, each tried with all that was tried before and then without what of it is not needed: how numbers are kept; projections from less; what is
    // trained, where galore's own rank comes before another method, and that before another batch.
    const auto drastic = first_of({"train.batch", "optimizer.clip", "method.name", "method.rank", "train.seq_len"});
    const auto before_method = config.low_rank() || resumed ? savers.end() : first_of({"train.batch", "optimizer.clip", "train.seq_len"});
    std::vector<std::vector<Change>::iterator> ends = {std::min(first_of({"method.projection_gradient"}), drastic), drastic, before_method, savers.end()};
    ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
    const std::string fits_with = "it fits with";
    auto as_loqt = [&]() -> std::string {
        const Change loqt{{"method.name", "loqt"}};
        if (fits({loqt})) return fits_with + option_text({loqt});
        std::string advice = what_would_fit(with(config, {loqt}), kind, budget, false);
        return advice.rfind(fits_with, 0) == 0 ? fits_with + option_text({loqt}) + advice.substr(fits_with.size()) : "";
    };
    auto begin = savers.begin();
    for (auto end : ends) {
        for (auto change = begin; change != end; ++change)
            if (std::vector<Change> one = with_change(applied, *change); fits(one)) return fits_with + option_text(pruned(one, savers, fits));
        for (auto change = begin; change != end; ++change) {
            applied = with_change(applied, *change);
            if (fits(applied)) return fits_with + option_text(pruned(applied, savers, fits));
        }
        begin = end;
        if (config.low_rank() || resumed || end != before_method) continue;
        // A method that trains W in full: this is what LoQT is for.
        if (std::string advice = as_loqt(); !advice.empty()) return advice;
    }
    // The other methods with adapters, and LoQT without quantization, come to it last.
    if (config.low_rank() && config.method.name != "loqt" && !resumed)
        if (std::string advice = as_loqt(); !advice.empty()) return advice;
    if (resumed) return "nothing that --resume may change makes it fit";
    return "no setting of rank, sequence length, updates, moments or gradients makes it fit; choose a smaller model";
}

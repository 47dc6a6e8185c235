// Configuration: the presets, overrides, and every kind of mistake with its one-line message.
#include "runtime/config.h"

#include <filesystem>
#include <fstream>

#include "flops.h"
#include "test/support.h"

namespace {

std::string message_of(const std::function<void()>& f) {
    try {
        f();
    } catch (const UserError& error) {
        return error.what();
    }
    return "(no error)";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

std::string message_for_json(const std::string& text) {
    std::string path = (std::filesystem::temp_directory_path() / ("loqt_config_" + std::to_string(fresh_seed()) + ".json")).string();
    std::ofstream(path) << text;
    std::string message = message_of([&] {
        Config c;
        read_config_file(c, path);
        validate_config(c);
    });
    std::filesystem::remove(path);
    return message;
}

}  // namespace

TEST_CASE("presets: valid, and the parameter counts of the paper's table", "[config]") {
    const std::pair<const char*, double> counts[] = {{"60m", 58.07}, {"130m", 134.11}, {"350m", 367.97}, {"1b", 1339.08}, {"7b", 6738.42}, {"13b", 13015.86}};
    for (auto& [name, millions] : counts) {
        Config c;
        read_config_file(c, std::string("configs/") + name + ".json");
        validate_config(c);
        CHECK(double(parameter_count(c)) / 1e6 == Approx(millions).margin(0.005));
        CHECK(c.train.batch * c.train.seq_len == 131072);
    }
    Config tiny;
    read_config_file(tiny, "configs/tiny.json");
    validate_config(tiny);
}

TEST_CASE("config: unknown keys name the nearest one", "[config]") {
    CHECK(contains(message_for_json(R"({"method": {"ranc": 8}})"), "did you mean \"method.rank\""));
    CHECK(contains(message_for_json(R"({"modle": 3})"), "not a section"));
    CHECK(contains(message_of([] { resolve_key("learning_rat"); }), "unknown option --learning_rat"));
    CHECK(contains(message_of([] { resolve_key("warmup_ration"); }), "--optimizer.warmup_ratio"));
    CHECK(contains(message_of([] { resolve_key("every"); }), "ambiguous: --eval.every --checkpoint.every"));
    CHECK(resolve_key("rank") == "method.rank");
    CHECK(resolve_key("method") == "method.name");
    CHECK(contains(message_of([] { resolve_key("frobnicate"); }), "see --help"));
}

TEST_CASE("config: bad values name key, value and what was expected", "[config]") {
    CHECK(contains(message_for_json(R"({"method": {"rank": 0}})"), "method.rank: got 0"));
    CHECK(contains(message_for_json(R"({"method": {"rank": 100000}})"), "method.rank: 100000 is larger"));
    CHECK(contains(message_for_json(R"({"method": {"name": "relora", "relora_gap": 50}})"), "method.relora_warmup: got 50, must be below method.relora_gap 50"));
    CHECK(contains(message_for_json(R"({"method": {"name": "relora", "relora_gap": 50}})"), "lower it or raise relora_gap"));
    CHECK(message_for_json(R"({"method": {"name": "relora", "relora_gap": 51}})") == "(no error)");
    CHECK(message_for_json(R"({"method": {"name": "lora", "relora_gap": 6}})") == "(no error)");
    CHECK(contains(message_for_json(R"({"method": {"relora_gap": 0}})"), "method.relora_gap: got 0, must be positive"));
    for (const char* key : {"merge_gap", "max_gap", "relora_gap"})  // sums of two stay within 64 bits
        CHECK(contains(message_for_json(std::string(R"({"method": {")") + key + R"(": 9223372036854775807}})"), std::string("method.") + key + ": got 9223372036854775807, must be at most"));
    CHECK(contains(message_for_json(R"({"train": {"steps": 9223372036854775807}})"), "train.steps: got 9223372036854775807, must be at most"));
    CHECK(contains(message_for_json(R"({"train": {"seq_len": 0}})"), "train.seq_len: got 0"));
    CHECK(contains(message_for_json(R"({"train": {"seq_len": "long"}})"), "train.seq_len: got \"long\", expected a whole number"));
    CHECK(contains(message_for_json(R"({"train": {"steps": 1.5}})"), "train.steps"));
    CHECK(contains(message_for_json(R"({"method": {"name": "loqd"}})"), "one of loqt|loqt-nq|full"));
    CHECK(contains(message_for_json(R"({"optimizer": {"lr": -1}})"), "optimizer.lr"));
    CHECK(contains(message_for_json(R"({"train": {"batch": 10, "micro_batch": 3}})"), "does not divide"));
    CHECK(contains(message_for_json(R"({"model": {"hidden": 100, "heads": 3}})"), "does not divide"));
    CHECK(contains(message_for_json(R"({"model": {"hidden": 12, "heads": 2}})"), "model.hidden: 12 is not a multiple of 8"));
    CHECK(contains(message_for_json(R"({"model": {"hidden": 32, "heads": 8, "kv_heads": 1}, "method": {"rank": 4}})"), "model.kv_heads: 1 heads of 4"));
    CHECK(contains(message_for_json(R"({"train": {"steps": "auto"}})"), "train.steps: got \"auto\", expected a whole number"));
    CHECK(contains(message_for_json(R"({"run": {"device": "tpu"}})"), "run.device: got \"tpu\""));
    const std::string both = message_for_json(R"({"train": {"batch": 8, "micro_batch": 2, "updates": "per_layer"}})");
    CHECK(contains(both, "train.micro_batch is 2 of 8 sequences (set it to auto"));
    CHECK(contains(both, ", and knows no global gradient norm to clip by"));  // clipping is the default: all that is wrong at once
    CHECK(!contains(message_for_json(R"({"train": {"batch": 8, "micro_batch": 2, "updates": "per_layer"}, "optimizer": {"clip": 0}})"), "clip"));
    CHECK(contains(message_for_json(R"({"train": {"updates": "per_layer"}, "optimizer": {"clip": 1}})"), "set optimizer.clip to 0"));
    CHECK(contains(message_for_json(R"({"train": {"seq_len": 1000000000000}})"), "train.seq_len: got 1000000000000, must be at most"));
    CHECK(contains(message_for_json(R"({"train": {"batch": 1000000000000}})"), "train.batch: got 1000000000000"));
    CHECK(contains(message_for_json(R"({"model": {"intermediate": 1000000000000}})"), "model.intermediate: got 1000000000000"));
    CHECK(contains(message_for_json(R"({"model": {"vocab": 1000000000000}})"), "model.vocab: got 1000000000000"));
    CHECK(contains(message_for_json(R"({"train": )"), "not valid JSON"));
    CHECK(contains(message_for_json(R"({"optimizer": {"lr": 1e999}})"), "double precision"));
    CHECK(contains(message_of([] { parse_bytes("24 apples"); }), "24 apples"));
    CHECK(contains(message_of([] { parse_bytes("24"); }), "no unit; write 24GiB"));
    CHECK(contains(message_of([] { parse_bytes("1e-9MiB"); }), "not an amount of memory"));  // less than a byte: 0 would mean no limit
    CHECK(parse_bytes("24GiB") == int64_t(24) << 30);
    CHECK(parse_bytes("1.5MB") == 1500000);
    Config c;
    CHECK(contains(message_of([&] { apply_override(c, {"lr", "fast"}); }), "optimizer.lr: got \"fast\""));
    CHECK(contains(message_of([&] { apply_override(c, {"rank", "auto"}); }), "method.rank: got \"auto\""));
}

TEST_CASE("config: what is written reads back the same, and overrides win", "[config]") {
    Config c;
    apply_override(c, {"lr", "0.0125"});
    apply_override(c, {"train.steps", "77"});
    apply_override(c, {"micro_batch", "auto"});
    apply_override(c, {"double_quant", "false"});
    apply_override(c, {"method.name", "full"});
    validate_config(c);
    std::string path = (std::filesystem::temp_directory_path() / ("loqt_config_" + std::to_string(fresh_seed()) + ".json")).string();
    std::ofstream(path) << config_to_json(c);
    Config again;
    read_config_file(again, path);
    std::filesystem::remove(path);
    CHECK(config_differences(c, again).empty());
    CHECK(again.optimizer.lr == 0.0125);
    CHECK(again.train.steps == 77);
    CHECK(again.train.micro_batch == 0);
    CHECK_FALSE(again.method.double_quant);
    again.method.rank = 3;
    CHECK(config_differences(c, again) == std::vector<std::string>{"method.rank: 128 -> 3"});
    for (const char* key : {"method.rank", "method.scale", "method.lora_alpha"}) CHECK(fixed_for_resume(key));
    CHECK_FALSE(fixed_for_resume("optimizer.lr"));
}

TEST_CASE("config: what several processes ask of it", "[config]") {
    auto message = [](int64_t ranks, int64_t batch, int64_t micro_batch, const char* device, const char* updates) {
        Config c;
        c.world_size = ranks, c.run.gpus = 2, c.run.device = device, c.train.batch = batch, c.train.micro_batch = micro_batch, c.train.updates = updates;
        c.optimizer.clip = 0;
        return message_of([&] { validate_config(c); });
    };
    CHECK(message(2, 8, 2, "cuda", "ordinary") == "(no error)");
    CHECK(message(2, 8, 4, "cuda", "per_layer") == "(no error)");
    CHECK(contains(message(3, 8, 0, "cuda", "ordinary"), "train.batch: 8 sequences cannot be shared evenly by 3"));
    CHECK(contains(message(2, 8, 8, "cuda", "ordinary"), "train.micro_batch: 8 does not divide the 4 sequences"));
    CHECK(contains(message(2, 8, 2, "cuda", "per_layer"), "train.updates"));
    CHECK(contains(message(2, 8, 2, "cuda:1", "ordinary"), "run.device cuda:1 names one"));
    // Sampling and exporting take one process, on any GPU, whatever the run was trained on.
    CHECK(message(1, 8, 2, "cuda:1", "ordinary") == "(no error)");
}

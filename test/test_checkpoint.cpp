// Checkpoints: exact round trips, damage, other shapes, full disks, fallback to the newest valid one, pruning.
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>

#include "runtime/checkpoint.h"
#include "runtime/safetensors.h"
#include "test/support.h"
#include "test/temp_dir.h"

namespace {

// Tensors on a device with random bytes in every element and a pattern in the padding.
struct Model {
    std::vector<std::unique_ptr<OnDevice>> tensors;
    std::vector<CheckpointTensor> list;

    void add(Device& device, const std::string& name, DType dtype, int64_t rows, int64_t cols, int64_t ld = 0, std::vector<int64_t> shape = {}) {
        tensors.push_back(std::make_unique<OnDevice>(device, dtype, rows, cols, ld));
        list.push_back({name, tensors.back()->t, shape.empty() ? std::vector<int64_t>{rows, cols} : shape});
    }
    void randomize(std::mt19937_64& rng) {
        for (auto& t : tensors) {
            std::vector<uint64_t> words(size_t(t->t.bytes() / 8 + 1));
            for (uint64_t& w : words) w = rng();
            std::vector<char> bytes(size_t(t->t.bytes()));
            std::memcpy(bytes.data(), words.data(), bytes.size());
            t->raw_write(bytes);
        }
    }
    // The memory of every tensor with its padding set to zero: what loading must give.
    std::vector<std::vector<char>> expected() const {
        std::vector<std::vector<char>> all;
        for (auto& t : tensors) {
            all.push_back(t->raw<char>());
            int64_t width = size_of(t->t.dtype);
            for (int64_t r = 0; r < t->t.rows; ++r)
                std::fill_n(all.back().begin() + (r * t->t.ld + t->t.cols) * width, (t->t.ld - t->t.cols) * width, char(0));
        }
        return all;
    }
    std::vector<std::vector<char>> memory() const {
        std::vector<std::vector<char>> all;
        for (auto& t : tensors) all.push_back(t->raw<char>());
        return all;
    }
};

void round_trip(const std::string& which) {
    auto device = test_device(which, 1 << 20);
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    const DType types[] = {DType::f32, DType::bf16, DType::u8, DType::i16, DType::i32, DType::f64};
    TempDir dir;
    for (int round = 0; round < 10; ++round) {
        Model model;
        for (int i = 0, n = int(rng() % 10); i < n; ++i) {
            int64_t rows = 1 + int64_t(rng() % 20), cols = 1 + int64_t(rng() % 40), ld = cols + int64_t(rng() % 3 ? 0 : rng() % 9);
            std::vector<int64_t> shape = {rows, cols};
            if (rng() % 3 == 0) shape = {1, rows * cols, 1};
            model.add(*device, "t" + std::to_string(i), types[rng() % 6], rows, cols, ld, shape);
        }
        if (round == 0) {  // more than one buffer: packed, padded, and a vector with padding
            model.add(*device, "packed", DType::u8, 1, 17000001, 0, {17000001});
            model.add(*device, "padded", DType::f32, 2011, 2100, 2104);
            model.add(*device, "vector", DType::bf16, 1, 5, 8, {5});
        }
        model.randomize(rng);
        auto expected = model.expected();
        Metadata metadata = {{"step", std::to_string(rng())}, {"config", "{\"a\": \"ü\"}"}};
        std::string path = checkpoint_path(dir / "checkpoints", round);
        save_checkpoint(*device, path, model.list, metadata);
        model.randomize(rng);
        CHECK(load_checkpoint(*device, path, model.list) == metadata);
        REQUIRE((model.memory() == expected));  // not printed: it may be 30 MB
        CHECK(checkpoint_metadata(path) == metadata);
        std::filesystem::remove(path);
    }
}

Model small_model(Device& device, std::mt19937_64& rng) {
    Model model;
    model.add(device, "model.embed_tokens.weight", DType::f32, 5, 4, 6);
    model.add(device, "model.layers.0.mlp.down_proj.weight.B", DType::bf16, 3, 4);
    model.randomize(rng);
    return model;
}

void flip_a_byte(const std::string& path, std::mt19937_64& rng) {
    std::string bytes = file_bytes(path);
    size_t i = rng() % bytes.size();
    bytes[i] = char(bytes[i] ^ int(1 + rng() % 255));
    put_file(path, bytes);
}

}  // namespace

TEST_CASE("checkpoint: restores every bit", "[checkpoint]") { round_trip("cpu"); }
TEST_CASE("checkpoint: restores every bit on the GPU", "[checkpoint][gpu]") { round_trip("cuda"); }

TEST_CASE("checkpoint: a damaged one never loads", "[checkpoint]") {
    auto device = Device::open("cpu");
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    TempDir dir;
    Model model = small_model(*device, rng);
    std::string path = dir / "c.safetensors";
    save_checkpoint(*device, path, model.list, {{"step", "3"}});
    const std::string good = file_bytes(path);
    for (int round = 0; round < 500; ++round) {
        put_file(path, good);
        if (round % 2) put_file(path, good.substr(0, rng() % good.size()));
        else flip_a_byte(path, rng);
        std::string text = user_error([&] { load_checkpoint(*device, path, model.list); });
        CHECK(has(text, path));
    }
    // A sound safetensors file without checksums is not taken for a checkpoint.
    put_file(path, std::string("\2\0\0\0\0\0\0\0{}", 10));
    CHECK(has(user_error([&] { load_checkpoint(*device, path, {}); }), "no checksums"));
}

TEST_CASE("checkpoint: one of another run is refused before anything is touched", "[checkpoint]") {
    auto device = Device::open("cpu");
    std::mt19937_64 rng(fresh_seed());
    TempDir dir;
    Model model = small_model(*device, rng);
    std::string path = dir / "c.safetensors";
    save_checkpoint(*device, path, model.list, {});
    auto refusal = [&](const std::vector<CheckpointTensor>& list) {
        model.randomize(rng);
        auto before = model.memory();
        std::string text = user_error([&] { load_checkpoint(*device, path, list); });
        CHECK((model.memory() == before));
        CHECK(has(text, path));
        return text;
    };
    auto list = model.list;
    list[1].shape = {4, 3};
    std::string text = refusal(list);
    CHECK(has(text, "another shape"));
    CHECK(has(text, "down_proj.weight.B is [3, 4] there and [4, 3] here"));
    CHECK(has(text, "method.rank"));
    list = model.list;
    list[0].shape = {4, 5};
    CHECK(has(refusal(list), "model.vocab"));
    list = model.list;
    list[1].tensor.dtype = DType::i16;
    CHECK(has(refusal(list), "is BF16 there and I16 here"));
    list = model.list;
    list.push_back({"model.layers.1.x", model.list[0].tensor, {5, 4}});
    CHECK(has(refusal(list), "has no tensor model.layers.1.x"));
    list.resize(1);
    CHECK(has(refusal(list), "lacks: model.layers.0.mlp.down_proj.weight.B"));
    CHECK(has(user_error([&] { load_checkpoint(*device, dir / "none.safetensors", model.list); }), "No such file"));
    load_checkpoint(*device, path, model.list);
}

TEST_CASE("checkpoint: weights alone load into the other float type", "[checkpoint]") {
    auto device = Device::open("cpu");
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    TempDir dir;
    std::string path = dir / "c.safetensors";
    std::vector<float> values = random_normal(rng, 35), others = random_normal(rng, 6);
    OnDevice wide(*device, DType::f32, 5, 7, values, 9), narrow(*device, DType::bf16, 2, 3, others), codes(*device, DType::u8, 1, 4);
    save_checkpoint(*device, path, {{"wide", wide, {5, 7}}, {"narrow", narrow, {2, 3}}, {"codes", codes, {4}}}, {{"step", "1"}});

    OnDevice wide_bf16(*device, DType::bf16, 5, 7, 8), narrow_f32(*device, DType::f32, 2, 3, 5), codes_f32(*device, DType::f32, 1, 4);
    std::vector<CheckpointTensor> list = {{"narrow", narrow_f32, {2, 3}}, {"wide", wide_bf16, {5, 7}}};
    CHECK(load_checkpoint(*device, path, list, LoadMode::weights).at("step") == "1");
    CHECK(wide_bf16.read() == round_to_bf16(values));
    CHECK(narrow_f32.read() == round_to_bf16(others));
    CHECK(narrow_f32.raw<float>()[3] == 0.0f);  // padding
    user_error([&] { load_checkpoint(*device, path, list); });
    user_error([&] { load_checkpoint(*device, path, {{"codes", codes_f32, {4}}}, LoadMode::weights); });
    user_error([&] { load_checkpoint(*device, path, {{"none", narrow_f32, {2, 3}}}, LoadMode::weights); });
}

TEST_CASE("checkpoint: a full disk leaves the previous checkpoint and no temporary", "[checkpoint]") {
    auto device = Device::open("cpu");
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    TempDir dir;
    Model model = small_model(*device, rng);
    save_checkpoint(*device, checkpoint_path(dir.path, 1), model.list, {{"step", "1"}});
    auto saved = model.expected();
    rlim_t size = std::filesystem::file_size(checkpoint_path(dir.path, 1));
    for (int round = 0; round < 20; ++round) {
        model.randomize(rng);
        // Over the same name and under a new one.
        std::string path = checkpoint_path(dir.path, round % 2 ? 1 : 2), text;
        {
            FileSizeLimit limit(rng() % size);
            text = user_error([&] { save_checkpoint(*device, path, model.list, {{"step", "2"}}); });
        }
        CHECK(has(text, path));
        REQUIRE(dir.files() == 1);
        std::vector<std::string> skipped;
        REQUIRE(find_newest_valid(dir.path, &skipped)->step == 1);
        CHECK(skipped.empty());
        CHECK(load_checkpoint(*device, checkpoint_path(dir.path, 1), model.list).at("step") == "1");
        CHECK((model.memory() == saved));
    }
}

TEST_CASE("checkpoint: the newest that verifies is found, the others named", "[checkpoint]") {
    auto device = Device::open("cpu");
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    TempDir dir;
    CHECK_FALSE(find_newest_valid(dir / "none", nullptr));
    CHECK_FALSE(find_newest_valid(dir.path, nullptr));
    Model model = small_model(*device, rng);
    for (int64_t step : {5, 40, 300, 100000000}) save_checkpoint(*device, checkpoint_path(dir.path, step), model.list, {});
    put_file(dir / "step-00000400.safetensors.tmp-1-0", "x");
    put_file(dir / "step-500.safetensors", "x");
    put_file(dir / "notes.txt", "x");
    auto files = list_checkpoints(dir.path);
    REQUIRE(files.size() == 4);
    CHECK(files[0].step == 5);
    CHECK(files[3].path == dir / "step-100000000.safetensors");
    CHECK(find_newest_valid(dir.path, nullptr)->step == 100000000);

    flip_a_byte(files[3].path, rng);
    put_file(files[2].path, file_bytes(files[2].path).substr(0, 100));
    std::vector<std::string> skipped;
    CHECK(find_newest_valid(dir.path, &skipped)->step == 40);
    REQUIRE(skipped.size() == 2);
    CHECK(has(skipped[0], files[3].path));
    CHECK(has(skipped[1], files[2].path));
    CHECK(has(skipped[1], "damaged"));
    for (const auto& f : files) put_file(f.path, "");
    CHECK_FALSE(find_newest_valid(dir.path, nullptr));
}

TEST_CASE("checkpoint: pruning keeps the newest valid ones and every M-th", "[checkpoint]") {
    auto device = Device::open("cpu");
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    TempDir source;
    Model model = small_model(*device, rng);
    save_checkpoint(*device, source / "good", model.list, {});
    const std::string good = file_bytes(source / "good");
    for (int round = 0; round < 100; ++round) {
        TempDir dir;
        const int64_t keep_last = 1 + int64_t(rng() % 4), keep_every = int64_t(rng() % 5);
        std::map<int64_t, bool> steps;  // step → valid
        for (int i = int(rng() % 12); i > 0; --i) steps[int64_t(rng() % 30)] = rng() % 3 != 0;
        for (auto [step, valid] : steps) {
            put_file(checkpoint_path(dir.path, step), good);
            if (!valid) flip_a_byte(checkpoint_path(dir.path, step), rng);
        }
        // Oracle: a checkpoint goes exactly if keep_last valid ones are newer and it is no multiple of keep_every.
        std::vector<int64_t> expected;
        for (auto [step, valid] : steps) {
            int64_t newer = std::count_if(steps.begin(), steps.end(), [step = step](const auto& other) { return other.first > step && other.second; });
            bool multiple = keep_every > 0 && step % keep_every == 0;
            if (newer < keep_last || multiple) expected.push_back(step);
        }
        std::set<std::string> trusted;
        auto deleted = prune_checkpoints(dir.path, keep_last, keep_every, rng() % 2 ? &trusted : nullptr);
        std::vector<int64_t> left;
        for (const auto& f : list_checkpoints(dir.path)) left.push_back(f.step);
        INFO("keep_last " << keep_last << " keep_every " << keep_every);
        REQUIRE(left == expected);
        CHECK(deleted.size() == steps.size() - left.size());
        CHECK(prune_checkpoints(dir.path, keep_last, keep_every).empty());
    }
    CHECK(has(user_error([&] { prune_checkpoints(source.path, 0, 0); }), "checkpoint.keep_last"));
    CHECK(prune_checkpoints(source / "none", 1, 0).empty());
}

TEST_CASE("checkpoint: trusted ones are not read again", "[checkpoint]") {
    TempDir dir;
    for (int64_t step : {1, 2}) put_file(checkpoint_path(dir.path, step), "not a checkpoint");
    std::set<std::string> trusted = {checkpoint_path(dir.path, 2)};
    CHECK(prune_checkpoints(dir.path, 1, 0, &trusted) == std::vector<std::string>{checkpoint_path(dir.path, 1)});
}

TEST_CASE("checkpoint: temporaries of dead writers go, those of living writers stay", "[checkpoint]") {
    TempDir dir;
    put_file(dir / "step-00000001.safetensors.tmp-1-0", "left by a killed process");
    SafetensorsWriter alive(checkpoint_path(dir.path, 2), {}, {});
    CHECK(dir.files() == 2);
    prune_checkpoints(dir.path, 1, 0);
    CHECK(dir.files() == 1);
    alive.finish();
    CHECK(list_checkpoints(dir.path).size() == 1);
}

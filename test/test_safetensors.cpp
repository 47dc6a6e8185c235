// The safetensors format: round trips, damage, full disks, files of the Python library.
#include <algorithm>
#include <cmath>
#include <limits>

#include "runtime/safetensors.h"
#include "test/support.h"
#include "test/temp_dir.h"

namespace {

struct Sample {
    std::vector<SafetensorsWriter::Item> items;
    std::vector<std::string> data;
    std::map<std::string, std::string> metadata;
};

std::string random_bytes(std::mt19937_64& rng, size_t n) {
    std::string s(n, '\0');
    for (char& c : s) c = char(rng());
    return s;
}

Sample random_sample(std::mt19937_64& rng, int max_tensors, int64_t max_size) {
    const DType types[] = {DType::f32, DType::bf16, DType::u8, DType::i16, DType::i32, DType::f64};
    const std::string letters[] = {"a", "model.", "\"", "\\", "ü", "\n", "x.nf4", " ", "{", "日"};
    Sample s;
    for (int n = int(rng() % (max_tensors + 1)); n > 0; --n) {
        std::string name = std::to_string(n);
        for (int k = int(rng() % 6); k > 0; --k) name += letters[rng() % 10];
        SafetensorsWriter::Item item{name, types[rng() % 6], {}};
        int64_t bytes = size_of(item.dtype);
        for (int k = int(rng() % 4); k > 0; --k) item.shape.push_back(int64_t(rng() % max_size)), bytes *= item.shape.back();
        s.items.push_back(item);
        s.data.push_back(random_bytes(rng, size_t(bytes)));
    }
    for (int n = int(rng() % 4); n > 0; --n) s.metadata["key" + letters[rng() % 10]] = letters[rng() % 10] + letters[rng() % 10];
    return s;
}

void write_sample(const std::string& path, const Sample& s, std::mt19937_64& rng) {
    SafetensorsWriter file(path, s.items, s.metadata);
    for (size_t i = 0; i < s.items.size(); ++i)
        for (size_t done = 0; done < s.data[i].size();) {
            size_t n = std::min<size_t>(s.data[i].size() - done, 1 + rng() % 100);
            file.write(s.items[i].name, s.data[i].data() + done, int64_t(n));
            done += n;
        }
    file.finish();
}

void read_all(const std::string& path) {
    SafetensorsReader file(path);
    if (!file.checksummed()) throw UserError("no checksums");
    file.verify();
}

// A file from a header and a number of data bytes.
std::string raw_file(const std::string& header, size_t data_bytes) {
    uint64_t length = header.size();
    return std::string(reinterpret_cast<const char*>(&length), 8) + header + std::string(data_bytes, 'x');
}

// CRC-32 bit by bit, from the definition.
uint32_t crc32_by_definition(const std::string& s) {
    uint32_t c = 0xffffffffu;
    for (unsigned char byte : s)
        for (int bit = 0; bit < 8; ++bit) {
            bool odd = (c ^ (byte >> bit)) & 1;
            c = (c >> 1) ^ (odd ? 0xEDB88320u : 0u);
        }
    return ~c;
}

}  // namespace

TEST_CASE("crc32: known answers and any split", "[safetensors]") {
    CHECK(crc32("", 0) == 0u);
    CHECK(crc32("123456789", 9) == 0xcbf43926u);
    CHECK(crc32("The quick brown fox jumps over the lazy dog", 43) == 0x414fa339u);
    std::string zeros(32, '\0');
    CHECK(crc32(zeros.data(), zeros.size()) == 0x190a55adu);
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (int n = 0; n < 200; ++n) {
        std::string s = random_bytes(rng, size_t(n));
        REQUIRE(crc32(s.data(), s.size()) == crc32_by_definition(s));
        Crc32 c;
        for (size_t done = 0; done < s.size();) {
            size_t k = std::min<size_t>(s.size() - done, rng() % 40);
            c.update(s.data() + done, k);
            done += k;
        }
        REQUIRE(c.value() == crc32_by_definition(s));
    }
}

TEST_CASE("safetensors: what is written is read", "[safetensors]") {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    TempDir dir;
    for (int round = 0; round < 40; ++round) {
        Sample s = random_sample(rng, 12, 9);
        std::string path = dir / "a.safetensors";
        write_sample(path, s, rng);
        SafetensorsReader file(path);
        CHECK(file.checksummed());
        CHECK(file.metadata() == s.metadata);
        REQUIRE(file.entries().size() == s.items.size());
        int64_t length = 0;
        std::memcpy(&length, file_bytes(path).data(), 8);
        CHECK(length % 8 == 0);
        for (size_t i = 0; i < s.items.size(); ++i) {
            const SafetensorsEntry& e = file.entry(s.items[i].name);
            CHECK(e.dtype == safetensors_name(s.items[i].dtype));
            CHECK(e.shape == s.items[i].shape);
            CHECK(e.offset % size_of(s.items[i].dtype) == 0);
            std::string data(s.data[i].size(), '\0');
            file.read(s.items[i].name, &data[0], int64_t(data.size()));
            CHECK(data == s.data[i]);
            CHECK(e.crc == format("%08x", crc32_by_definition(data)));
        }
        file.verify();
    }
    CHECK(dir.files() == 1);
}

TEST_CASE("safetensors: every flipped byte and every truncation is found", "[safetensors]") {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    TempDir dir;
    std::string path = dir / "a.safetensors";
    Sample s;
    s.items = {{"w.nf4", DType::u8, {5, 7}}, {"w.absmax", DType::f32, {3}}};
    s.data = {random_bytes(rng, 35), random_bytes(rng, 12)};
    s.metadata = {{"step", "17"}};
    write_sample(path, s, rng);
    const std::string good = file_bytes(path);
    read_all(path);

    for (size_t i = 0; i < good.size(); ++i)
        for (int bit = 0; bit < 9; ++bit) {
            std::string bad = good;
            bad[i] = char(bad[i] ^ (bit < 8 ? 1 << bit : int(1 + rng() % 255)));
            put_file(path, bad);
            INFO("byte " << i << " " << int(good[i]) << " -> " << int(bad[i]));
            REQUIRE_THROWS_AS(read_all(path), UserError);
        }
    for (size_t n = 0; n < good.size(); ++n) {
        put_file(path, good.substr(0, n));
        INFO("length " << n);
        REQUIRE_THROWS_AS(read_all(path), UserError);
    }
    put_file(path, good + "x");
    REQUIRE_THROWS_AS(read_all(path), UserError);
    put_file(path, good);
    read_all(path);
}

TEST_CASE("safetensors: malformed headers are refused with their fault", "[safetensors]") {
    TempDir dir;
    std::string path = dir / "a.safetensors";
    auto fault = [&](const std::string& header, size_t data_bytes) {
        put_file(path, raw_file(header, data_bytes));
        std::string text = user_error([&] { SafetensorsReader file(path); });
        CHECK(has(text, path));
        CHECK_FALSE(has(text, "\n"));
        return text;
    };
    CHECK(has(fault("[]", 0), "not a JSON object"));
    CHECK(has(fault("{\"a\":", 0), "not a JSON object"));
    CHECK(has(fault("{\"a\":{\"dtype\":\"F32\"}}", 4), "no proper dtype"));
    CHECK(has(fault("{\"a\":{\"dtype\":\"F31\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4), "F31"));
    CHECK(has(fault("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4), "takes 8 bytes, not 4"));
    CHECK(has(fault("{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", 4), "impossible shape"));
    CHECK(has(fault("{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,4]}}", 4), "impossible shape"));
    CHECK(has(fault("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", 4), "lies at"));
    CHECK(has(fault("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 4), "lies at"));
    CHECK(has(fault("{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", 3), "follow its last"));
    CHECK(has(fault("{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[1,3]}}", 3), "hole"));
    CHECK(has(fault("{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[1,3]}}", 3), "overlaps"));
    CHECK(has(fault("{\"__metadata__\":{\"a\":1}}", 0), "not a string"));
    CHECK(has(fault("{\"__metadata__\":{\"crc32.a\":\"00000000\"}}", 0), "checksums"));
    put_file(path, std::string(8, '\xff') + "{}");
    CHECK(has(user_error([&] { SafetensorsReader file(path); }), "claims"));
    CHECK(has(user_error([&] { SafetensorsReader file(dir / "none"); }), "No such file"));
    CHECK(has(user_error([&] { SafetensorsReader file(dir.path); }), "not a regular file"));

    put_file(path, raw_file("{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}  ", 2));
    SafetensorsReader file(path);
    CHECK_FALSE(file.checksummed());
    CHECK(has(user_error([&] { file.entry("b"); }), "no tensor b"));
    std::vector<float> values;
    CHECK(has(user_error([&] { file.read_floats("a", values, 0, 2); }), "U8"));
}

TEST_CASE("safetensors: a full disk leaves the old file and no temporary", "[safetensors]") {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    TempDir dir;
    std::string path = dir / "a.safetensors";
    Sample small, large;
    small.items = {{"a", DType::u8, {100}}};
    small.data = {random_bytes(rng, 100)};
    large.items = {{"a", DType::u8, {200000}}};
    large.data = {random_bytes(rng, 200000)};
    write_sample(path, small, rng);
    const std::string before = file_bytes(path);
    for (int round = 0; round < 20; ++round) {
        std::string text;
        {
            FileSizeLimit limit(rng() % 200000);
            text = user_error([&] { write_sample(path, large, rng); });
        }
        CHECK(has(text, path));
        CHECK(has(text, "too large"));
        CHECK(has(text, "ulimit"));
        REQUIRE(dir.files() == 1);
        REQUIRE(file_bytes(path) == before);
    }
    // More than any disk has: refused before the first byte.
    std::string text = user_error([&] { SafetensorsWriter file(path, {{"a", DType::u8, {int64_t(1) << 60}}}, {}); });
    CHECK(has(text, "MiB free"));
    // A writer that is given up.
    { SafetensorsWriter file(path, large.items, {}); CHECK(dir.files() == 2); }
    CHECK(dir.files() == 1);
    CHECK(file_bytes(path) == before);
    CHECK(has(user_error([&] { write_sample(dir / "no/such/place", small, rng); }), "No such file"));
    write_sample(path, large, rng);
    read_all(path);
}

TEST_CASE("safetensors: misuse of the writer is an internal error", "[safetensors]") {
    TempDir dir;
    std::string path = dir / "a.safetensors";
    char byte = 0;
    CHECK_THROWS_AS(SafetensorsWriter(path, {{"a", DType::u8, {1}}, {"a", DType::u8, {1}}}, {}), InternalError);
    CHECK_THROWS_AS(SafetensorsWriter(path, {}, {{"crc32.a", "x"}}), InternalError);
    SafetensorsWriter file(path, {{"a", DType::u8, {1}}, {"b", DType::u8, {1}}}, {});
    CHECK_THROWS_AS(file.write("b", &byte, 1), InternalError);
    CHECK_THROWS_AS(file.write("a", &byte, 2), InternalError);
    file.write("a", &byte, 1);
    CHECK_THROWS_AS(file.finish(), InternalError);
}

// The file test_safetensors_interop.py made with the Python library, element i of most tensors being i.
TEST_CASE("safetensors: a file of the Python library", "[safetensors]") {
    SafetensorsReader file(repository_path("test/fixtures/interop.safetensors"));
    CHECK_FALSE(file.checksummed());
    CHECK(file.metadata() == std::map<std::string, std::string>{{"format", "np"}, {"quote", "\"ü\"\n"}});
    CHECK(file.entries().size() == 9);
    CHECK(file.entry("empty").shape == std::vector<int64_t>{0, 3});
    CHECK(file.entry("i32").dtype == "I32");
    std::vector<float> values;
    for (const std::string name : {"f64", "f32", "bf16"}) {
        CHECK(file.entry(name).shape == std::vector<int64_t>{3, 5});
        file.read_floats(name, values, 0, 15);
        for (int i = 0; i < 15; ++i) CHECK(values[size_t(i)] == float(i));
        file.read_floats(name, values, 5, 3);
        CHECK(values == std::vector<float>{5, 6, 7});
    }
    file.read_floats("scalar \"ü\"", values, 0, 1);
    CHECK(values == std::vector<float>{0.5f});
    int32_t integers[4];
    file.read("i32", integers, sizeof integers);
    CHECK(integers[3] == 3);
    const float inf = std::numeric_limits<float>::infinity();
    file.read_floats("f16", values, 0, 8);
    CHECK(values == std::vector<float>{1.0f, -2.0f, 65504.0f, 0x1p-14f, 0x1p-24f, -0x1.ff8p-15f, inf, -inf});
    file.read_floats("f16", values, 8, 2);
    CHECK(std::isnan(values[0]));
    CHECK((values[1] == 0.0f && std::signbit(values[1])));
}

// Left for test_safetensors_interop.py.
TEST_CASE("safetensors: a file for the Python library", "[safetensors]") {
    std::string directory = repository_path("build/test-output");
    std::filesystem::create_directories(directory);
    SafetensorsWriter file(directory + "/written.safetensors", {{"bytes", DType::u8, {7}}, {"f32", DType::f32, {3, 5}}, {"empty", DType::f32, {0, 3}},
                           {"bf16 \"ü\"", DType::bf16, {2, 3}}, {"f64", DType::f64, {}}}, {{"format", "pt"}, {"step", "17"}});
    std::vector<uint8_t> bytes = {0, 1, 2, 3, 4, 5, 6};
    std::vector<float> floats(15);
    std::vector<bf16> halves(6);
    for (int i = 0; i < 15; ++i) floats[size_t(i)] = float(i);
    for (int i = 0; i < 6; ++i) halves[size_t(i)] = to_bf16(float(i));
    double scalar = 0.1;
    file.write("bytes", bytes.data(), 7);
    file.write("f32", floats.data(), 60);
    file.write("bf16 \"ü\"", halves.data(), 12);
    file.write("f64", &scalar, 8);
    file.finish();
    read_all(directory + "/written.safetensors");
}

TEST_CASE("safetensors: a model in several files", "[safetensors]") {
    std::mt19937_64 rng(1);
    TempDir dir;
    auto write_one = [&](const std::string& file, const std::string& tensor, float value) {
        SafetensorsWriter writer(dir / file, {{tensor, DType::f32, {1}}}, {});
        writer.write(tensor, &value, 4);
        writer.finish();
    };
    CHECK(has(user_error([&] { SafetensorsModel model(dir.path); }), "neither"));
    write_one("one.safetensors", "a", 1);
    write_one("two.safetensors", "b", 2);
    const std::string index = dir / "model.safetensors.index.json";
    put_file(index, "{\"metadata\":{},\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\"}}");
    {
        SafetensorsModel model(dir.path);
        std::vector<float> values;
        model.file_of("b").read_floats("b", values, 0, 1);
        CHECK(values[0] == 2.0f);
        CHECK(model.names() == std::vector<std::string>{"a", "b"});
        CHECK(has(user_error([&] { model.entry("c"); }), "no tensor c"));
    }
    put_file(index, "{\"weight_map\":{\"c\":\"one.safetensors\"}}");
    CHECK(has(user_error([&] { SafetensorsModel model(dir.path); }), "no tensor c"));
    put_file(index, "{\"weight_map\":{\"a\":3}}");
    CHECK(has(user_error([&] { SafetensorsModel model(dir.path); }), "damaged"));
    put_file(index, "{\"weight_map\":{\"a\":\"three.safetensors\"}}");
    CHECK(has(user_error([&] { SafetensorsModel model(dir.path); }), "three.safetensors"));
    put_file(index, "{");
    CHECK(has(user_error([&] { SafetensorsModel model(dir.path); }), "weight_map"));
    write_one("model.safetensors", "d", 4);
    CHECK(SafetensorsModel(dir.path).has("d"));
}

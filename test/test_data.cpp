// Shards, order, batches. The tests write shards themselves, with tokens that tell where they lie.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>

#include "runtime/data.h"
#include "test/support.h"

namespace fs = std::filesystem;

namespace {

struct Folder {  // a folder that removes itself
    fs::path path;
    Folder() {
        std::string name = (fs::temp_directory_path() / "test_data_XXXXXX").string();
        REQUIRE(::mkdtemp(&name[0]) != nullptr);
        path = name;
    }
    ~Folder() { fs::remove_all(path); }
    std::string operator/(const std::string& name) const { return (path / name).string(); }
};

struct Header {
    int32_t magic, version;
    uint32_t tokens;
};
constexpr Header kNarrow{20240520, 1, 0}, kWide{20240801, 7, 0};

void write_shard(const std::string& file, Header header, const std::vector<uint32_t>& tokens, int64_t claimed = -1) {
    header.tokens = claimed < 0 ? uint32_t(tokens.size()) : uint32_t(claimed);
    std::vector<char> bytes(1024, 0);
    std::memcpy(bytes.data(), &header, sizeof header);
    for (uint32_t t : tokens) {
        char b[4] = {char(t), char(t >> 8), char(t >> 16), char(t >> 24)};
        bytes.insert(bytes.end(), b, b + (header.magic == 20240801 ? 4 : 2));
    }
    std::ofstream(file, std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
}

void write_text(const std::string& file, const std::string& text) { std::ofstream(file) << text; }

std::vector<uint32_t> counting(uint32_t first, int64_t n) {
    std::vector<uint32_t> v(n);
    for (int64_t i = 0; i < n; ++i) v[i] = first + uint32_t(i);
    return v;
}

DataOptions options_for(const std::vector<std::string>& paths, int64_t seq_len, int64_t vocab, bool shuffle = true, uint64_t seed = 0) {
    DataOptions o;
    o.paths = paths, o.seq_len = seq_len, o.vocab = vocab, o.shuffle = shuffle, o.seed = seed;
    return o;
}

struct Sample {
    std::vector<int32_t> tokens, targets;
    int64_t valid;
    bool operator==(const Sample& o) const { return tokens == o.tokens && targets == o.targets && valid == o.valid; }
};
Sample read(const TokenDataset& data, uint64_t cursor) {
    Sample s{std::vector<int32_t>(data.seq_len()), std::vector<int32_t>(data.seq_len()), 0};
    s.valid = data.read(cursor, s.tokens.data(), s.targets.data());
    return s;
}

// What a UserError says; it must be one line that holds every one of `parts`.
template <class F> void check_user_error(F f, const std::vector<std::string>& parts) {
    std::string message;
    try {
        f();
        message = "(no UserError)";
    } catch (const UserError& e) {
        message = e.what();
    }
    for (const std::string& part : parts) {
        INFO("message: " << message << "\nshould hold: " << part);
        CHECK(message.find(part) != std::string::npos);
    }
    CHECK(message.find('\n') == std::string::npos);
}

std::string manifest_text(int64_t vocab, const std::string& layout, const std::string& seq_len, const std::string& file, int64_t tokens) {
    return format(R"({"format_version": 1, "vocab_size": %lld, "eos_id": 1, "pad_id": 0, "layout": "%s", "seq_len": %s,
        "tokenizer": {"kind": "sentencepiece", "file": "spiece.model", "sha256": "ab"}, "source": {},
        "splits": {"train": {"tokens": %lld, "documents": 3, "shards": [{"file": "%s", "tokens": %lld, "documents": 3}]}}})",
                  (long long)vocab, layout.c_str(), seq_len.c_str(), (long long)tokens, file.c_str(), (long long)tokens);
}

}  // namespace

TEST_CASE("the order of samples is a permutation", "[data]") {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    std::vector<uint64_t> sizes = {1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1024, 1025, 4096, 4097};
    for (int i = 0; i < 25; ++i) sizes.push_back(1 + rng() % 5000);
    for (uint64_t n : sizes) {
        uint64_t key = rng(), epoch = rng() % 2 ? rng() : rng() % 5;
        std::vector<int> hits(n, 0);
        for (uint64_t i = 0; i < n; ++i) {
            uint64_t p = permuted_index(i, n, key, epoch);
            REQUIRE(p < n);
            ++hits[p];
        }
        INFO("n " << n);
        CHECK(std::count(hits.begin(), hits.end(), 1) == int64_t(n));
    }
    for (uint64_t n : {uint64_t(1) << 32, (uint64_t(1) << 40) + 3, UINT64_MAX}) {  // too many to list: in range, no collision in a run
        std::set<uint64_t> seen;
        for (uint64_t i = 0; i < 1000; ++i) {
            uint64_t p = permuted_index(n - 1 - i, n, 7, 1);
            CHECK(p < n);
            seen.insert(p);
        }
        CHECK(seen.size() == 1000);
        CHECK(*seen.begin() < n / 100);  // spread over the range: a miss has probability 0.99^1000
        CHECK(*seen.rbegin() > n - n / 100);
    }
}

TEST_CASE("the order of samples looks uniform and depends on seed and epoch", "[data]") {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (uint64_t n : {3, 7, 64}) {  // where each index lands, over many epochs: chi-squared against the uniform distribution
        const int trials = 200 * int(n);
        std::vector<int> count(n * n, 0);
        uint64_t key = rng();
        for (int e = 0; e < trials; ++e)
            for (uint64_t i = 0; i < n; ++i) ++count[i * n + permuted_index(i, n, key, e)];
        double chi2 = 0, expected = double(trials) / n, freedom = double(n - 1) * (n - 1);
        for (int c : count) chi2 += (c - expected) * (c - expected) / expected;
        INFO("n " << n << " chi2 " << chi2 << " degrees of freedom " << freedom);
        CHECK(std::abs(chi2 - freedom) < 8 * std::sqrt(2 * freedom) + 8);
    }
    std::map<std::vector<uint64_t>, int> orders;  // all 24 orders of four samples come up, about equally often
    uint64_t key = rng();
    for (int e = 0; e < 4800; ++e) {
        std::vector<uint64_t> order;
        for (uint64_t i = 0; i < 4; ++i) order.push_back(permuted_index(i, 4, key, e));
        ++orders[order];
    }
    CHECK(orders.size() == 24);
    for (const auto& [order, times] : orders) CHECK(std::abs(times - 200) < 100);

    const uint64_t n = 5000, k = rng(), e = rng() % 100;
    int same_epoch = 0, same_seed = 0, neighbours = 0, fixed = 0;
    for (uint64_t i = 0; i < n; ++i) {
        uint64_t p = permuted_index(i, n, k, e);
        same_epoch += p == permuted_index(i, n, k, e + 1);
        same_seed += p == permuted_index(i, n, k + 1, e);
        fixed += p == i;
        neighbours += i > 0 && p == permuted_index(i - 1, n, k, e) + 1;
    }
    CHECK(std::max({same_epoch, same_seed, neighbours, fixed}) < 15);  // each is Poisson with mean 1
}

TEST_CASE("the order of samples does not change between versions", "[data]") {
    // From a separate implementation in Python. A change here breaks the resuming of every run in progress.
    std::vector<uint64_t> got;
    for (uint64_t i = 0; i < 8; ++i) got.push_back(permuted_index(i, 1000, 42, 3));
    CHECK(got == std::vector<uint64_t>{346, 835, 966, 830, 8, 836, 471, 668});
}

TEST_CASE("an epoch covers every token of every shard once", "[data]") {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    for (Header header : {kNarrow, kWide})
        for (int round = 0; round < 4; ++round) {
            Folder folder;
            int64_t seq = 1 + int64_t(rng() % 40);
            uint32_t first = header.magic == kWide.magic ? 70000 : 0;  // past 16 bits
            std::vector<int> expected(first + 20000, 0), hits(first + 20000, 0);
            uint32_t next = first;
            uint64_t samples = 0, tokens = 0;
            for (int s = 0; s < 6; ++s) {
                int64_t n = s == 2 ? 0 : s == 3 ? seq : s == 4 ? seq + 1 : 1 + int64_t(rng() % 3000);  // none, too small, exactly one
                write_shard(folder / format("a_train_%06d.bin", s), header, counting(next, n));
                int64_t whole = n > 0 ? (n - 1) / seq : 0;
                for (int64_t i = 0; i < whole * seq; ++i) expected[next + i] = 1;
                samples += whole, tokens += n, next += uint32_t(n);
            }
            write_shard(folder / "a_val_000000.bin", header, counting(0, 500));
            bool shuffle = round % 2 == 0;
            TokenDataset data(options_for({round < 2 ? folder.path.string() : folder / "a_train_*.bin"}, seq, first + 20000, shuffle, rng()));
            CHECK(data.samples() == samples);
            CHECK(data.tokens() == tokens);
            CHECK(data.files().size() == 6);
            uint64_t epoch = rng() % 3;
            int32_t last = -1;
            bool ascending = true;
            for (uint64_t i = 0; i < samples; ++i) {
                Sample s = read(data, epoch * samples + i);
                REQUIRE(s.valid == seq);
                for (int64_t t = 0; t < seq; ++t) {
                    REQUIRE(s.tokens[t] == s.tokens[0] + t);
                    REQUIRE(s.targets[t] == s.tokens[t] + 1);
                    ++hits[s.tokens[t]];
                }
                ascending &= s.tokens[0] > last;
                last = s.tokens[0];
            }
            CHECK(hits == expected);
            CHECK((ascending == !shuffle || samples < 20));
        }
}

TEST_CASE("rows: targets that are padding and each row's last are masked", "[data]") {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    Folder folder;
    const int64_t seq = 13, rows = 57, pad = 3;
    std::vector<uint32_t> tokens;
    for (int64_t r = 0; r < rows; ++r) {
        int64_t length = 1 + int64_t(rng() % seq);
        for (int64_t t = 0; t < seq; ++t) tokens.push_back(t < length ? 4 + rng() % 90 : pad);
    }
    write_shard(folder / "x.bin", kNarrow, tokens);
    DataOptions o = options_for({folder / "x.bin"}, seq, 100, false);
    o.layout = DataLayout::rows, o.pad_id = pad;
    TokenDataset data(o);
    REQUIRE(data.samples() == rows);
    for (int64_t r = 0; r < rows; ++r) {
        Sample s = read(data, r);
        int64_t valid = 0;
        for (int64_t t = 0; t < seq; ++t) {
            CHECK(s.tokens[t] == int32_t(tokens[r * seq + t]));
            bool masked = t == seq - 1 || tokens[r * seq + t + 1] == pad;
            CHECK(s.targets[t] == (masked ? -1 : int32_t(tokens[r * seq + t + 1])));
            valid += !masked;
        }
        CHECK(s.valid == valid);
    }
}

TEST_CASE("a stream continues at any cursor, whatever the micro-batch and the world", "[data]") {
    uint64_t seed = fresh_seed();
    INFO("seed " << seed);
    std::mt19937_64 rng(seed);
    Folder folder;
    write_shard(folder / "a.bin", kNarrow, counting(0, 1000));
    write_shard(folder / "b.bin", kNarrow, counting(1000, 777));
    const int64_t seq = 5;
    TokenDataset data(options_for({folder / "a.bin", folder / "b.bin"}, seq, 2000, true, rng()));
    for (int round = 0; round < 12; ++round) {
        uint64_t first = rng() % (3 * data.samples());
        int64_t rows = 1 + int64_t(rng() % 9), world = 1 + int64_t(rng() % 3), rank = int64_t(rng() % world);
        BatchStream stream(data, first + rank * rows, rows, world * rows);
        for (int k = 0; k < 60; ++k) {
            Batch batch = stream.next();
            uint64_t cursor = first + (k * world + rank) * rows;
            REQUIRE(batch.rows == rows);
            REQUIRE(batch.seq == seq);
            REQUIRE(batch.first_sample == cursor);
            REQUIRE(batch.valid_targets == rows * seq);
            REQUIRE(batch.groups.order.size() == size_t(rows * seq));
            for (int64_t r = 0; r < rows; ++r) {
                Sample s = read(data, cursor + r);
                REQUIRE(std::equal(s.tokens.begin(), s.tokens.end(), batch.tokens.begin() + r * seq));
                REQUIRE(std::equal(s.targets.begin(), s.targets.end(), batch.targets.begin() + r * seq));
            }
        }
    }  // every destructor meets a full queue
}

TEST_CASE("a stream ends where evaluation ends", "[data]") {
    Folder folder;
    write_shard(folder / "a.bin", kNarrow, counting(0, 104));
    TokenDataset data(options_for({folder / "a.bin"}, 10, 200, false));
    REQUIRE(data.samples() == 10);
    BatchStream stream(data, 0, 4, 0, data.samples());
    std::vector<int64_t> rows;
    int32_t expected = 0;
    for (int k = 0; k < 5; ++k) {
        Batch batch = stream.next();
        rows.push_back(batch.rows);
        CHECK(batch.tokens.size() == size_t(batch.rows * 10));
        for (int32_t t : batch.tokens) CHECK(t == expected++);
    }
    CHECK(rows == std::vector<int64_t>{4, 4, 2, 0, 0});
    CHECK(expected == 100);
}

TEST_CASE("an error in the prefetch thread reaches the caller", "[data]") {
    Folder folder;
    std::vector<uint32_t> tokens = counting(0, 1001);
    tokens[333] = 5000;  // between the samples that are checked when the shard is opened
    write_shard(folder / "a.bin", kNarrow, tokens);
    TokenDataset data(options_for({folder / "a.bin"}, 1, 2000, false));
    BatchStream stream(data, 0, 1);
    for (int k = 0; k < 332; ++k) CHECK(stream.next().rows == 1);
    for (int again = 0; again < 2; ++again) check_user_error([&] { stream.next(); }, {"a.bin", "5000", "333", "2000"});
}

TEST_CASE("shards past 2 and 4 GiB read right", "[data]") {
    Folder folder;
    struct Case {
        Header header;
        uint32_t tokens;
        int width;
    };
    for (Case c : {Case{kNarrow, 2500000001u, 2}, Case{kWide, 1300000001u, 4}}) {  // sparse: 5 GB that take up no disk
        std::string file = folder / format("big%d.bin", c.width);
        int fd = ::open(file.c_str(), O_RDWR | O_CREAT, 0600);
        REQUIRE(fd >= 0);
        if (::ftruncate(fd, 1024 + off_t(c.tokens) * c.width) != 0) {
            ::close(fd);
            WARN("the file system takes no sparse file of 5 GB: not tested");
            return;
        }
        Header h{c.header.magic, c.header.version, c.tokens};
        REQUIRE(::pwrite(fd, &h, sizeof h, 0) == ssize_t(sizeof h));
        const int64_t seq = 8;
        std::vector<int64_t> places = {0, (int64_t(1) << 31) / c.width, (int64_t(1) << 32) / c.width, int64_t(c.tokens) - 1 - seq};
        for (int64_t& p : places) p = p / seq * seq;
        for (int64_t p : places)
            for (int64_t t = 0; t <= seq; ++t) {
                uint32_t token = uint32_t((p + t) % 60001) + 1;
                REQUIRE(::pwrite(fd, &token, c.width, 1024 + (p + t) * c.width) == c.width);
            }
        ::close(fd);
        TokenDataset data(options_for({file}, seq, 65536, false));
        CHECK(data.samples() == (c.tokens - 1) / seq);
        CHECK(data.tokens() == c.tokens);
        for (int64_t p : places) {
            Sample s = read(data, p / seq);
            for (int64_t t = 0; t < seq; ++t) {
                CHECK(s.tokens[t] == (p + t) % 60001 + 1);
                CHECK(s.targets[t] == (p + t + 1) % 60001 + 1);
            }
        }
        fs::remove(file);
    }
}

TEST_CASE("data errors are one line that names file, value and remedy", "[data]") {
    Folder folder;
    std::string file = folder / "s_train_0.bin";
    auto open = [](DataOptions o) { return [o] { TokenDataset data(o); }; };
    DataOptions o = options_for({file}, 8, 300);
    check_user_error(open(options_for({}, 8, 300)), {"train", "no"});
    check_user_error(open(o), {file, "tokenize.py"});
    check_user_error(open(options_for({folder / "none_*.bin"}, 8, 300)), {"none_*.bin", "tokenize.py"});
    check_user_error(open(options_for({folder.path.string()}, 8, 300)), {folder.path.string(), "*train*.bin"});
    write_text(file, "short");
    check_user_error(open(o), {file, "5 bytes"});
    write_text(file, "");
    check_user_error(open(o), {file, "0 bytes"});
    write_shard(file, {12345, 1, 0}, counting(0, 100));
    check_user_error(open(o), {file, "magic number 12345", "20240520"});
    write_shard(file, {20240520, 2, 0}, counting(0, 100));
    check_user_error(open(o), {file, "version 2", "version 1"});
    write_shard(file, {20240801, 1, 0}, counting(0, 100));
    check_user_error(open(o), {file, "version 1", "version 7"});
    write_shard(file, kNarrow, counting(0, 100), 101);
    check_user_error(open(o), {file, "truncated", "1224", "101", "1226"});
    write_shard(file, kNarrow, counting(0, 100), 99);
    check_user_error(open(o), {file, "too long", "99"});
    write_shard(file, kNarrow, counting(0, 8));
    check_user_error(open(o), {file, "length 8", "8 tokens", "9 needed"});
    write_shard(file, kNarrow, {});
    check_user_error(open(o), {file, "length 8", "0 tokens"});

    write_shard(file, kNarrow, counting(0, 100));
    check_user_error(open(options_for({file}, 0, 300)), {"length 0", "at least 1"});
    check_user_error(open(options_for({file}, -5, 300)), {"length -5"});
    CHECK_NOTHROW(open(options_for({file}, 8, 97))());  // twelve samples of eight, and a target: ids 0 to 96
    check_user_error(open(options_for({file}, 8, 96)), {file, "id 96", "vocabulary has 96"});
    write_shard(file, kWide, {1, 2, 3, 4, 5, 6, 7, 4294967295u, 8, 9});
    check_user_error(open(o), {file, "4294967295", "position 7"});

    o.layout = DataLayout::rows;
    write_shard(file, kNarrow, counting(0, 16));
    check_user_error(open(o), {file, "rows", "pad_id"});
    o.pad_id = 0;
    o.seq_len = 5;
    check_user_error(open(o), {file, "16 tokens", "rows of 5"});
    check_user_error([] { data_layout("columns"); }, {"columns", "packed or rows"});
    CHECK(data_layout("rows") == DataLayout::rows);
    CHECK(data_layout("packed") == DataLayout::packed);
}

TEST_CASE("the manifest is read, and checked against the model and the shards", "[data]") {
    Folder folder;
    std::string file = folder / "s_train_0.bin", manifest = folder / "manifest.json";
    write_shard(file, kNarrow, counting(0, 96));
    CHECK(!load_manifest(folder.path.string()));
    auto open = [](DataOptions o) { return [o] { TokenDataset data(o); }; };
    DataOptions packed = options_for({file}, 8, 300), rows = packed;
    rows.layout = DataLayout::rows;

    write_text(manifest, manifest_text(300, "rows", "8", "s_train_0.bin", 96));
    auto m = load_manifest(folder.path.string());
    REQUIRE(m);
    CHECK(m->vocab_size == 300);
    CHECK(m->eos_id == 1);
    CHECK(m->pad_id == 0);
    CHECK(m->layout == DataLayout::rows);
    CHECK(m->seq_len == 8);
    CHECK(m->tokenizer_kind == "sentencepiece");
    CHECK(m->tokenizer_path == folder / "spiece.model");
    REQUIRE(m->splits.at("train").size() == 1);
    CHECK(m->splits.at("train")[0].tokens == 96);
    CHECK(m->splits.at("train")[0].documents == 3);
    {
        TokenDataset data(rows);  // the padding's id comes from the manifest: token 0, which is no target anywhere
        REQUIRE(data.manifest());
        CHECK(data.manifest()->vocab_size == 300);
        CHECK(data.samples() == 12);
    }
    check_user_error(open(packed), {manifest, "layout rows", "packed"});
    DataOptions longer = rows;
    longer.seq_len = 16;
    check_user_error(open(longer), {manifest, "8 tokens long", "16"});
    DataOptions smaller = rows;
    smaller.vocab = 299;
    check_user_error(open(smaller), {manifest, "300", "299"});

    write_text(manifest, manifest_text(300, "packed", "null", "s_train_0.bin", 97));
    check_user_error(open(packed), {manifest, file, "97", "96"});
    write_text(manifest, manifest_text(300, "packed", "null", "other.bin", 96));
    check_user_error(open(packed), {manifest, "does not list", file});
    write_text(manifest, "{\"format_version\": 2}");
    check_user_error(open(packed), {manifest, "format_version 2"});
    write_text(manifest, "{\"format_version\": 1}");
    check_user_error(open(packed), {manifest, "vocab_size"});
    write_text(manifest, "{ nonsense");
    check_user_error(open(packed), {manifest, "tokenize again"});
    std::string bytes = manifest_text(259, "packed", "null", "s_train_0.bin", 96);
    bytes.replace(bytes.find("\"spiece.model\""), 14, "null");
    write_text(manifest, bytes);
    CHECK(TokenDataset(packed).manifest()->tokenizer_path.empty());
}

#include "runtime/data.h"

#include <fcntl.h>
#include <glob.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "runtime/philox.h"

namespace fs = std::filesystem;

namespace {

constexpr size_t kHeaderBytes = 1024;
constexpr size_t kQueuedBatches = 3;  // enough to hide a page fault, little enough to cost no memory
constexpr uint64_t kCheckedSamples = 32;

[[noreturn]] void user_error(const std::string& message) { throw UserError(message); }

std::vector<std::string> match(const std::string& pattern) {
    glob_t found;
    int status = ::glob(pattern.c_str(), 0, nullptr, &found);
    std::vector<std::string> paths;
    if (status == 0) paths.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);  // sorted by glob
    ::globfree(&found);
    return paths;
}

std::vector<std::string> expand(const DataOptions& options) {
    if (options.paths.empty()) user_error(format("data: no %s shards given: name files, a glob pattern or a folder", options.split.c_str()));
    std::vector<std::string> files;
    for (const std::string& path : options.paths) {
        std::vector<std::string> found;
        if (fs::is_directory(path)) {
            for (const auto& entry : fs::directory_iterator(path)) {
                std::string name = entry.path().filename().string();
                bool is_shard = name.size() > 4 && name.compare(name.size() - 4, 4, ".bin") == 0;
                if (is_shard && name.find(options.split) != std::string::npos) found.push_back(entry.path().string());
            }
            std::sort(found.begin(), found.end());
            if (found.empty()) user_error(format("data: %s: the folder has no *%s*.bin: make shards with data/tokenize.py (data/README.md)", path.c_str(), options.split.c_str()));
        } else if (fs::exists(path)) {
            found = {path};
        } else {
            found = match(path);
            if (found.empty()) user_error(format("data: no %s shard matches %s: check the path, or make shards with data/tokenize.py (data/README.md)", options.split.c_str(), path.c_str()));
        }
        files.insert(files.end(), found.begin(), found.end());
    }
    return files;
}

}  // namespace

DataLayout data_layout(const std::string& name) {
    if (name == "packed") return DataLayout::packed;
    if (name == "rows") return DataLayout::rows;
    user_error(format("data layout '%s': must be packed or rows", name.c_str()));
}

const char* name_of(DataLayout layout) { return layout == DataLayout::packed ? "packed" : "rows"; }

// ---- Manifest ----

std::optional<Manifest> load_manifest(const std::string& folder) {
    using nlohmann::json;
    fs::path path = fs::path(folder) / "manifest.json";
    std::ifstream in(path);
    if (!in) return std::nullopt;
    Manifest m;
    m.path = path.string();
    try {
        json j = json::parse(in);
        int64_t version = j.at("format_version").get<int64_t>();
        if (version != 1) user_error(format("%s: format_version %lld, this program reads 1: tokenize again with its data/tokenize.py", m.path.c_str(), (long long)version));
        auto id = [&](const char* key) { return j.at(key).is_null() ? -1 : j.at(key).get<int64_t>(); };
        m.vocab_size = j.at("vocab_size").get<int64_t>();
        m.eos_id = id("eos_id"), m.pad_id = id("pad_id");
        const json& tokenizer = j.at("tokenizer");
        m.tokenizer_kind = tokenizer.at("kind").get<std::string>();
        if (!tokenizer.at("file").is_null()) m.tokenizer_path = (fs::path(folder) / tokenizer.at("file").get<std::string>()).string();
        m.layout = data_layout(j.at("layout").get<std::string>());
        m.seq_len = j.at("seq_len").is_null() ? 0 : j.at("seq_len").get<int64_t>();
        for (const auto& [split, value] : j.at("splits").items())
            for (const json& shard : value.at("shards"))
                m.splits[split].push_back({shard.at("file").get<std::string>(), shard.at("tokens").get<int64_t>(), shard.at("documents").get<int64_t>()});
    } catch (const json::exception& e) {
        user_error(format("%s: not a manifest of data/tokenize.py (%s): tokenize again, or delete it", m.path.c_str(), e.what()));
    }
    return m;
}

void TokenDataset::check_manifests() {
    std::map<std::string, std::optional<Manifest>> manifests;
    for (size_t i = 0; i < files_.size(); ++i) {
        fs::path file(files_[i]);
        std::string folder = file.has_parent_path() ? file.parent_path().string() : ".";
        auto [entry, is_new] = manifests.try_emplace(folder);
        if (is_new) {
            entry->second = load_manifest(folder);
            if (i == 0) manifest_ = entry->second;
        }
        if (!entry->second) continue;
        const Manifest& m = *entry->second;
        const char* path = m.path.c_str();
        if (m.vocab_size > options_.vocab)
            user_error(format("%s: the shards use a vocabulary of %lld tokens, the model has %lld: raise the model's vocabulary or tokenize with another tokenizer", path, (long long)m.vocab_size, (long long)options_.vocab));
        if (m.layout != options_.layout)
            user_error(format("%s: the shards have layout %s, the config says %s: change data.layout or tokenize with --layout %s", path, name_of(m.layout), name_of(options_.layout), name_of(options_.layout)));
        if (m.layout == DataLayout::rows && m.seq_len != options_.seq_len)
            user_error(format("%s: the rows are %lld tokens long, the sequence length is %lld: set it to %lld or tokenize with --seq-len %lld", path, (long long)m.seq_len, (long long)options_.seq_len, (long long)m.seq_len, (long long)options_.seq_len));
        if (options_.pad_id < 0) options_.pad_id = m.pad_id;
        int64_t listed = -1;
        for (const auto& split : m.splits)
            for (const Manifest::Shard& shard : split.second)
                if (shard.file == file.filename().string()) listed = shard.tokens;
        if (listed < 0) user_error(format("%s: does not list %s, a shard of another run: delete that file or move it to a folder of its own", path, files_[i].c_str()));
        if (listed != shards_[i].tokens)
            user_error(format("%s: %s should hold %lld tokens, it holds %lld: tokenize again", path, files_[i].c_str(), (long long)listed, (long long)shards_[i].tokens));
    }
}

// ---- Dataset ----

TokenDataset::Shard TokenDataset::open_shard(const std::string& file) const {
    const char* name = file.c_str();
    auto failed = [&](const char* what) { user_error(format("%s: cannot %s: %s", name, what, std::strerror(errno))); };
    int fd = ::open(name, O_RDONLY | O_CLOEXEC);
    if (fd < 0) failed("open the shard");
    struct stat info {};
    bool known = ::fstat(fd, &info) == 0;
    Shard shard;
    shard.bytes = known ? size_t(info.st_size) : 0;
    if (!known || !S_ISREG(info.st_mode) || shard.bytes < kHeaderBytes) {
        ::close(fd);
        user_error(format("%s: %zu bytes, not a token shard (its header alone has 1024): make shards with data/tokenize.py", name, shard.bytes));
    }
    void* map = ::mmap(nullptr, shard.bytes, PROT_READ, MAP_SHARED, fd, 0);
    int error = errno;
    ::close(fd);  // the map stays; thousands of shards need no thousands of descriptors
    errno = error;
    if (map == MAP_FAILED) failed("map the shard");
    shard.map = static_cast<const char*>(map);

    int32_t magic, version;
    uint32_t count;
    std::memcpy(&magic, shard.map, 4), std::memcpy(&version, shard.map + 4, 4), std::memcpy(&count, shard.map + 8, 4);
    std::string problem;
    int expected_version = magic == 20240520 ? 1 : 7;
    shard.token_bytes = magic == 20240520 ? 2 : 4;
    shard.tokens = count;
    size_t expected_bytes = kHeaderBytes + size_t(count) * shard.token_bytes;
    if (magic != 20240520 && magic != 20240801)
        problem = format("magic number %d, not a token shard (20240520 or 20240801): make shards with data/tokenize.py", magic);
    else if (version != expected_version)
        problem = format("version %d of a format whose version %d is known: make shards with data/tokenize.py", version, expected_version);
    else if (shard.bytes != expected_bytes)
        problem = format("%s: %zu bytes, the header's %u tokens need %zu: fetch or make it again", shard.bytes < expected_bytes ? "truncated" : "too long", shard.bytes, count, expected_bytes);
    else if (options_.layout == DataLayout::rows && shard.tokens % options_.seq_len != 0)
        problem = format("%u tokens are no whole number of rows of %lld: tokenize with --layout rows --seq-len %lld, or set data.layout to packed", count, (long long)options_.seq_len, (long long)options_.seq_len);
    if (!problem.empty()) {
        ::munmap(map, shard.bytes);
        user_error(file + ": " + problem);
    }
    ::madvise(map, shard.bytes, MADV_RANDOM);  // shuffled reads: readahead would fetch what nobody asks for
    return shard;
}

TokenDataset::TokenDataset(const DataOptions& options) : options_(options) {
    if (options.seq_len < 1) user_error(format("sequence length %lld: must be at least 1", (long long)options.seq_len));
    files_ = expand(options);
    try {
        first_sample_ = {0};
        int64_t longest = 0;
        for (const std::string& file : files_) {
            shards_.push_back(open_shard(file));
            int64_t n = shards_.back().tokens, seq = options_.seq_len;
            longest = std::max(longest, n);
            uint64_t samples = options_.layout == DataLayout::rows ? n / seq : n > 0 ? (n - 1) / seq : 0;
            first_sample_.push_back(first_sample_.back() + samples);
        }
        check_manifests();
        if (options_.layout == DataLayout::rows && options_.pad_id < 0)
            user_error(format("%s: layout rows needs the id of the padding token: set data.pad_id (there is no manifest.json that tells it)", files_[0].c_str()));
        if (samples() == 0)
            user_error(format("%s%s: no sample of sequence length %lld (%lld tokens in the longest shard, %lld needed): give more text or a shorter length", files_[0].c_str(),
                              files_.size() > 1 ? format(" and %zu more", files_.size() - 1).c_str() : "", (long long)options_.seq_len, (long long)longest,
                              (long long)options_.seq_len + (options_.layout == DataLayout::packed)));
        std::vector<int32_t> scratch(2 * options_.seq_len);
        uint64_t checked = std::min(samples(), kCheckedSamples);
        for (uint64_t i = 0; i < checked; ++i) {
            uint64_t spread = checked > 1 ? uint64_t((unsigned __int128)(samples() - 1) * i / (checked - 1)) : 0;  // the first and the last are in
            read_sample(spread, scratch.data(), scratch.data() + options_.seq_len);
        }
    } catch (...) {
        for (const Shard& shard : shards_) ::munmap(const_cast<char*>(shard.map), shard.bytes);
        throw;
    }
}

TokenDataset::~TokenDataset() {
    for (const Shard& shard : shards_) ::munmap(const_cast<char*>(shard.map), shard.bytes);
}

uint64_t TokenDataset::tokens() const {
    uint64_t total = 0;
    for (const Shard& shard : shards_) total += shard.tokens;
    return total;
}

int64_t TokenDataset::token(const Shard& shard, int64_t position) const {
    const char* p = shard.map + kHeaderBytes + position * shard.token_bytes;
    uint32_t wide = 0;
    uint16_t narrow;
    if (shard.token_bytes == 4) std::memcpy(&wide, p, 4);
    else std::memcpy(&narrow, p, 2), wide = narrow;
    if (int64_t(wide) >= options_.vocab)
        user_error(format("%s: token id %u at position %lld, the model's vocabulary has %lld: the shard belongs to another tokenizer", files_[&shard - shards_.data()].c_str(), wide,
                          (long long)position, (long long)options_.vocab));
    return wide;
}

int64_t TokenDataset::read_sample(uint64_t sample, int32_t* tokens, int32_t* targets) const {
    size_t s = std::upper_bound(first_sample_.begin(), first_sample_.end(), sample) - first_sample_.begin() - 1;
    const Shard& shard = shards_[s];
    int64_t seq = options_.seq_len, begin = int64_t(sample - first_sample_[s]) * seq, valid = 0;
    bool rows = options_.layout == DataLayout::rows;
    for (int64_t t = 0; t < seq; ++t) tokens[t] = int32_t(token(shard, begin + t));
    for (int64_t t = 0; t < seq; ++t) {
        int64_t target = t + 1 < seq ? tokens[t + 1] : rows ? -1 : token(shard, begin + seq);
        targets[t] = rows && target == options_.pad_id ? -1 : int32_t(target);
        valid += targets[t] >= 0;
    }
    return valid;
}

int64_t TokenDataset::read(uint64_t cursor, int32_t* tokens, int32_t* targets) const {
    uint64_t place = cursor % samples(), epoch = cursor / samples();
    return read_sample(options_.shuffle ? permuted_index(place, samples(), options_.seed, epoch) : place, tokens, targets);
}

// ---- Order ----

uint64_t permuted_index(uint64_t index, uint64_t n, uint64_t seed, uint64_t epoch) {
    constexpr uint32_t kRounds = 8;
    int half = 1;  // bits; the network permutes 0 .. 4^half - 1, at most four times n
    while (half < 32 && (uint64_t(1) << (2 * half)) < n) ++half;
    uint32_t mask = uint32_t((uint64_t(1) << half) - 1);
    do {
        uint32_t left = uint32_t(index >> half), right = uint32_t(index) & mask;
        for (uint32_t round = 0; round < kRounds; ++round) {
            uint32_t f = philox4x32(right, round ^ (uint32_t(epoch >> 32) << 8), uint32_t(epoch), 0x44415441u /* "DATA" */, uint32_t(seed), uint32_t(seed >> 32)).x[0];
            uint32_t next = left ^ (f & mask);
            left = right, right = next;
        }
        index = (uint64_t(left) << half) | right;
    } while (index >= n);
    return index;
}

// ---- Stream ----

BatchStream::BatchStream(const TokenDataset& dataset, uint64_t first, int64_t rows, uint64_t stride, uint64_t end)
    : dataset_(dataset), cursor_(first), stride_(stride ? stride : rows), end_(end), rows_(rows) {
    CHECK_INTERNAL(rows > 0, "rows %lld", (long long)rows);
    thread_ = std::thread([this] { run(); });
}

BatchStream::~BatchStream() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    changed_.notify_all();
    thread_.join();
}

Batch BatchStream::load(uint64_t first) const {
    Batch batch;
    batch.first_sample = first;
    batch.rows = int64_t(std::min(uint64_t(rows_), end_ - first));
    batch.seq = dataset_.seq_len();
    batch.tokens.resize(batch.rows * batch.seq), batch.targets.resize(batch.rows * batch.seq);
    for (int64_t r = 0; r < batch.rows; ++r)
        batch.valid_targets += dataset_.read(first + r, &batch.tokens[r * batch.seq], &batch.targets[r * batch.seq]);
    batch.groups = group_tokens(batch.tokens.data(), batch.rows * batch.seq, dataset_.vocab());
    return batch;
}

void BatchStream::run() {
    try {
        while (cursor_ < end_) {
            Batch batch = load(cursor_);
            std::unique_lock<std::mutex> lock(mutex_);
            changed_.wait(lock, [this] { return stop_ || ready_.size() < kQueuedBatches; });
            if (stop_) return;
            ready_.push_back(std::move(batch));
            changed_.notify_all();
            cursor_ += stride_;
        }
    } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        error_ = std::current_exception();
    }
    std::lock_guard<std::mutex> lock(mutex_);
    finished_ = true;
    changed_.notify_all();
}

Batch BatchStream::next() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return !ready_.empty() || finished_; });
    if (ready_.empty()) {
        if (error_) std::rethrow_exception(error_);
        Batch empty;
        empty.seq = dataset_.seq_len();
        empty.first_sample = end_;
        return empty;
    }
    Batch batch = std::move(ready_.front());
    ready_.pop_front();
    changed_.notify_all();
    return batch;
}

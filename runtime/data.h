// Token shards (llm.c format) as a shuffled, resumable stream of micro-batches.
//   Shard: 256 little-endian int32 of header, then the tokens. header[0..2] = magic, version, token count:
//   20240520, 1 for uint16 tokens; 20240801, 7 for uint32 tokens.
// A sample is addressed by a global cursor g that counts samples since the start of training: epoch g / samples, place g % samples.
// What the cursor reads is a pure function of (shards, seed, g), so a checkpoint needs to keep only g.
#pragma once
#include <condition_variable>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "ops/embedding.h"

enum class DataLayout {
    packed,  // documents end to end; a sample is seq_len + 1 consecutive tokens of one shard, at offset i * seq_len
    rows,    // one padded document per seq_len tokens; targets that are padding, and a row's last, are masked
};
DataLayout data_layout(const std::string& name);  // "packed" or "rows", else UserError
const char* name_of(DataLayout layout);

// manifest.json, which data/tokenize.py writes next to the shards.
struct Manifest {
    struct Shard {
        std::string file;  // name within the folder
        int64_t tokens = 0, documents = 0;
    };
    std::string path;
    int64_t vocab_size = 0, eos_id = -1, pad_id = -1;  // -1: the tokenizer has none
    std::string tokenizer_kind;                        // "bytes", "sentencepiece" or "hf"
    std::string tokenizer_path;                        // empty for bytes
    DataLayout layout = DataLayout::packed;
    int64_t seq_len = 0;  // of rows; 0 if packed
    std::map<std::string, std::vector<Shard>> splits;
};
// nullopt where the folder has no manifest.json; UserError where it cannot be understood.
std::optional<Manifest> load_manifest(const std::string& folder);

// Element `index` of a permutation of 0..n-1 that depends on (seed, epoch) only: a Feistel network with Philox as round
// function on the next power of four, walking the cycle until it is back below n (Black and Rogaway 2002). n ≥ 1, index < n.
uint64_t permuted_index(uint64_t index, uint64_t n, uint64_t seed, uint64_t epoch);

struct DataOptions {
    std::vector<std::string> paths;  // files, glob patterns, or folders (there: all *SPLIT*.bin); a file named twice counts twice
    std::string split = "train";     // SPLIT of folders, and the name used in messages
    DataLayout layout = DataLayout::packed;
    int64_t seq_len = 0;
    int64_t vocab = 0;    // of the model: every token id must be below
    int64_t pad_id = -1;  // rows: the padding; -1 takes the manifest's
    bool shuffle = true;  // false: samples in the order of the shards, every epoch
    uint64_t seed = 0;
};

// Memory-mapped shards. Samples never cross from one shard into the next; a shard too small for a sample is passed over.
class TokenDataset {
  public:
    // Opens and checks every shard and its manifest, and reads a spread of samples. UserError: no match, not a shard, truncated,
    // other vocabulary, layout or length than the manifest's, no sample at all.
    explicit TokenDataset(const DataOptions& options);
    ~TokenDataset();
    TokenDataset(const TokenDataset&) = delete;

    uint64_t samples() const { return first_sample_.back(); }  // per epoch
    uint64_t tokens() const;                                   // in all shards
    int64_t seq_len() const { return options_.seq_len; }
    int64_t vocab() const { return options_.vocab; }
    const std::vector<std::string>& files() const { return files_; }
    const std::optional<Manifest>& manifest() const { return manifest_; }  // of the first shard's folder

    // Tokens and targets (next token; -1 = masked) of the sample at a cursor, seq_len each. Returns the number of unmasked
    // targets. UserError on a token id that the vocabulary does not have.
    int64_t read(uint64_t cursor, int32_t* tokens, int32_t* targets) const;

  private:
    struct Shard {
        const char* map = nullptr;
        size_t bytes = 0;
        int64_t tokens = 0;
        int token_bytes = 0;
    };
    Shard open_shard(const std::string& file) const;
    void check_manifests();
    int64_t token(const Shard& shard, int64_t position) const;
    int64_t read_sample(uint64_t sample, int32_t* tokens, int32_t* targets) const;

    DataOptions options_;
    std::vector<std::string> files_;
    std::vector<Shard> shards_;
    std::vector<uint64_t> first_sample_;  // [shards + 1]
    std::optional<Manifest> manifest_;
};

struct Batch {
    int64_t rows = 0, seq = 0;
    std::vector<int32_t> tokens, targets;  // [rows * seq], row-major
    int64_t valid_targets = 0;
    uint64_t first_sample = 0;  // cursor of row 0; row r is cursor first_sample + r
    TokenGroups groups;
};

// Micro-batches of consecutive cursors, prepared ahead by one thread. The dataset must outlive the stream.
class BatchStream {
  public:
    // Batch k holds cursors first + k * stride + [0, rows), below `end`. stride 0 means rows; a rank of a larger world takes
    // first = cursor + rank * rows and stride = world * rows. Evaluation reads [0, samples) with end = samples().
    BatchStream(const TokenDataset& dataset, uint64_t first, int64_t rows, uint64_t stride = 0, uint64_t end = UINT64_MAX);
    ~BatchStream();
    BatchStream(const BatchStream&) = delete;

    // The next batch. The one that meets `end` is smaller; after it they have 0 rows. Rethrows what the thread ran into.
    Batch next();

  private:
    void run();
    Batch load(uint64_t first) const;

    const TokenDataset& dataset_;
    uint64_t cursor_, stride_, end_;
    int64_t rows_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Batch> ready_;
    std::exception_ptr error_;
    bool stop_ = false, finished_ = false;
    std::thread thread_;
};

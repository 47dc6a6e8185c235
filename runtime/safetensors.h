// The safetensors file format: 8-byte little-endian length, JSON header padded with spaces, raw little-endian data.
// https://huggingface.co/docs/safetensors: tensors lie end to end without holes; "__metadata__" maps strings to strings.
//
// Files we write also carry checksums, as ordinary metadata that other readers ignore:
//   "crc32.<tensor>": CRC-32 of the tensor's bytes, eight lower-case hex digits (the same as zlib.crc32)
//   "crc32":          the first key of the file: CRC-32 of length and header, with these eight digits taken as 00000000
// so that a flipped byte anywhere in the file is found.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "runtime/crc32.h"
#include "runtime/files.h"
#include "runtime/tensor.h"

struct SafetensorsEntry {
    std::string name;
    std::string dtype;           // as in the file: "F32", "BF16", …
    std::vector<int64_t> shape;  // outermost first; empty = a scalar
    int64_t offset = 0, bytes = 0;  // place in the file
    std::string crc;             // hex digits; empty if the file carries none

    int64_t numel() const;
};

// "[2, 3]"
std::string shape_text(const std::vector<int64_t>& shape);

// Writes a file atomically (see AtomicFile), tensor by tensor, without ever holding more than a chunk.
class SafetensorsWriter {
  public:
    struct Item {
        std::string name;
        DType dtype;
        std::vector<int64_t> shape;
    };
    // Every tensor of the file, in the order they will be written. Metadata keys starting with "crc32" are reserved.
    // Throws UserError if the disk lacks the room.
    SafetensorsWriter(const std::string& path, const std::vector<Item>& items, const std::map<std::string, std::string>& metadata);
    // The next bytes of the named tensor, which must be the first unfinished one; chunks of any size.
    void write(const std::string& name, const void* data, int64_t bytes);
    // Completes the file and gives it its name. Every tensor must have been written.
    void finish();

  private:
    struct Slot {
        std::string name;
        int64_t offset, bytes, crc_position;  // in the file; in the header text
    };
    void close_tensor();

    std::vector<Slot> slots_;
    std::string header_;  // length and JSON, checksums filled in as tensors are completed
    int64_t file_bytes_ = 0;
    size_t current_ = 0;
    int64_t written_ = 0;  // bytes of the current tensor
    Crc32 crc_;
    std::unique_ptr<AtomicFile> file_;
};

// Reads any safetensors file. Everything wrong with the file is a UserError that names it, the fault and the remedy.
class SafetensorsReader {
  public:
    // Opens the file and checks the header: lengths, bounds, holes, overlaps, types, sizes, and the header's checksum if there is one.
    explicit SafetensorsReader(const std::string& path);
    ~SafetensorsReader();
    SafetensorsReader(const SafetensorsReader&) = delete;

    const std::string& path() const { return path_; }
    const std::vector<SafetensorsEntry>& entries() const { return entries_; }  // in file order
    const std::map<std::string, std::string>& metadata() const { return metadata_; }  // without the checksums
    bool checksummed() const { return checksummed_; }
    const SafetensorsEntry* find(const std::string& name) const;    // null if absent
    const SafetensorsEntry& entry(const std::string& name) const;   // UserError if absent

    // The whole tensor into dst (bytes must be its size), checksum verified.
    void read(const std::string& name, void* dst, int64_t bytes) const;
    // Elements [first, first + count) as fp32, converted from F64, F32, BF16 or F16. Checksums are not consulted: see verify().
    void read_floats(const std::string& name, std::vector<float>& out, int64_t first, int64_t count) const;
    // Reads the whole file once and throws UserError, naming the tensor, if a checksum is wrong. Without checksums: does nothing.
    void verify() const;

  private:
    friend class SafetensorsStream;
    [[noreturn]] void damaged(const std::string& how) const;
    void read_at(int64_t offset, void* dst, int64_t bytes) const;
    void parse_header(const std::string& text, int64_t data_begin, int64_t data_bytes);

    std::string path_;
    int fd_ = -1;
    std::vector<SafetensorsEntry> entries_;
    std::map<std::string, size_t> index_;
    std::map<std::string, std::string> metadata_;
    bool checksummed_ = false;
};

// Reads one tensor from its first byte to its last in pieces of any size, for tensors too large to hold at once.
class SafetensorsStream {
  public:
    SafetensorsStream(const SafetensorsReader& file, const std::string& name) : file_(file), entry_(file.entry(name)) {}
    void next(void* dst, int64_t bytes);
    int64_t remaining() const { return entry_.bytes - done_; }
    // After the last byte: UserError if the tensor's checksum is wrong.
    void finish();

  private:
    const SafetensorsReader& file_;
    const SafetensorsEntry& entry_;
    int64_t done_ = 0;
    Crc32 crc_;
};

// The weights of a Hugging Face directory: model.safetensors, or the shards that model.safetensors.index.json lists.
class SafetensorsModel {
  public:
    explicit SafetensorsModel(const std::string& directory);
    std::vector<std::string> names() const;
    bool has(const std::string& name) const { return file_of_.count(name) != 0; }
    // The file that holds a tensor; UserError if there is none.
    const SafetensorsReader& file_of(const std::string& name) const;
    const SafetensorsEntry& entry(const std::string& name) const { return file_of(name).entry(name); }
    void verify() const;

  private:
    std::string directory_;
    std::vector<std::unique_ptr<SafetensorsReader>> files_;
    std::map<std::string, const SafetensorsReader*> file_of_;
};

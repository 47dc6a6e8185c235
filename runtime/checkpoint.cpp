// Checkpoints. See checkpoint.h.
#include "runtime/checkpoint.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "runtime/safetensors.h"

namespace fs = std::filesystem;

namespace {

constexpr int64_t kBuffer = 16 << 20;

// Calls piece(part, packed_bytes) for parts of t that each fit the host buffer: runs of elements if t is packed, else whole rows.
template <class Piece> void for_pieces(const Tensor& t, Piece piece) {
    const int64_t width = size_of(t.dtype);
    if (t.ld == t.cols) {
        const int64_t step = kBuffer / width;
        for (int64_t i = 0; i < t.numel(); i += step) {
            int64_t n = std::min(step, t.numel() - i);
            piece(Tensor{static_cast<char*>(t.data) + i * width, t.dtype, 1, n, n});
        }
        return;
    }
    const int64_t step = std::max<int64_t>(1, kBuffer / (t.ld * width));
    for (int64_t r = 0; r < t.rows; r += step) piece(t.row_slice(r, std::min(step, t.rows - r)));
}

// Drops the padding of `rows` rows in place: row r moves from r·from to r·to bytes (to ≤ from).
void pack_rows(char* data, int64_t rows, int64_t from, int64_t to) {
    for (int64_t r = 1; r < rows && from != to; ++r) std::memmove(data + r * to, data + r * from, size_t(to));
}

// The reverse, last row first, with zeros as padding.
void unpack_rows(char* data, int64_t rows, int64_t from, int64_t to) {
    for (int64_t r = rows - 1; r >= 0 && from != to; --r) {
        std::memmove(data + r * to, data + r * from, size_t(from));
        std::memset(data + r * to + from, 0, size_t(to - from));
    }
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

// The config keys that give this tensor its shape.
const char* keys_behind(const std::string& name) {
    if (contains(name, ".P") || contains(name, ".A") || contains(name, ".B") || contains(name, ".projected")) return "method.rank, model.hidden or model.intermediate";
    if (contains(name, "embed_tokens") || contains(name, "lm_head")) return "model.vocab or model.hidden";
    if (contains(name, "_proj") && contains(name, "mlp.")) return "model.intermediate or model.hidden";
    if (contains(name, "k_proj") || contains(name, "v_proj")) return "model.kv_heads or model.hidden";
    return "model.hidden";
}

bool convertible(const std::string& from, DType to) { return (from == "BF16" && to == DType::f32) || (from == "F32" && to == DType::bf16); }

void check_same_tensors(const SafetensorsReader& file, const std::vector<CheckpointTensor>& tensors, LoadMode mode) {
    const char* remedy = "resume with the config.json of the run that wrote it";
    std::set<std::string> wanted;
    for (const CheckpointTensor& t : tensors) {
        wanted.insert(t.name);
        const SafetensorsEntry* e = file.find(t.name);
        if (!e)
            throw UserError("checkpoint " + file.path() + " has no tensor " + t.name +
                            ": it was written with other model.layers, method or optimizer.moments; " + remedy);
        if (e->shape != t.shape)
            throw UserError("checkpoint " + file.path() + " is of another shape: " + t.name + " is " + shape_text(e->shape) + " there and " + shape_text(t.shape) +
                            " here (" + keys_behind(t.name) + "); " + remedy);
        if (e->dtype != safetensors_name(t.tensor.dtype) && !(mode == LoadMode::weights && convertible(e->dtype, t.tensor.dtype)))
            throw UserError("checkpoint " + file.path() + " has another data type: " + t.name + " is " + e->dtype + " there and " +
                            safetensors_name(t.tensor.dtype) + " here (run.device, optimizer.moments or method); " + remedy);
    }
    if (mode == LoadMode::weights) return;
    for (const SafetensorsEntry& e : file.entries())
        if (!wanted.count(e.name))
            throw UserError("checkpoint " + file.path() + " has a tensor this run lacks: " + e.name + " " + shape_text(e.shape) +
                            ": it was written with other model.layers, method or optimizer.moments; " + remedy);
}

void require_checksums(const SafetensorsReader& file) {
    if (!file.checksummed()) throw UserError(file.path() + " is damaged or no checkpoint: it has no checksums; use another checkpoint");
}

// The stream's next piece.numel() values, stored as the other of bf16 and f32, into buffer as piece.dtype.
void next_converted(SafetensorsStream& stream, char* buffer, const Tensor& piece) {
    if (piece.dtype == DType::f32) {
        std::vector<bf16> stored(piece.numel());
        stream.next(stored.data(), piece.numel() * 2);
        for (int64_t i = 0; i < piece.numel(); ++i) reinterpret_cast<float*>(buffer)[i] = to_float(stored[i]);
    } else {
        std::vector<float> stored(piece.numel());
        stream.next(stored.data(), piece.numel() * 4);
        for (int64_t i = 0; i < piece.numel(); ++i) reinterpret_cast<bf16*>(buffer)[i] = to_bf16(stored[i]);
    }
}

// Empty if every byte verifies, else what is wrong.
std::string fault_of(const std::string& path) {
    try {
        SafetensorsReader file(path);
        require_checksums(file);
        file.verify();
        return "";
    } catch (const UserError& error) {
        return error.what();
    }
}

}  // namespace

void save_checkpoint(Device& device, const std::string& path, const std::vector<CheckpointTensor>& tensors, const Metadata& metadata) {
    std::string parent = fs::path(path).parent_path().string();
    if (!parent.empty()) make_directories(parent);
    std::vector<SafetensorsWriter::Item> items;
    int64_t buffer_bytes = kBuffer;
    for (const CheckpointTensor& t : tensors) {
        int64_t product = 1;
        for (int64_t n : t.shape) product *= n;
        CHECK_INTERNAL(product == t.tensor.numel(), "%s: shape %s for %lld elements", t.name.c_str(), shape_text(t.shape).c_str(), (long long)t.tensor.numel());
        items.push_back({t.name, t.tensor.dtype, t.shape});
        if (t.tensor.ld != t.tensor.cols) buffer_bytes = std::max(buffer_bytes, t.tensor.ld * size_of(t.tensor.dtype));
    }
    SafetensorsWriter file(path, items, metadata);
    std::vector<char> buffer(static_cast<size_t>(buffer_bytes));
    for (const CheckpointTensor& t : tensors)
        for_pieces(t.tensor, [&](const Tensor& piece) {
            int64_t width = size_of(piece.dtype);
            device.download(buffer.data(), piece.data, piece.bytes());
            pack_rows(buffer.data(), piece.rows, piece.ld * width, piece.cols * width);
            file.write(t.name, buffer.data(), piece.numel() * width);
        });
    file.finish();
}

Metadata load_checkpoint(Device& device, const std::string& path, const std::vector<CheckpointTensor>& tensors, LoadMode mode) {
    SafetensorsReader file(path);
    require_checksums(file);
    check_same_tensors(file, tensors, mode);
    std::vector<char> buffer;
    for (const CheckpointTensor& t : tensors) {
        SafetensorsStream stream(file, t.name);
        for_pieces(t.tensor, [&](const Tensor& piece) {
            int64_t width = size_of(piece.dtype);
            buffer.resize(size_t(std::max<int64_t>(int64_t(buffer.size()), piece.bytes())));
            if (file.find(t.name)->dtype == safetensors_name(piece.dtype)) stream.next(buffer.data(), piece.numel() * width);
            else next_converted(stream, buffer.data(), piece);
            unpack_rows(buffer.data(), piece.rows, piece.cols * width, piece.ld * width);
            device.upload(piece.data, buffer.data(), piece.bytes());
        });
        stream.finish();
    }
    return file.metadata();
}

Metadata checkpoint_metadata(const std::string& path) {
    SafetensorsReader file(path);
    require_checksums(file);
    return file.metadata();
}

std::string checkpoint_folder(const std::string& run_directory) { return (fs::path(run_directory) / "checkpoints").string(); }

std::string checkpoint_path(const std::string& directory, int64_t step) { return format("%s/step-%08lld.safetensors", directory.c_str(), (long long)step); }

std::vector<CheckpointFile> list_checkpoints(const std::string& directory) {
    std::vector<CheckpointFile> found;
    if (!fs::exists(directory)) return found;
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(directory, error)) {
        long long step = 0;
        std::string path = directory + "/" + entry.path().filename().string();
        // The name must be the one we would give: no temporaries, no copies.
        if (std::sscanf(entry.path().filename().c_str(), "step-%lld", &step) == 1 && step >= 0 && path == checkpoint_path(directory, step)) found.push_back({path, step});
    }
    if (error) throw_file_error("read directory", directory, error.value());
    std::sort(found.begin(), found.end(), [](const CheckpointFile& a, const CheckpointFile& b) { return a.step < b.step; });
    return found;
}

std::optional<CheckpointFile> find_newest_valid(const std::string& directory, std::vector<std::string>* skipped_with_reason) {
    std::vector<CheckpointFile> files = list_checkpoints(directory);
    for (auto file = files.rbegin(); file != files.rend(); ++file) {
        std::string fault = fault_of(file->path);
        if (fault.empty()) return *file;
        if (skipped_with_reason) skipped_with_reason->push_back(fault);
    }
    return std::nullopt;
}

std::vector<std::string> prune_checkpoints(const std::string& directory, int64_t keep_last, int64_t keep_every, std::set<std::string>* trusted) {
    if (keep_last < 1) throw UserError(format("checkpoint.keep_last is %lld; keep at least 1", (long long)keep_last));
    remove_abandoned_temporaries(directory);
    std::set<std::string> own_trust;
    if (!trusted) trusted = &own_trust;
    std::vector<std::string> deleted;
    std::vector<CheckpointFile> files = list_checkpoints(directory);
    std::reverse(files.begin(), files.end());
    auto spared = [&](const CheckpointFile& file) { return keep_every > 0 && file.step % keep_every == 0; };
    // Nothing could be deleted: spare the reading.
    if (int64_t(files.size()) <= keep_last || std::all_of(files.begin() + keep_last, files.end(), spared)) return deleted;

    size_t kept = 0;
    for (int64_t good = 0; kept < files.size() && good < keep_last; ++kept) {
        const std::string& path = files[kept].path;
        if (!trusted->count(path) && !fault_of(path).empty()) continue;
        trusted->insert(path);
        ++good;
    }
    for (size_t i = kept; i < files.size(); ++i) {
        if (spared(files[i])) continue;
        if (unlink(files[i].path.c_str()) < 0) throw_file_error("delete", files[i].path, errno);
        trusted->erase(files[i].path);
        deleted.push_back(files[i].path);
    }
    return deleted;
}

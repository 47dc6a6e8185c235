// The safetensors format. See safetensors.h.
#include "runtime/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>

using nlohmann::json;

namespace {

constexpr int64_t kMaxHeader = 100000000;  // the limit of the reference implementation
constexpr int64_t kChunk = 4 << 20;
constexpr int64_t kConversionChunk = 1 << 18;
// How a file with checksums begins, after the 8 bytes of length; eight hex digits follow.
const std::string kChecksumStart = "{\"__metadata__\":{\"crc32\":\"";
const int64_t kHeaderCrcPosition = 8 + int64_t(kChecksumStart.size());
const std::string kNoCrc = "00000000";

std::string hex(uint32_t crc) { return format("%08x", crc); }

std::string quoted(const std::string& text) { return json(text).dump(-1, ' ', false, json::error_handler_t::replace); }

// Bytes per element of a type the format knows; 0 for others.
int64_t element_bytes(const std::string& dtype) {
    static const std::map<std::string, int64_t> sizes = {
        {"F64", 8}, {"I64", 8}, {"U64", 8}, {"F32", 4}, {"I32", 4}, {"U32", 4}, {"F16", 2}, {"BF16", 2},
        {"I16", 2}, {"U16", 2}, {"I8", 1}, {"U8", 1}, {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
    auto it = sizes.find(dtype);
    return it == sizes.end() ? 0 : it->second;
}

bool as_integer(const json& value, int64_t& out) {
    if (!value.is_number_unsigned() || value.get<uint64_t>() > uint64_t(INT64_MAX)) return false;
    out = value.get<int64_t>();
    return true;
}

float half_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
    if (exponent == 0) {  // zero or subnormal: mantissa · 2^-24, exact in fp32
        float magnitude = float(mantissa) * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    if (exponent == 31) return float_of_bits(sign | 0x7f800000u | (mantissa << 13));
    return float_of_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// raw: n elements of T; convert: T → float.
template <class T, class Convert> void convert_all(const char* raw, float* out, int64_t n, Convert convert) {
    for (int64_t i = 0; i < n; ++i) {
        T x;
        std::memcpy(&x, raw + i * int64_t(sizeof(T)), sizeof x);
        out[i] = convert(x);
    }
}

}  // namespace

int64_t SafetensorsEntry::numel() const { return std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<int64_t>()); }

std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

// ---- writer

SafetensorsWriter::SafetensorsWriter(const std::string& path, const std::vector<Item>& items, const std::map<std::string, std::string>& metadata) {
    // Wide elements first, so that every tensor is aligned for readers that map the file; the format allows no padding between them.
    std::vector<size_t> order(items.size());
    std::iota(order.begin(), order.end(), size_t(0));
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return size_of(items[a].dtype) > size_of(items[b].dtype); });
    slots_.resize(items.size());
    int64_t data_bytes = 0;
    for (size_t i : order) {
        int64_t bytes = size_of(items[i].dtype);
        for (int64_t n : items[i].shape) bytes *= n;
        slots_[i] = {items[i].name, data_bytes, bytes, 0};
        data_bytes += bytes;
    }

    std::set<std::string> names;
    std::string text = std::string(8, '\0') + kChecksumStart + kNoCrc + "\"";
    for (const auto& [key, value] : metadata) {
        CHECK_INTERNAL(key.rfind("crc32", 0) != 0, "metadata key %s is reserved", key.c_str());
        text += "," + quoted(key) + ":" + quoted(value);
    }
    for (Slot& slot : slots_) {
        CHECK_INTERNAL(slot.name != "__metadata__" && names.insert(slot.name).second, "tensor name %s is taken", slot.name.c_str());
        text += "," + quoted("crc32." + slot.name) + ":\"";
        slot.crc_position = int64_t(text.size());
        text += kNoCrc + "\"";
    }
    text += "}";
    for (size_t i = 0; i < items.size(); ++i) {
        std::string shape;
        for (int64_t n : items[i].shape) shape += (shape.empty() ? "" : ",") + std::to_string(n);
        text += "," + quoted(items[i].name) + ":{\"dtype\":\"" + safetensors_name(items[i].dtype) + "\",\"shape\":[" + shape + "],\"data_offsets\":[" +
                std::to_string(slots_[i].offset) + "," + std::to_string(slots_[i].offset + slots_[i].bytes) + "]}";
    }
    text += "}";
    text.resize(size_t(round_up(int64_t(text.size()), 8)), ' ');
    uint64_t length = text.size() - 8;
    CHECK_INTERNAL(int64_t(length) <= kMaxHeader, "header of %s would have %llu bytes", path.c_str(), (unsigned long long)length);
    std::memcpy(&text[0], &length, 8);

    header_ = std::move(text);
    for (Slot& slot : slots_) slot.offset += int64_t(header_.size());
    file_bytes_ = int64_t(header_.size()) + data_bytes;
    file_ = std::make_unique<AtomicFile>(path, file_bytes_);
    while (current_ < slots_.size() && slots_[current_].bytes == 0) close_tensor();
}

void SafetensorsWriter::close_tensor() {
    header_.replace(size_t(slots_[current_].crc_position), kNoCrc.size(), hex(crc_.value()));
    crc_ = Crc32();
    written_ = 0;
    ++current_;
}

void SafetensorsWriter::write(const std::string& name, const void* data, int64_t bytes) {
    if (bytes == 0) return;
    CHECK_INTERNAL(current_ < slots_.size() && slots_[current_].name == name, "%s is written out of order", name.c_str());
    const Slot& slot = slots_[current_];
    CHECK_INTERNAL(bytes <= slot.bytes - written_, "%s has %lld bytes, not %lld", name.c_str(), (long long)slot.bytes, (long long)(written_ + bytes));
    file_->write_at(slot.offset + written_, data, bytes);
    crc_.update(data, size_t(bytes));
    written_ += bytes;
    while (current_ < slots_.size() && written_ == slots_[current_].bytes) close_tensor();
}

void SafetensorsWriter::finish() {
    CHECK_INTERNAL(current_ == slots_.size(), "%s is incomplete", slots_[current_].name.c_str());
    header_.replace(size_t(kHeaderCrcPosition), kNoCrc.size(), hex(crc32(header_.data(), header_.size())));
    file_->write_at(0, header_.data(), int64_t(header_.size()));
    file_->commit();
}

// ---- reader

SafetensorsReader::SafetensorsReader(const std::string& path) : path_(path) {
    fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd_ < 0) throw_file_error("read", path, errno);
    try {
        struct stat status;
        if (fstat(fd_, &status) < 0) throw_file_error("read", path, errno);
        if (!S_ISREG(status.st_mode)) throw UserError(path + " is not a regular file; give the path of a safetensors file");
        int64_t size = status.st_size;
        if (size < 8) damaged(format("it has %lld bytes", (long long)size));
        uint64_t length = 0;
        read_at(0, &length, 8);
        if (length > uint64_t(size - 8) || length > uint64_t(kMaxHeader))
            damaged(format("its header claims %llu bytes and the file has %lld", (unsigned long long)length, (long long)size));
        std::string text(size_t(length) + 8, '\0');
        read_at(0, &text[0], int64_t(text.size()));

        checksummed_ = text.compare(8, kChecksumStart.size(), kChecksumStart) == 0 && text.size() >= size_t(kHeaderCrcPosition) + kNoCrc.size();
        if (checksummed_) {
            std::string stored = text.substr(size_t(kHeaderCrcPosition), kNoCrc.size());
            text.replace(size_t(kHeaderCrcPosition), kNoCrc.size(), kNoCrc);
            if (hex(crc32(text.data(), text.size())) != stored) damaged("the checksum of its header is wrong");
        }
        parse_header(text.substr(8), int64_t(text.size()), size - int64_t(text.size()));
    } catch (...) {
        close(fd_);
        throw;
    }
}

SafetensorsReader::~SafetensorsReader() { close(fd_); }

void SafetensorsReader::damaged(const std::string& how) const {
    throw UserError(path_ + " is damaged or no safetensors file: " + how + "; use another copy of it");
}

void SafetensorsReader::read_at(int64_t offset, void* dst, int64_t bytes) const {
    char* p = static_cast<char*>(dst);
    while (bytes > 0) {
        ssize_t n = pread(fd_, p, size_t(bytes), off_t(offset));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) throw_file_error("read", path_, errno);
        if (n == 0) damaged(format("it ends at byte %lld while being read", (long long)offset));
        p += n, offset += n, bytes -= n;
    }
}

void SafetensorsReader::parse_header(const std::string& text, int64_t data_begin, int64_t data_bytes) {
    json header = json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!header.is_object()) damaged("its header is not a JSON object");
    std::map<std::string, std::string> crcs;
    for (const auto& [name, value] : header.items()) {
        if (name == "__metadata__") {
            if (!value.is_object()) damaged("__metadata__ is not a JSON object");
            for (const auto& [key, text_value] : value.items()) {
                if (!text_value.is_string()) damaged("metadata " + key + " is not a string");
                bool reserved = key == "crc32" || key.rfind("crc32.", 0) == 0;
                if (reserved && !checksummed_) damaged("it has checksums but not the one of its header");
                if (!reserved) metadata_[key] = text_value.get<std::string>();
                else if (key != "crc32") crcs[key.substr(6)] = text_value.get<std::string>();
            }
            continue;
        }
        SafetensorsEntry entry;
        entry.name = name;
        bool well_formed = value.is_object() && value.contains("dtype") && value["dtype"].is_string() && value.contains("shape") && value["shape"].is_array() &&
                           value.contains("data_offsets") && value["data_offsets"].is_array() && value["data_offsets"].size() == 2;
        int64_t begin = 0, end = 0;
        if (!well_formed || !as_integer(value["data_offsets"][0], begin) || !as_integer(value["data_offsets"][1], end))
            damaged("tensor " + name + " has no proper dtype, shape and data_offsets");
        entry.dtype = value["dtype"].get<std::string>();
        int64_t expected = element_bytes(entry.dtype);
        if (expected == 0) damaged("tensor " + name + " has the unknown type " + entry.dtype);
        for (const json& n : value["shape"]) {
            int64_t size = 0;
            if (!as_integer(n, size) || __builtin_mul_overflow(expected, size, &expected)) damaged("tensor " + name + " has an impossible shape");
            entry.shape.push_back(size);
        }
        if (begin > end || end > data_bytes)
            damaged(format("tensor %s lies at bytes %lld to %lld of %lld", name.c_str(), (long long)begin, (long long)end, (long long)data_bytes));
        if (end - begin != expected)
            damaged(format("tensor %s of shape %s takes %lld bytes, not %lld", name.c_str(), shape_text(entry.shape).c_str(), (long long)expected,
                           (long long)(end - begin)));
        entry.offset = data_begin + begin;
        entry.bytes = expected;
        entries_.push_back(std::move(entry));
    }

    std::sort(entries_.begin(), entries_.end(), [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
        return std::make_pair(a.offset, a.bytes) < std::make_pair(b.offset, b.bytes);
    });
    int64_t end = data_begin;
    for (SafetensorsEntry& entry : entries_) {
        if (entry.offset != end) damaged("tensor " + entry.name + (entry.offset < end ? " overlaps another" : " follows a hole"));
        end += entry.bytes;
        index_[entry.name] = size_t(&entry - entries_.data());
        if (!checksummed_) continue;
        entry.crc = crcs[entry.name];
        if (entry.crc.empty()) damaged("tensor " + entry.name + " has no checksum");
    }
    if (end != data_begin + data_bytes) damaged(format("%lld bytes follow its last tensor", (long long)(data_begin + data_bytes - end)));
}

const SafetensorsEntry* SafetensorsReader::find(const std::string& name) const {
    auto it = index_.find(name);
    return it == index_.end() ? nullptr : &entries_[it->second];
}

const SafetensorsEntry& SafetensorsReader::entry(const std::string& name) const {
    const SafetensorsEntry* entry = find(name);
    if (!entry) throw UserError(path_ + " has no tensor " + name + "; it belongs to another kind of model or run");
    return *entry;
}

void SafetensorsReader::read(const std::string& name, void* dst, int64_t bytes) const {
    SafetensorsStream stream(*this, name);
    stream.next(dst, bytes);
    stream.finish();
}

void SafetensorsReader::read_floats(const std::string& name, std::vector<float>& out, int64_t first, int64_t count) const {
    const SafetensorsEntry& e = entry(name);
    CHECK_INTERNAL(first >= 0 && count >= 0 && count <= e.numel() - first, "elements %lld + %lld of %s", (long long)first, (long long)count, name.c_str());
    if (e.dtype != "F32" && e.dtype != "F64" && e.dtype != "BF16" && e.dtype != "F16")
        throw UserError(path_ + ": tensor " + name + " has type " + e.dtype + "; only F64, F32, BF16 and F16 can be read as weights");
    int64_t width = element_bytes(e.dtype);
    out.resize(size_t(count));
    std::vector<char> raw(size_t(std::min(count, kConversionChunk) * width));
    for (int64_t done = 0; done < count; done += kConversionChunk) {
        int64_t n = std::min(kConversionChunk, count - done);
        read_at(e.offset + (first + done) * width, raw.data(), n * width);
        float* dst = out.data() + done;
        if (e.dtype == "F32") std::memcpy(dst, raw.data(), size_t(n) * 4);
        else if (e.dtype == "F64") convert_all<double>(raw.data(), dst, n, [](double x) { return float(x); });
        else if (e.dtype == "BF16") convert_all<bf16>(raw.data(), dst, n, [](bf16 x) { return to_float(x); });
        else convert_all<uint16_t>(raw.data(), dst, n, half_to_float);
    }
}

void SafetensorsReader::verify() const {
    if (!checksummed_) return;
    std::vector<char> buffer(kChunk);
    for (const SafetensorsEntry& e : entries_) {
        SafetensorsStream stream(*this, e.name);
        while (stream.remaining() > 0) stream.next(buffer.data(), std::min(kChunk, stream.remaining()));
        stream.finish();
    }
}

void SafetensorsStream::next(void* dst, int64_t bytes) {
    CHECK_INTERNAL(bytes >= 0 && bytes <= remaining(), "%s has %lld bytes left, not %lld", entry_.name.c_str(), (long long)remaining(), (long long)bytes);
    file_.read_at(entry_.offset + done_, dst, bytes);
    crc_.update(dst, size_t(bytes));
    done_ += bytes;
}

void SafetensorsStream::finish() {
    CHECK_INTERNAL(remaining() == 0, "%s has %lld bytes left", entry_.name.c_str(), (long long)remaining());
    if (file_.checksummed_ && hex(crc_.value()) != entry_.crc) file_.damaged("the checksum of tensor " + entry_.name + " is wrong");
}

// ---- a model of one or many files

SafetensorsModel::SafetensorsModel(const std::string& directory) : directory_(directory) {
    const std::string single = directory + "/model.safetensors", index = single + ".index.json";
    if (std::filesystem::exists(single)) {
        files_.push_back(std::make_unique<SafetensorsReader>(single));
        for (const auto& e : files_[0]->entries()) file_of_[e.name] = files_[0].get();
        return;
    }
    if (!std::filesystem::exists(index))
        throw UserError(directory + " has neither model.safetensors nor model.safetensors.index.json; save the model in safetensors format first");
    json parsed = json::parse(read_file(index), nullptr, false);
    if (!parsed.is_object() || !parsed.contains("weight_map") || !parsed["weight_map"].is_object())
        throw UserError(index + " is damaged: it has no weight_map; use another copy of it");
    std::map<std::string, SafetensorsReader*> opened;
    for (const auto& [name, file] : parsed["weight_map"].items()) {
        if (!file.is_string()) throw UserError(index + " is damaged: weight_map gives no file for " + name + "; use another copy of it");
        SafetensorsReader*& reader = opened[file.get<std::string>()];
        if (!reader) {
            files_.push_back(std::make_unique<SafetensorsReader>(directory + "/" + file.get<std::string>()));
            reader = files_.back().get();
        }
        reader->entry(name);
        file_of_[name] = reader;
    }
}

std::vector<std::string> SafetensorsModel::names() const {
    std::vector<std::string> names;
    for (const auto& [name, file] : file_of_) names.push_back(name);
    return names;
}

const SafetensorsReader& SafetensorsModel::file_of(const std::string& name) const {
    auto it = file_of_.find(name);
    if (it == file_of_.end()) throw UserError(directory_ + " has no tensor " + name + "; it belongs to another kind of model");
    return *it->second;
}

void SafetensorsModel::verify() const {
    for (const auto& file : files_) file->verify();
}

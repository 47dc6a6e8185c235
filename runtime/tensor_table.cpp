// Names, places and arenas of all lasting tensors. See tensor_table.h.
#include "runtime/tensor_table.h"

#include <algorithm>

const char* family_name(Family family) {
    switch (family) {
        case Family::frozen: return "frozen weights";
        case Family::trained: return "trained weights";
        case Family::gradients: return "gradients";
        case Family::moments: return "optimizer moments";
        case Family::projection: return "merge buffers";
        case Family::activations: return "activations";
        case Family::effective: return "effective weights";
    }
    return "?";
}

void TensorTable::add(const std::string& name, Family family, Tensor* holder, DType dtype, int64_t rows, int64_t cols, bool saved,
                      int64_t padded_rows, int64_t ld) {
    *holder = Tensor{nullptr, dtype, padded_rows ? padded_rows : rows, cols, ld ? ld : cols};
    entries_.push_back(TensorEntry{name, family, holder, rows, cols, sizes_[family], saved});
    sizes_[family] += round_up(std::max<int64_t>(holder->bytes(), 1), kTensorAlignment);
}

void TensorTable::add_shared(const std::string& name, Family family, Tensor* holder, DType dtype, int64_t rows, int64_t cols, int64_t padded_rows, int64_t ld) {
    *holder = Tensor{nullptr, dtype, padded_rows ? padded_rows : rows, cols, ld ? ld : cols};
    entries_.push_back(TensorEntry{name, family, holder, rows, cols, 0, false, true});
    shared_sizes_[family] = std::max(shared_sizes_[family], round_up(holder->bytes(), kTensorAlignment));
}

std::map<Family, int64_t> TensorTable::families() const {
    std::map<Family, int64_t> all = sizes_;
    for (auto& [family, bytes] : shared_sizes_) all[family] += bytes;
    return all;
}

void TensorTable::add_part(const std::string& name, Tensor* holder, const Tensor* parent, int64_t row_begin, int64_t rows, int64_t cols,
                           int64_t padded_rows, bool saved) {
    *holder = Tensor{nullptr, parent->dtype, padded_rows, cols, parent->ld};
    parts_.push_back(Part{entries_.size(), parent, row_begin, padded_rows});
    entries_.push_back(TensorEntry{name, Family::frozen, holder, rows, cols, 0, saved});
    for (const TensorEntry& entry : entries_)
        if (entry.holder == parent) entries_.back().family = entry.family;
}

void TensorTable::allocate(Device& device) {
    for (auto& [family, bytes] : families()) {
        if (bytes == 0) continue;
        bases_[family] = static_cast<char*>(device.allocate(bytes, family_name(family)));
        device.zero(bases_[family], bytes);
    }
    std::vector<bool> is_part(entries_.size(), false);
    for (const Part& part : parts_) is_part[part.entry] = true;
    for (size_t i = 0; i < entries_.size(); ++i)
        if (!is_part[i]) entries_[i].holder->data = bases_[entries_[i].family] + (entries_[i].shared ? 0 : shared_sizes_[entries_[i].family] + entries_[i].offset);
    for (const Part& part : parts_) entries_[part.entry].holder->data = part.parent->at(part.row_begin, 0);
}

// Every lasting tensor has a name, a family and a place. One table drives allocation, initialization, the optimizer, checkpoints,
// export and the memory plan. Modules register their tensors; allocate() takes one arena per family and fills in the pointers.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "runtime/device.h"

// Bytes. Every tensor of an arena begins at a multiple; what lies between the end of one and the beginning of the next belongs to nobody.
constexpr int64_t kTensorAlignment = 256;

enum class Family { frozen, trained, gradients, moments, projection, activations, effective };
const char* family_name(Family family);  // "frozen weights", …

struct TensorEntry {
    std::string name;
    Family family;
    Tensor* holder;             // the module's field, filled by allocate()
    int64_t rows, cols;         // logical; holder->rows/cols may be padded
    int64_t offset;             // bytes within the family's arena
    bool saved;                 // part of a checkpoint
    bool shared = false;        // lies where other shared tensors of its family lie
};

class TensorTable {
  public:
    // Registers *holder as rows × cols of dtype, in memory padded to padded_rows × ld (0: no padding); memory starts as zeros.
    // The holder must stay where it is until the table is gone. A saved tensor is written to checkpoints under its name.
    void add(const std::string& name, Family family, Tensor* holder, DType dtype, int64_t rows, int64_t cols, bool saved, int64_t padded_rows = 0,
             int64_t ld = 0);
    // The same for a tensor whose contents matter only until the next one of its family is written: all shared tensors of a family lie in one
    // place, as large as the largest. Never saved.
    void add_shared(const std::string& name, Family family, Tensor* holder, DType dtype, int64_t rows, int64_t cols, int64_t padded_rows = 0, int64_t ld = 0);
    // Registers a name for part of another tensor: rows [row_begin, row_begin + rows) of *parent, columns [0, cols). Takes no memory.
    void add_part(const std::string& name, Tensor* holder, const Tensor* parent, int64_t row_begin, int64_t rows, int64_t cols, int64_t padded_rows, bool saved);

    void allocate(Device& device);

    const std::vector<TensorEntry>& entries() const { return entries_; }
    // Bytes of every family's arena.
    std::map<Family, int64_t> families() const;

  private:
    struct Part {
        size_t entry;
        const Tensor* parent;
        int64_t row_begin, padded_rows;
    };
    std::vector<TensorEntry> entries_;
    std::vector<Part> parts_;
    std::map<Family, int64_t> sizes_, shared_sizes_;  // of what has a place of its own; of the shared place before it
    std::map<Family, char*> bases_;
};

// Checkpoints: every saved tensor of a run and its counters in one safetensors file, exact to the bit.
//   checkpoints/step-00001000.safetensors
// A checkpoint appears whole or not at all (AtomicFile); a flipped byte anywhere is found when it is read.
#pragma once
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "runtime/device.h"

// One tensor to save or restore. shape is what the file records; its product is rows·cols. The columns from cols to ld are
// padding that belongs to the tensor: it is not saved, and is zero after loading.
struct CheckpointTensor {
    std::string name;
    Tensor tensor;  // on the device
    std::vector<int64_t> shape;
};

using Metadata = std::map<std::string, std::string>;

// Streams the tensors to path through one host buffer of some MiB; creates the directory if needed. Throws UserError if the disk
// lacks room or fails; no temporary is left then and an older file of that name is untouched.
void save_checkpoint(Device& device, const std::string& path, const std::vector<CheckpointTensor>& tensors, const Metadata& metadata);

// Restores exactly what save_checkpoint wrote into tensors of the same names, dtypes and shapes, and returns the metadata. A missing
// or extra tensor and another dtype or shape are UserErrors that name the tensor and the config key likely at fault, thrown before
// anything is overwritten; a wrong checksum is thrown when met.
// LoadMode::weights reads a model for sampling or export, perhaps on another kind of device: tensors of the file that are not asked for
// are passed over, and bf16 and f32 are converted into one another.
enum class LoadMode { exact, weights };
Metadata load_checkpoint(Device& device, const std::string& path, const std::vector<CheckpointTensor>& tensors, LoadMode mode = LoadMode::exact);

// The metadata alone, without reading the tensors.
Metadata checkpoint_metadata(const std::string& path);

struct CheckpointFile {
    std::string path;
    int64_t step;
};

// Where a run directory has its checkpoints.
std::string checkpoint_folder(const std::string& run_directory);
// <directory>/step-00001000.safetensors
std::string checkpoint_path(const std::string& directory, int64_t step);

// The checkpoints of a directory by their names, oldest first; a directory that does not exist has none.
std::vector<CheckpointFile> list_checkpoints(const std::string& directory);

// The newest checkpoint whose every byte verifies. Newer ones that were skipped are reported, one line each with path and reason.
std::optional<CheckpointFile> find_newest_valid(const std::string& directory, std::vector<std::string>* skipped_with_reason);

// Deletes what is older than the keep_last (≥ 1) newest checkpoints that verify, except multiples of keep_every (0 = no exceptions), and the
// temporaries of writers that died; returns the paths deleted. With fewer than keep_last that verify nothing is deleted.
// trusted (may be null): checkpoints known to be good, such as those this process wrote; they are not read again. Those verified
// here are added, so that each file is read at most once per process.
std::vector<std::string> prune_checkpoints(const std::string& directory, int64_t keep_last, int64_t keep_every, std::set<std::string>* trusted = nullptr);

// Where initial weights come from: counter-based random numbers, or a Hugging Face model on disk. Both can be asked again for any matrix at
// any time, so a run never has to hold the full-precision model.
#pragma once
#include <string>

#include "loqt.h"
#include "runtime/config.h"

// N(0, init_std²), norm weights 1; a function of (seed, tensor name, element) alone, made on the device: the same bits on each.
WeightSource random_weights(const Config& config);
// What read(name, values) puts into `values`, row-major, on the host. The last matrix is kept.
using HostWeights = std::function<void(const std::string& name, std::vector<float>& values)>;
WeightSource host_weights(HostWeights read);
// Tensors of a Hugging Face LLaMA directory. Opens it once; throws UserError if its shape differs from the configuration.
WeightSource huggingface_weights(const Config& config, const std::string& directory);
// Fills config.model from a Hugging Face directory's config.json.
void adopt_huggingface_shape(Config& config, const std::string& directory);

// Text to tokens and back for sampling, with the tokenizer the shards were made with (manifest.json).
// Bytes are handled here; SentencePiece and Hugging Face tokenizers through data/tokenize.py and their own libraries.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "runtime/data.h"

class Tokenizer {
  public:
    // program_dir: the folder of the binary, where data/tokenize.py and perhaps .venv are.
    Tokenizer(const Manifest& manifest, const std::string& program_dir) : manifest_(manifest), program_dir_(program_dir) {}
    std::vector<int32_t> encode(const std::string& text) const;  // no eos appended; throws UserError if the helper fails
    std::string decode(const std::vector<int32_t>& ids) const;
    int64_t eos() const { return manifest_.eos_id; }

  private:
    std::string run_script(const std::string& flag, const std::string& argument) const;
    Manifest manifest_;
    std::string program_dir_;
};

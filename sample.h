// Text generation from a trained model.
#pragma once
#include "llama.h"
#include "runtime/tokenizer.h"

struct SampleOptions {
    std::string prompt;
    int64_t tokens = 128;       // to generate
    double temperature = 0.8;   // 0 = always the likeliest token
    int64_t top_k = 50;         // 0 = all
    uint64_t seed = 0;
};

// The prompt and its continuation. Stops early at the end-of-document token. Contexts longer than seq_len keep their newest tokens.
std::string generate(Llama& model, const Tokenizer& tokenizer, const SampleOptions& options);

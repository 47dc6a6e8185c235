// The training methods of LoQT's Table 1 as policies of one linear layer, y = x·W_effᵀ.
#pragma once
#include <string>
#include <vector>

#include "runtime/config.h"

// method     W               P (left factor)                 B          made anew
// full       trained         -                               -          -
// galore     trained         projects the gradient for Adam  -          P, by the schedule (Zhao et al. 2024)
// loqt       NF4             NF4, from the gradient          trained    W, P and B, by the schedule (P in bf16: method.quantize_projection false)
// loqt-nq    bf16            bf16, from the gradient         trained    W, P and B, by the schedule
// lora       bf16            trained                         trained    never (Hu et al. 2021)
// relora     bf16            trained                         trained    all, every relora_gap steps (Lialin et al. 2023)
// qlora      NF4             trained                         trained    never (Dettmers et al. 2023)
// loftq      NF4             trained                         trained    never; starts from the SVD of what quantization lost (Li et al. 2023)
struct MethodPolicy {
    bool trains_w;   // W is a parameter
    bool quantized;  // W in NF4, else in bf16
    bool adapters;   // W_eff = W + s·P·B
    bool trains_p;   // P is a parameter as B is
    bool projects;   // P: leading singular vectors of the gradient, from step 0 on
    bool quantized_p = false;  // and in NF4, else in bf16
};

// Throws InternalError for a name that validation would not have let through.
MethodPolicy method_policy(const Config& config);

// s of W + s·P·B: method.scale, or where P is trained lora_alpha/rank. Also of galore's update.
double adapter_scale(const Config& config);

// Whether anything is made anew after the start: merges, refreshes, restarts.
bool makes_anew(const Config& config);

// The steps after which something is made anew: by the schedule from step 0 on (merge_schedule.h); relora: every relora_gap steps but not at 0.
std::vector<int64_t> merge_steps(const Config& config);

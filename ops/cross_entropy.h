// Softmax cross-entropy over one chunk of tokens, gradient written over the logits.
#pragma once
#include "runtime/device.h"

// logits: (Tc, V) activation dtype; targets: device int32 [Tc], −1 = not counted.
// losses: (1, Tc) f32, losses[t] = LSE − z_target, 0 where target = −1.
// With backward: logits ← (softmax − onehot)·scale (0 for uncounted rows). Arithmetic in fp32.
// On a GPU rows of up to 32,768 logits (a multiple of eight) are read once and written once; others are read twice.
void cross_entropy(Device& device, Tensor losses, Tensor logits, const int32_t* targets, float scale, bool backward);

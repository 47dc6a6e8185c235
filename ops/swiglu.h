// SwiGLU: a = silu(g)∘u. g and u are the two halves of one matrix, as one GEMM made them.
#pragma once
#include "runtime/device.h"

// a: (T, f); gate_up: (T, 2f), columns [g | u]; both activation dtype.
void swiglu_forward(Device& device, Tensor a, Tensor gate_up);

// dgate_up = [da·u·σ(g)(1 + g(1−σ(g))) | da·g·σ(g)]. dgate_up may be gate_up itself. da: (T, f).
// a, if given, ← silu(g)∘u: what the forward gave, to the bit. It may be da itself.
void swiglu_backward(Device& device, Tensor dgate_up, Tensor gate_up, Tensor da, Tensor a = {});

// The projection of LoQT: leading singular vectors of a dense gradient, on the side that the low-rank factor lives on.
#pragma once
#include "runtime/device.h"

enum class ProjectionMethod {
    gram,     // all eigenvectors of the Gram matrix: exact, cost ~9h³ beyond the Gram matrix itself
    subspace  // orthogonal iteration on the Gram matrix, warm-started: matrix products only, for large h
};

struct ProjectionResult {
    bool ok;                // false: G is zero or not finite, or the solver failed; p is undefined
    float captured_energy;  // ‖P·Gᵀ‖²_F / ‖G‖²_F (left), ‖P·G‖²_F / ‖G‖²_F (right); 0 if not ok
};

// p: (r, h) f32, out: orthonormal rows, the r leading right (left layer: h = in) or left (right layer: h = out) singular vectors of g in
// descending order, each row's largest-magnitude entry positive. g: (out, in) f32, the dense gradient, ld free.
// previous: (≤ r, h) f32, where the iteration starts (need not be orthonormal; may be p itself, may be empty); used by subspace only.
// seed, stream: Philox key and stream of the random part of the start. Same inputs, same bits. Synchronizes.
// Scratch: gram ~5.5h² fp32 (4h² is the eigensolver's); subspace h² + 2kh + 5.5k², k = subspace_size(r, h).
ProjectionResult leading_singular_vectors(Device& device, Tensor p, Tensor g, bool right, ProjectionMethod method, Tensor previous, uint64_t seed,
                                          uint32_t stream);

// The same in two parts, for two devices that share memory (see Device::fork): c: (h, h) f32 takes the place of g, which is then free.
// subspace: c is a TF32 product. c is destroyed by the second part; previous may be p.
void gradient_gram(Device& device, Tensor c, Tensor g, bool right, ProjectionMethod method);
ProjectionResult leading_eigenvectors(Device& device, Tensor p, Tensor c, ProjectionMethod method, Tensor previous, uint64_t seed, uint32_t stream);

// Number of vectors that subspace iterates on: r plus an eighth, at least 32 more, rounded up to 64, at most h.
int64_t subspace_size(int64_t r, int64_t h);

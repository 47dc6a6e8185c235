// Dense symmetric linear algebra in fp32: Cholesky, triangular solves, eigenvectors (cuSOLVER, LAPACK).
#pragma once
#include "runtime/device.h"

// inverse ← (p·pᵀ)⁻¹·p, (r, h) f32: the transpose of the pseudo-inverse of p: (r, h) f32, by Cholesky: for rows that are nearly
// orthonormal. Returns false (inverse undefined) if p has no full row rank to working precision or is not finite. Synchronizes.
bool pseudo_inverse(Device& device, Tensor inverse, Tensor p);

// Eigenvectors of the symmetric c: (m, m) f32 that belong to its r largest eigenvalues, as rows of v: (r, m) f32, largest first, each
// row's largest-magnitude entry positive. values: host, r eigenvalues descending. c is destroyed. Returns false if it did not converge.
bool top_eigenvectors(Device& device, Tensor v, std::vector<float>& values, Tensor c);

// Orthonormalizes the rows of y: (k, m) f32, k ≤ m, in place by shifted CholeskyQR (Fukaya et al. 2020). Where their rank is short of k:
// fail returns false (y undefined); complete uses Householder reflections instead, whose missing directions are arbitrary but orthonormal.
// Also false if y is not finite. Synchronizes.
enum class Degenerate { fail, complete };
bool orthonormalize_rows(Device& device, Tensor y, Degenerate degenerate = Degenerate::fail);

// The same without waiting for anything. roughly: one pass only, after which y is well conditioned: enough between the products of an
// iteration. *failed (device, i32) becomes 1 if a factorization failed or, unless roughly, the rows are not orthonormal; y is then undefined.
void orthonormalize_unchecked(Device& device, Tensor y, bool roughly, int32_t* failed);

// The diagonal of the square a (f32), to the host. Synchronizes.
std::vector<float> diagonal(Device& device, Tensor a);

// dst row i = ±src row order[i], f32: negated where its largest-magnitude entry (the first of equal ones) is negative, since singular vectors
// have no sign of their own and runs should agree on one. dst is not src.
void gather_rows(Device& device, Tensor dst, Tensor src, const std::vector<int32_t>& order);

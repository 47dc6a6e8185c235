// Dense symmetric linear algebra in fp32: Cholesky, triangular solves, eigenvectors (cuSOLVER, LAPACK).
#pragma once
#include "runtime/device.h"

// x ← x·k⁻¹ for symmetric positive definite k: (r, r) f32, x: (n, r) f32. k is overwritten by its Cholesky factor.
// Returns false (x undefined) if k is not positive definite to working precision. Synchronizes.
bool solve_spd_right(Device& device, Tensor x, Tensor k);

// Eigenvectors of the symmetric c: (m, m) f32 that belong to its r largest eigenvalues, as rows of v: (r, m) f32, largest first, each
// row's largest-magnitude entry positive. values: host, r eigenvalues descending. c is destroyed. Returns false if it did not converge.
bool top_eigenvectors(Device& device, Tensor v, std::vector<float>& values, Tensor c);

// Orthonormalizes the rows of y: (k, m) f32, k ≤ m, in place by shifted CholeskyQR3 (Fukaya et al. 2020). Where their rank is short of k:
// fail returns false (y undefined); complete uses Householder reflections instead, whose missing directions are arbitrary but orthonormal.
// Also false if y is not finite. Synchronizes.
enum class Degenerate { fail, complete };
bool orthonormalize_rows(Device& device, Tensor y, Degenerate degenerate = Degenerate::fail);

// Negates the rows of v (f32) whose largest-magnitude entry (the first of equal ones) is negative: singular vectors have no sign of
// their own, and runs should agree on one.
void fix_row_signs(Device& device, Tensor v);

// fp64 oracles for the linear algebra tests: cyclic Jacobi eigenvalues, Gram–Schmidt, plain-loop products. Slow, small and independent of
// the code under test. Matrices are row-major vectors.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

using Matrix64 = std::vector<double>;

struct SymmetricEigen {
    std::vector<double> values;  // descending
    Matrix64 vectors;            // m × m, row i belongs to values[i]
};

// Cyclic two-sided Jacobi rotations until the off-diagonal part is below 1e-15 of the whole. For m up to about 128.
inline SymmetricEigen jacobi_eigen(Matrix64 a, int64_t m) {
    Matrix64 v(m * m, 0.0);
    for (int64_t i = 0; i < m; ++i) v[i * m + i] = 1.0;
    for (int sweep = 0; sweep < 60; ++sweep) {
        double off = 0, all = 0;
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < m; ++j) all += a[i * m + j] * a[i * m + j], off += i == j ? 0 : a[i * m + j] * a[i * m + j];
        if (off <= 1e-30 * all) break;
        for (int64_t p = 0; p < m; ++p)
            for (int64_t q = p + 1; q < m; ++q) {
                double apq = a[p * m + q];
                if (apq == 0) continue;
                double theta = (a[q * m + q] - a[p * m + p]) / (2 * apq);
                double t = (theta >= 0 ? 1.0 : -1.0) / (std::fabs(theta) + std::sqrt(theta * theta + 1)), c = 1 / std::sqrt(t * t + 1), s = t * c;
                for (int64_t i = 0; i < m; ++i) {
                    double x = a[i * m + p], y = a[i * m + q];
                    a[i * m + p] = c * x - s * y, a[i * m + q] = s * x + c * y;
                }
                for (int64_t i = 0; i < m; ++i) {
                    double x = a[p * m + i], y = a[q * m + i];
                    a[p * m + i] = c * x - s * y, a[q * m + i] = s * x + c * y;
                    x = v[p * m + i], y = v[q * m + i];
                    v[p * m + i] = c * x - s * y, v[q * m + i] = s * x + c * y;
                }
            }
    }
    std::vector<int64_t> order(m);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return a[i * m + i] > a[j * m + j]; });
    SymmetricEigen result{std::vector<double>(m), Matrix64(m * m)};
    for (int64_t i = 0; i < m; ++i) {
        result.values[i] = a[order[i] * m + order[i]];
        std::copy_n(&v[order[i] * m], m, &result.vectors[i * m]);
    }
    return result;
}

// a (m, k) · bᵀ, b (n, k) → (m, n).
template <class A, class B> Matrix64 times_transposed(const std::vector<A>& a, const std::vector<B>& b, int64_t m, int64_t n, int64_t k) {
    Matrix64 c(m * n);
#pragma omp parallel for
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) {
            double sum = 0;
            for (int64_t l = 0; l < k; ++l) sum += double(a[i * k + l]) * double(b[j * k + l]);
            c[i * n + j] = sum;
        }
    return c;
}

template <class T> std::vector<T> transposed(const std::vector<T>& a, int64_t rows, int64_t cols) {
    std::vector<T> t(a.size());
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) t[j * rows + i] = a[i * cols + j];
    return t;
}

template <class T> double squared_norm64(const std::vector<T>& a) {
    double sum = 0;
    for (T x : a) sum += double(x) * double(x);
    return sum;
}

// k orthonormal rows of length m in a random direction (Gram–Schmidt, twice).
inline Matrix64 random_orthonormal(std::mt19937_64& rng, int64_t k, int64_t m) {
    std::normal_distribution<double> normal;
    Matrix64 q(k * m);
    for (double& x : q) x = normal(rng);
    for (int64_t i = 0; i < k; ++i)
        for (int pass = 0; pass < 2; ++pass) {
            double* row = &q[i * m];
            for (int64_t j = 0; j < i; ++j) {
                double dot = 0;
                for (int64_t l = 0; l < m; ++l) dot += row[l] * q[j * m + l];
                for (int64_t l = 0; l < m; ++l) row[l] -= dot * q[j * m + l];
            }
            double norm = 0;
            for (int64_t l = 0; l < m; ++l) norm += row[l] * row[l];
            for (int64_t l = 0; l < m; ++l) row[l] /= std::sqrt(norm);
        }
    return q;
}

// max |Q·Qᵀ − I| over the rows of q (k, m).
template <class T> double orthonormality_error(const std::vector<T>& q, int64_t k, int64_t m) {
    Matrix64 gram = times_transposed(q, q, k, k, m);
    double worst = 0;
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j) {
            double error = std::fabs(gram[i * k + j] - (i == j ? 1.0 : 0.0));
            if (!(error <= worst)) worst = error;  // NaN is the worst
        }
    return worst;
}

// Dense symmetric linear algebra. See linalg.h.
//
// LAPACK, cuSOLVER and cuBLAS are column-major: a row-major matrix is its transpose there. Symmetric matrices do not care; rows of a
// row-major matrix are columns to the library, so "orthonormal rows" and "eigenvectors as rows" are what the libraries produce.
#include "ops/linalg.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>

#include "ops/matmul.h"
#include "runtime/cuda_context.h"

extern "C" {
void spotrf_(const char* uplo, const int* n, float* a, const int* lda, int* info);
void spotrs_(const char* uplo, const int* n, const int* nrhs, const float* a, const int* lda, float* b, const int* ldb, int* info);
void sgeqrf_(const int* m, const int* n, float* a, const int* lda, float* tau, float* work, const int* lwork, int* info);
void sorgqr_(const int* m, const int* n, const int* k, float* a, const int* lda, const float* tau, float* work, const int* lwork, int* info);
void ssyevd_(const char* jobz, const char* uplo, const int* n, float* a, const int* lda, float* w, float* work, const int* lwork, int* iwork,
             const int* liwork, int* info);
}

namespace {

constexpr float kUnitRoundoff = 1.0f / 16777216.0f;  // 2^-24

// Device workspace for a factorization of order m, known without a GPU so that the memory plan can count it. LAPACK's ssyevd needs
// 2m² floats; cuSOLVER's Xsyevd took 4.05 m² floats on an H200 and a few MB at small m. Cholesky needs less. What the library really
// asks for is checked against this before every call.
int64_t workspace_bytes(const Device& device, int64_t m) {
    return device.is_cuda() ? 18 * m * m + (int64_t(8) << 20) : int64_t(sizeof(float)) * (2 * m * m + 6 * m + 1);
}

int fortran_int(int64_t x) {
    CHECK_INTERNAL(x >= 0 && x <= 0x7fffffff, "%lld does not fit a Fortran integer", (long long)x);
    return int(x);
}

void check_square(const char* what, const Tensor& a) {
    CHECK_INTERNAL(a.dtype == DType::f32 && a.rows == a.cols && a.rows > 0, "%s is %lld×%lld %s", what, (long long)a.rows, (long long)a.cols,
                   safetensors_name(a.dtype));
}

// ---- CPU ---------------------------------------------------------------------------------------------------------------
// One BLAS thread, so that results do not depend on the thread count.

void cholesky_cpu(Tensor a, int32_t* info) {
    openblas_set_num_threads(1);
    int n = fortran_int(a.rows), ld = fortran_int(a.ld), status = 0;
    spotrf_("L", &n, a.as<float>(), &ld, &status);
    *info = status;
}

void cholesky_solve_cpu(Tensor x, Tensor factor, int32_t* info) {
    openblas_set_num_threads(1);
    int n = fortran_int(factor.rows), ld = fortran_int(factor.ld), nrhs = fortran_int(x.rows), ldx = fortran_int(x.ld), status = 0;
    spotrs_("L", &n, &nrhs, factor.as<float>(), &ld, x.as<float>(), &ldx, &status);
    *info = status;
}

void whiten_rows_cpu(Tensor y, Tensor factor) {
    openblas_set_num_threads(1);
    cblas_strsm(CblasColMajor, CblasRight, CblasLower, CblasTrans, CblasNonUnit, blasint(y.cols), blasint(y.rows), 1.0f, factor.as<float>(),
                blasint(factor.ld), y.as<float>(), blasint(y.ld));
}

void eigen_cpu(Tensor a, float* eigenvalues, Tensor workspace, int32_t* info) {
    openblas_set_num_threads(1);
    int n = fortran_int(a.rows), ld = fortran_int(a.ld), lwork = fortran_int(workspace.bytes() / int64_t(sizeof(float))), liwork = 3 + 5 * n, status = 0;
    std::vector<int> iwork(liwork);
    ssyevd_("V", "L", &n, a.as<float>(), &ld, eigenvalues, static_cast<float*>(workspace.data), &lwork, iwork.data(), &liwork, &status);
    *info = status;
}

void householder_cpu(Tensor y, float* tau, Tensor workspace, int32_t* info) {
    openblas_set_num_threads(1);
    int m = fortran_int(y.cols), k = fortran_int(y.rows), ld = fortran_int(y.ld), lwork = fortran_int(workspace.bytes() / int64_t(sizeof(float)));
    sgeqrf_(&m, &k, y.as<float>(), &ld, tau, static_cast<float*>(workspace.data), &lwork, info);
    sorgqr_(&m, &k, &k, y.as<float>(), &ld, tau, static_cast<float*>(workspace.data), &lwork, info + 1);
}

void read_diagonal_cpu(float* diagonal, Tensor a) {
    for (int64_t i = 0; i < a.rows; ++i) diagonal[i] = a.as<float>()[i * a.ld + i];
}

void scale_diagonal_cpu(Tensor a, float factor) {
    for (int64_t i = 0; i < a.rows; ++i) a.as<float>()[i * a.ld + i] *= factor;
}

// dst[i] = ±src[first + step·i], the sign that makes the largest-magnitude entry positive.
void signed_rows_cpu(Tensor dst, Tensor src, int64_t first, int64_t step) {
#pragma omp parallel for
    for (int64_t i = 0; i < dst.rows; ++i) {
        const float* in = src.as<float>() + (first + step * i) * src.ld;
        float* out = dst.as<float>() + i * dst.ld;
        float largest = 0;
        for (int64_t j = 0; j < dst.cols; ++j)
            if (std::fabs(in[j]) > std::fabs(largest)) largest = in[j];
        for (int64_t j = 0; j < dst.cols; ++j) out[j] = largest < 0 ? -in[j] : in[j];
    }
}

// ---- CUDA --------------------------------------------------------------------------------------------------------------
#ifdef WITH_CUDA

void check_workspace(const char* routine, int64_t order, size_t wanted, Tensor workspace) {
    CHECK_INTERNAL(wanted <= size_t(workspace.bytes()), "%s of order %lld asks for %zu bytes, %lld were planned", routine, (long long)order, wanted,
                   (long long)workspace.bytes());
}

void cholesky_cuda(const CudaContext& cuda, Tensor a, Tensor workspace, std::vector<char>& host, int32_t* info) {
    size_t device_bytes = 0, host_bytes = 0;
    CUSOLVER_CHECK(cusolverDnXpotrf_bufferSize(cuda.solver, cuda.solver_params, CUBLAS_FILL_MODE_LOWER, a.rows, CUDA_R_32F, a.data, a.ld, CUDA_R_32F,
                                               &device_bytes, &host_bytes));
    check_workspace("cusolverDnXpotrf", a.rows, device_bytes, workspace);
    if (host.size() < host_bytes) host.resize(host_bytes);
    CUSOLVER_CHECK(cusolverDnXpotrf(cuda.solver, cuda.solver_params, CUBLAS_FILL_MODE_LOWER, a.rows, CUDA_R_32F, a.data, a.ld, CUDA_R_32F,
                                    workspace.data, device_bytes, host.data(), host_bytes, info));
}

void cholesky_solve_cuda(const CudaContext& cuda, Tensor x, Tensor factor, int32_t* info) {
    CUSOLVER_CHECK(cusolverDnXpotrs(cuda.solver, cuda.solver_params, CUBLAS_FILL_MODE_LOWER, factor.rows, x.rows, CUDA_R_32F, factor.data, factor.ld,
                                    CUDA_R_32F, x.data, x.ld, info));
}

void whiten_rows_cuda(const CudaContext& cuda, Tensor y, Tensor factor) {
    float one = 1.0f;
    CUBLAS_CHECK(cublasStrsm(cuda.blas, CUBLAS_SIDE_RIGHT, CUBLAS_FILL_MODE_LOWER, CUBLAS_OP_T, CUBLAS_DIAG_NON_UNIT, fortran_int(y.cols),
                             fortran_int(y.rows), &one, factor.as<float>(), fortran_int(factor.ld), y.as<float>(), fortran_int(y.ld)));
}

void householder_cuda(const CudaContext& cuda, Tensor y, float* tau, Tensor workspace, int32_t* info) {
    int m = fortran_int(y.cols), k = fortran_int(y.rows), ld = fortran_int(y.ld), factor_floats = 0, form_floats = 0;
    CUSOLVER_CHECK(cusolverDnSgeqrf_bufferSize(cuda.solver, m, k, y.as<float>(), ld, &factor_floats));
    CUSOLVER_CHECK(cusolverDnSorgqr_bufferSize(cuda.solver, m, k, k, y.as<float>(), ld, tau, &form_floats));
    int floats = std::max(factor_floats, form_floats);
    check_workspace("cusolverDnSgeqrf", y.rows, size_t(floats) * sizeof(float), workspace);
    float* work = static_cast<float*>(workspace.data);
    CUSOLVER_CHECK(cusolverDnSgeqrf(cuda.solver, m, k, y.as<float>(), ld, tau, work, floats, info));
    CUSOLVER_CHECK(cusolverDnSorgqr(cuda.solver, m, k, k, y.as<float>(), ld, tau, work, floats, info + 1));
}

// All eigenvectors, although only the top ones are wanted: the reduction to tridiagonal form dominates on a GPU, and this is the
// routine whose workspace has been measured.
void eigen_cuda(const CudaContext& cuda, Tensor a, float* eigenvalues, Tensor workspace, std::vector<char>& host, int32_t* info) {
    size_t device_bytes = 0, host_bytes = 0;
    CUSOLVER_CHECK(cusolverDnXsyevd_bufferSize(cuda.solver, cuda.solver_params, CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER, a.rows, CUDA_R_32F,
                                               a.data, a.ld, CUDA_R_32F, eigenvalues, CUDA_R_32F, &device_bytes, &host_bytes));
    check_workspace("cusolverDnXsyevd", a.rows, device_bytes, workspace);
    host.resize(host_bytes);
    CUSOLVER_CHECK(cusolverDnXsyevd(cuda.solver, cuda.solver_params, CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER, a.rows, CUDA_R_32F, a.data, a.ld,
                                    CUDA_R_32F, eigenvalues, CUDA_R_32F, workspace.data, device_bytes, host.data(), host_bytes, info));
}

__global__ void read_diagonal_kernel(float* diagonal, const float* a, int64_t n, int64_t ld) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) diagonal[i] = a[i * ld + i];
}

void read_diagonal_cuda(const CudaContext& cuda, float* diagonal, Tensor a) {
    read_diagonal_kernel<<<unsigned(ceil_div(a.rows, 256)), 256, 0, cuda.stream>>>(diagonal, a.as<float>(), a.rows, a.ld);
    LAUNCH_CHECK();
}

__global__ void scale_diagonal_kernel(float* a, int64_t n, int64_t ld, float factor) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) a[i * ld + i] *= factor;
}

void scale_diagonal_cuda(const CudaContext& cuda, Tensor a, float factor) {
    scale_diagonal_kernel<<<unsigned(ceil_div(a.rows, 256)), 256, 0, cuda.stream>>>(a.as<float>(), a.rows, a.ld, factor);
    LAUNCH_CHECK();
}

constexpr int kRowThreads = 256;

// One block per row. dst may be src (with first = 0, step = 1): a row is read to its end before any of it is written.
__global__ void signed_rows_kernel(float* dst, int64_t ld_dst, const float* src, int64_t ld_src, int64_t cols, int64_t first, int64_t step) {
    const float* in = src + (first + step * int64_t(blockIdx.x)) * ld_src;
    float* out = dst + int64_t(blockIdx.x) * ld_dst;
    __shared__ float best[kRowThreads];
    __shared__ int64_t where[kRowThreads];
    float largest = 0;
    int64_t index = cols;
    for (int64_t j = threadIdx.x; j < cols; j += kRowThreads)
        if (fabsf(in[j]) > fabsf(largest)) largest = in[j], index = j;
    best[threadIdx.x] = largest, where[threadIdx.x] = index;
    __syncthreads();
    for (int half = kRowThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            float mine = fabsf(best[threadIdx.x]), other = fabsf(best[threadIdx.x + half]);
            if (other > mine || (other == mine && where[threadIdx.x + half] < where[threadIdx.x])) {
                best[threadIdx.x] = best[threadIdx.x + half];
                where[threadIdx.x] = where[threadIdx.x + half];
            }
        }
        __syncthreads();
    }
    bool negate = best[0] < 0;
    for (int64_t j = threadIdx.x; j < cols; j += kRowThreads) out[j] = negate ? -in[j] : in[j];
}

void signed_rows_cuda(const CudaContext& cuda, Tensor dst, Tensor src, int64_t first, int64_t step) {
    signed_rows_kernel<<<unsigned(dst.rows), kRowThreads, 0, cuda.stream>>>(dst.as<float>(), dst.ld, src.as<float>(), src.ld, dst.cols, first, step);
    LAUNCH_CHECK();
}
#endif

// ---- Building blocks on either device ----------------------------------------------------------------------------------

// A = L·Lᵀ in place of a (column-major lower triangle). *info: 0, or the order of the leading minor that is not positive.
void cholesky(Device& device, Tensor a, Tensor workspace, std::vector<char>& host, int32_t* info) {
    (void)workspace, (void)host;
    ON_DEVICE(device, cholesky_cuda(device.cuda(), a, workspace, host, info), cholesky_cpu(a, info));
}

// Rows of x times (L·Lᵀ)⁻¹.
void cholesky_solve(Device& device, Tensor x, Tensor factor, int32_t* info) {
    ON_DEVICE(device, cholesky_solve_cuda(device.cuda(), x, factor, info), cholesky_solve_cpu(x, factor, info));
}

// y ← L⁻¹·y: rows whose Gram matrix was L·Lᵀ become orthonormal.
void whiten_rows(Device& device, Tensor y, Tensor factor) {
    ON_DEVICE(device, whiten_rows_cuda(device.cuda(), y, factor), whiten_rows_cpu(y, factor));
}

// Rows of y become an orthonormal basis that contains their span, whatever their rank.
void householder(Device& device, Tensor y, float* tau, Tensor workspace, int32_t* info) {
    (void)workspace;
    ON_DEVICE(device, householder_cuda(device.cuda(), y, tau, workspace, info), householder_cpu(y, tau, workspace, info));
}

void read_diagonal(Device& device, Tensor diagonal, Tensor a) {
    ON_DEVICE(device, read_diagonal_cuda(device.cuda(), diagonal.as<float>(), a), read_diagonal_cpu(diagonal.as<float>(), a));
}

void scale_diagonal(Device& device, Tensor a, float factor) {
    ON_DEVICE(device, scale_diagonal_cuda(device.cuda(), a, factor), scale_diagonal_cpu(a, factor));
}

void signed_rows(Device& device, Tensor dst, Tensor src, int64_t first, int64_t step) {
    ON_DEVICE(device, signed_rows_cuda(device.cuda(), dst, src, first, step), signed_rows_cpu(dst, src, first, step));
}

}  // namespace

bool solve_spd_right(Device& device, Tensor x, Tensor k) {
    check_square("k", k);
    int64_t r = k.rows;
    CHECK_INTERNAL(x.cols == r && x.dtype == DType::f32, "x is %lld×%lld, k is of order %lld", (long long)x.rows, (long long)x.cols, (long long)r);
    ScratchScope scratch(device);
    Tensor workspace = scratch.tensor("Cholesky workspace", DType::u8, 1, workspace_bytes(device, r));
    Tensor diagonals = scratch.tensor("diagonals", DType::f32, 2, r);
    Tensor info = scratch.tensor("status", DType::i32, 1, 2);
    std::vector<char> host_workspace;

    read_diagonal(device, diagonals.row_slice(0, 1), k);
    cholesky(device, k, workspace, host_workspace, info.as<int32_t>());
    read_diagonal(device, diagonals.row_slice(1, 1), k);
    if (x.rows > 0) cholesky_solve(device, x, k, info.as<int32_t>() + 1);
    else device.zero(info.at(0, 1), sizeof(int32_t));
    if (device.dry()) return true;

    std::vector<float> before(r), after(r);
    int32_t status[2];
    device.download(before.data(), diagonals.at(0, 0), r * int64_t(sizeof(float)));
    device.download(after.data(), diagonals.at(1, 0), r * int64_t(sizeof(float)));
    device.download(status, info.data, sizeof status);
    // A pivot that cancelled down to rounding noise means a singular matrix, although the factorization went through: with 1e-4 of its
    // diagonal left, a solution has three digits at best. The Gram matrices solved here have pivots near 1. NaN fails too.
    constexpr float kLeastPivot = 1e-4f;
    bool definite = status[0] == 0 && status[1] == 0;
    for (int64_t i = 0; i < r; ++i) definite = definite && after[i] * after[i] > kLeastPivot * before[i];
    return definite;
}

bool top_eigenvectors(Device& device, Tensor v, std::vector<float>& values, Tensor c) {
    check_square("c", c);
    int64_t m = c.rows, r = v.rows;
    CHECK_INTERNAL(v.cols == m && r <= m && v.dtype == DType::f32, "v is %lld×%lld, c is of order %lld", (long long)r, (long long)v.cols, (long long)m);
    values.assign(r, 0.0f);
    ScratchScope scratch(device);
    Tensor workspace = scratch.tensor("eigenvector workspace", DType::u8, 1, workspace_bytes(device, m));
    Tensor eigenvalues = scratch.tensor("eigenvalues", DType::f32, 1, m);
    Tensor info = scratch.tensor("status", DType::i32, 1, 1);
    std::vector<char> host_workspace;
    if (r == 0) return true;

    // Eigenvectors replace c, one per row, ascending.
    ON_DEVICE(device, eigen_cuda(device.cuda(), c, eigenvalues.as<float>(), workspace, host_workspace, info.as<int32_t>()),
              eigen_cpu(c, eigenvalues.as<float>(), workspace, info.as<int32_t>()));
    signed_rows(device, v, c, m - 1, -1);
    if (device.dry()) return true;

    int32_t status = 0;
    device.download(&status, info.data, sizeof status);
    device.download(values.data(), eigenvalues.at(0, m - r), r * int64_t(sizeof(float)));
    for (int64_t i = 0; i < r / 2; ++i) std::swap(values[i], values[r - 1 - i]);
    for (float value : values)
        if (!std::isfinite(value)) return false;
    return status == 0;
}

bool orthonormalize_rows(Device& device, Tensor y, Degenerate degenerate) {
    int64_t k = y.rows;
    CHECK_INTERNAL(k <= y.cols && y.dtype == DType::f32, "%lld rows of length %lld cannot be orthonormal", (long long)k, (long long)y.cols);
    ScratchScope scratch(device);
    Tensor gram = scratch.tensor("Gram matrix", DType::f32, k, k);
    Tensor workspace = scratch.tensor("orthonormalization workspace", DType::u8, 1, workspace_bytes(device, k));
    Tensor diagonal = scratch.tensor("diagonal", DType::f32, 1, k);
    Tensor info = scratch.tensor("status", DType::i32, 1, 2);
    std::vector<char> host_workspace;
    if (k == 0) return true;
    auto succeeded = [&](int count) {
        int32_t status[2] = {0, 0};
        device.download(status, info.data, count * int64_t(sizeof(int32_t)));
        return status[0] == 0 && status[1] == 0;
    };
    // Orthonormal rows have a Gram matrix with ones on its diagonal, and so has its Cholesky factor. NaN fails.
    auto ones_on_diagonal = [&](Tensor a) {
        std::vector<float> values(k, 1.0f);
        read_diagonal(device, diagonal, a);
        device.download(values.data(), diagonal.data, k * int64_t(sizeof(float)));
        for (float d : values)
            if (!(std::fabs(d - 1.0f) < 1e-2f)) return false;
        return true;
    };

    bool good = true;
    for (int pass = 0; pass < 3 && good; ++pass) {
        matmul(device, gram, 1.0f, y, Op::none, y, Op::transpose);
        // The published shift u‖Y‖²·I, taken relative to each row's norm, as if the rows had been scaled to equal norms first:
        // rows of very different norms (a power iteration's) are then no worse than rows of equal ones.
        if (pass == 0) scale_diagonal(device, gram, 1.0f + float(k) * kUnitRoundoff);
        cholesky(device, gram, workspace, host_workspace, info.as<int32_t>());
        good = succeeded(1);
        if (good) whiten_rows(device, y, gram);
    }
    // The third factor is the identity if the second pass already left nearly orthonormal rows.
    if (good && ones_on_diagonal(gram)) return true;
    if (degenerate == Degenerate::fail) return false;
    householder(device, y, diagonal.as<float>(), workspace, info.as<int32_t>());
    if (!succeeded(2)) return false;
    matmul(device, gram, 1.0f, y, Op::none, y, Op::transpose);
    return ones_on_diagonal(gram);
}

void fix_row_signs(Device& device, Tensor v) {
    CHECK_INTERNAL(v.dtype == DType::f32, "v is %s", safetensors_name(v.dtype));
    if (v.rows > 0) signed_rows(device, v, v, 0, 1);
}

// Dense symmetric linear algebra. See linalg.h.
//
// LAPACK, cuSOLVER and cuBLAS are column-major: a row-major matrix is its transpose there. Symmetric matrices do not care; rows of a
// row-major matrix are columns to the library, so "orthonormal rows" and "eigenvectors as rows" are what the libraries produce.
#include "ops/linalg.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>

#include "ops/elementwise.h"
#include "ops/matmul.h"
#include "runtime/cuda_context.h"
#include "runtime/profile.h"

extern "C" {
void spotrf_(const char* uplo, const int* n, float* a, const int* lda, int* info);
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

// Orthonormal rows have the identity as their Gram matrix and as its Cholesky factor. NaN is bad.
HOST_DEVICE bool bad_pivot(float pivot, bool identity) { return !(fabsf(pivot - 1.0f) < (identity ? 1e-2f : INFINITY)); }

// ---- CPU ---------------------------------------------------------------------------------------------------------------
// One BLAS thread, so that results do not depend on the thread count.

void cholesky_cpu(Tensor a, int32_t* info) {
    openblas_set_num_threads(1);
    int n = fortran_int(a.rows), ld = fortran_int(a.ld), status = 0;
    spotrf_("L", &n, a.as<float>(), &ld, &status);
    *info = status;
}

// Rows of y times L⁻ᵀ (transpose) or L⁻¹ on the right of the column-major matrix that they are the columns of: y ← L⁻¹·y or L⁻ᵀ·y.
void solve_factor_cpu(Tensor y, Tensor factor, Op op) {
    openblas_set_num_threads(1);
    cblas_strsm(CblasColMajor, CblasRight, CblasLower, op == Op::none ? CblasTrans : CblasNoTrans, CblasNonUnit, blasint(y.cols), blasint(y.rows), 1.0f,
                factor.as<float>(), blasint(factor.ld), y.as<float>(), blasint(y.ld));
}

void check_factor_cpu(int32_t* failed, Tensor factor, const int32_t* info, bool identity) {
    for (int64_t i = 0; i < factor.rows; ++i)
        if (bad_pivot(factor.as<float>()[i * factor.ld + i], identity)) *failed = 1;
    if (*info != 0) *failed = 1;
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

// dst[i] = ±src[order[i]], the sign that makes the largest-magnitude entry positive. Without an order rows are reversed.
void signed_rows_cpu(Tensor dst, Tensor src, const int32_t* order) {
#pragma omp parallel for
    for (int64_t i = 0; i < dst.rows; ++i) {
        const float* in = src.as<float>() + (order ? order[i] : src.rows - 1 - i) * src.ld;
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
    if (host_bytes) CUDA_CHECK(cudaStreamSynchronize(cuda.stream));  // the host's part of the work must outlive the call
}

void solve_factor_cuda(const CudaContext& cuda, Tensor y, Tensor factor, Op op) {
    float one = 1.0f;
    CUBLAS_CHECK(cublasStrsm(cuda.blas, CUBLAS_SIDE_RIGHT, CUBLAS_FILL_MODE_LOWER, op == Op::none ? CUBLAS_OP_T : CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT,
                             fortran_int(y.cols), fortran_int(y.rows), &one, factor.as<float>(), fortran_int(factor.ld), y.as<float>(), fortran_int(y.ld)));
}

__global__ void check_factor_kernel(int32_t* failed, const float* a, int64_t n, int64_t ld, const int32_t* info, bool identity) {
    bool bad = *info != 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) bad |= bad_pivot(a[i * ld + i], identity);
    if (bad) *failed = 1;
}

void check_factor_cuda(const CudaContext& cuda, int32_t* failed, Tensor factor, const int32_t* info, bool identity) {
    check_factor_kernel<<<1, 256, 0, cuda.stream>>>(failed, factor.as<float>(), factor.rows, factor.ld, info, identity);
    LAUNCH_CHECK();
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

// One block per row.
__global__ void signed_rows_kernel(float* dst, int64_t ld_dst, const float* src, int64_t ld_src, int64_t rows, int64_t cols, const int32_t* order) {
    const float* in = src + (order ? order[blockIdx.x] : rows - 1 - int64_t(blockIdx.x)) * ld_src;
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

void signed_rows_cuda(const CudaContext& cuda, Tensor dst, Tensor src, const int32_t* order) {
    signed_rows_kernel<<<unsigned(dst.rows), kRowThreads, 0, cuda.stream>>>(dst.as<float>(), dst.ld, src.as<float>(), src.ld, src.rows, dst.cols, order);
    LAUNCH_CHECK();
}
#endif

// ---- Building blocks on either device ----------------------------------------------------------------------------------

// A = L·Lᵀ in place of a (column-major lower triangle). *info: 0, or the order of the leading minor that is not positive.
void cholesky(Device& device, Tensor a, Tensor workspace, std::vector<char>& host, int32_t* info) {
    (void)workspace, (void)host;
    ON_DEVICE(device, cholesky_cuda(device.cuda(), a, workspace, host, info), cholesky_cpu(a, info));
}

// y ← L⁻¹·y (rows whose Gram matrix was L·Lᵀ become orthonormal) or, with Op::transpose, L⁻ᵀ·y.
void solve_factor(Device& device, Tensor y, Tensor factor, Op op) {
    ON_DEVICE(device, solve_factor_cuda(device.cuda(), y, factor, op), solve_factor_cpu(y, factor, op));
}

// *failed ← 1 if the factorization of status *info failed or, with `identity`, the factor is not nearly the identity.
void check_factor(Device& device, int32_t* failed, Tensor factor, const int32_t* info, bool identity) {
    ON_DEVICE(device, check_factor_cuda(device.cuda(), failed, factor, info, identity), check_factor_cpu(failed, factor, info, identity));
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

void signed_rows(Device& device, Tensor dst, Tensor src, const int32_t* order) {
    ON_DEVICE(device, signed_rows_cuda(device.cuda(), dst, src, order), signed_rows_cpu(dst, src, order));
}

}  // namespace

bool pseudo_inverse(Device& device, Tensor inverse, Tensor p) {
    int64_t r = p.rows, h = p.cols;
    CHECK_INTERNAL(inverse.rows == r && inverse.cols == h && inverse.dtype == DType::f32 && p.dtype == DType::f32, "p is %lld×%lld, its inverse %lld×%lld",
                   (long long)r, (long long)h, (long long)inverse.rows, (long long)inverse.cols);
    ScratchScope scratch(device);
    Tensor gram = scratch.tensor("P·Pᵀ", DType::f32, r, r);
    Tensor workspace = scratch.tensor("Cholesky workspace", DType::u8, 1, workspace_bytes(device, r));
    Tensor diagonals = scratch.tensor("diagonals", DType::f32, 2, r);  // of P·Pᵀ and of its inverse
    Tensor info = scratch.tensor("status", DType::i32, 1, 1);
    std::vector<char> host_workspace;
    OperationTimer timer(device, "pseudo_inverse", 6.0 * double(r * r * h), 8.0 * double(r * h));

    matmul(device, gram, 1.0f, p, Op::none, p, Op::transpose);
    read_diagonal(device, diagonals.row_slice(0, 1), gram);
    cholesky(device, gram, workspace, host_workspace, info.as<int32_t>());
    convert(device, inverse, p);
    solve_factor(device, inverse, gram, Op::none);
    solve_factor(device, inverse, gram, Op::transpose);
    matmul(device, gram, 1.0f, inverse, Op::none, inverse, Op::transpose);
    read_diagonal(device, diagonals.row_slice(1, 1), gram);
    if (device.dry()) return true;

    std::vector<float> host(2 * r);
    int32_t status = 0;
    device.download(host.data(), diagonals.data, diagonals.bytes());
    device.download(&status, info.data, sizeof status);
    // What a row has outside the span of the others, squared, is 1/(P·Pᵀ)⁻¹ᵢᵢ; rounding noise in place of it means a singular matrix, although
    // the factorization went through. With 1e-4 of the row left a solution has three digits at best. (The pivots would not do: a small
    // singular value can spread over several of them.) The rows met here keep nearly all. NaN fails too.
    constexpr float kLeastShare = 1e-4f;
    bool independent = status == 0;
    for (int64_t i = 0; i < r; ++i) independent = independent && host[i] * host[r + i] * kLeastShare < 1.0f;
    return independent;
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
    OperationTimer timer(device, "top_eigenvectors", 9.0 * double(m) * double(m) * double(m), 4.0 * double(m * m + r * m));

    // Eigenvectors replace c, one per row, ascending.
    ON_DEVICE(device, eigen_cuda(device.cuda(), c, eigenvalues.as<float>(), workspace, host_workspace, info.as<int32_t>()),
              eigen_cpu(c, eigenvalues.as<float>(), workspace, info.as<int32_t>()));
    signed_rows(device, v, c, nullptr);
    if (device.dry()) return true;

    int32_t status = 0;
    device.download(&status, info.data, sizeof status);
    device.download(values.data(), eigenvalues.at(0, m - r), r * int64_t(sizeof(float)));
    for (int64_t i = 0; i < r / 2; ++i) std::swap(values[i], values[r - 1 - i]);
    for (float value : values)
        if (!std::isfinite(value)) return false;
    return status == 0;
}

namespace {

// A second shifted pass before the usual two carries rows of condition number 1e7, as an iteration leaves them, where one fails.
constexpr int kPasses = 4, kShiftedPasses = 2;

// What a pass of CholeskyQR works with.
struct GramFactor {
    Tensor gram, workspace, info;
    Tensor diagonal;  // of a factor, or what Householder reflections need
    std::vector<char> host_workspace;

    GramFactor(Device& device, ScratchScope& scratch, int64_t k)
        : gram(scratch.tensor("Gram matrix", DType::f32, k, k)),
          workspace(scratch.tensor("orthonormalization workspace", DType::u8, 1, workspace_bytes(device, k))), info(scratch.tensor("status", DType::i32, 1, 2)),
          diagonal(scratch.tensor("diagonal", DType::f32, 1, k)) {}

    // gram ← the Cholesky factor of y·yᵀ, shifted in the first passes.
    void factorize(Device& device, Tensor y, int pass) {
        matmul(device, gram, 1.0f, y, Op::none, y, Op::transpose);
        // The published shift, a multiple of u‖Y‖²·I, taken relative to each row's norm, as if the rows had been scaled to equal norms
        // first: rows of very different norms (a power iteration's) are then no worse than rows of equal ones. The rounding errors of
        // the Gram matrix have a norm near 2√k times that of one entry; the shift must be above it.
        if (pass < kShiftedPasses) scale_diagonal(device, gram, 1.0f + 16.0f * float(y.rows) * kUnitRoundoff);
        cholesky(device, gram, workspace, host_workspace, info.as<int32_t>());
    }
};

// Per pass: the Gram matrix, its factor, the solution.
double cholesky_qr_flops(Tensor y, int passes) { return passes * (3.0 * double(y.rows) * double(y.rows) * double(y.cols)); }

}  // namespace

bool orthonormalize_rows(Device& device, Tensor y, Degenerate degenerate) {
    int64_t k = y.rows;
    CHECK_INTERNAL(k <= y.cols && y.dtype == DType::f32, "%lld rows of length %lld cannot be orthonormal", (long long)k, (long long)y.cols);
    ScratchScope scratch(device);
    GramFactor factor(device, scratch, k);
    if (k == 0) return true;
    OperationTimer timer(device, "orthonormalize_rows", cholesky_qr_flops(y, kPasses), 8.0 * double(y.numel()));
    auto succeeded = [&](int count) {
        int32_t status[2] = {0, 0};
        device.download(status, factor.info.data, count * int64_t(sizeof(int32_t)));
        return status[0] == 0 && status[1] == 0;
    };
    auto ones_on_diagonal = [&] {
        std::vector<float> values(k, 1.0f);
        read_diagonal(device, factor.diagonal, factor.gram);
        device.download(values.data(), factor.diagonal.data, k * int64_t(sizeof(float)));
        return std::none_of(values.begin(), values.end(), [](float d) { return bad_pivot(d, true); });
    };

    bool good = true;
    for (int pass = 0; pass < kPasses && good; ++pass) {
        factor.factorize(device, y, pass);
        good = succeeded(1);
        if (good) solve_factor(device, y, factor.gram, Op::none);
    }
    // The last factor is the identity if the pass before it left nearly orthonormal rows.
    if (good && ones_on_diagonal()) return true;
    if (degenerate == Degenerate::fail) return false;
    householder(device, y, factor.diagonal.as<float>(), factor.workspace, factor.info.as<int32_t>());
    if (!succeeded(2)) return false;
    matmul(device, factor.gram, 1.0f, y, Op::none, y, Op::transpose);
    return ones_on_diagonal();
}

void orthonormalize_unchecked(Device& device, Tensor y, bool roughly, int32_t* failed) {
    CHECK_INTERNAL(y.rows <= y.cols && y.dtype == DType::f32, "%lld rows of length %lld cannot be orthonormal", (long long)y.rows, (long long)y.cols);
    ScratchScope scratch(device);
    GramFactor factor(device, scratch, y.rows);
    if (y.rows == 0) return;
    const int passes = roughly ? 1 : kPasses;
    OperationTimer timer(device, "orthonormalize_rows", cholesky_qr_flops(y, passes), 8.0 * double(y.numel()));
    for (int pass = 0; pass < passes; ++pass) {
        factor.factorize(device, y, pass);
        check_factor(device, failed, factor.gram, factor.info.as<int32_t>(), pass + 1 == kPasses);
        solve_factor(device, y, factor.gram, Op::none);
    }
}

std::vector<float> diagonal(Device& device, Tensor a) {
    CHECK_INTERNAL(a.dtype == DType::f32 && a.rows == a.cols, "the diagonal of %lld×%lld %s", (long long)a.rows, (long long)a.cols, safetensors_name(a.dtype));
    std::vector<float> values(a.rows, 1.0f);  // what a dry device goes on with
    if (a.rows == 0) return values;
    ScratchScope scratch(device);
    Tensor copy = scratch.tensor("diagonal", DType::f32, 1, a.rows);
    read_diagonal(device, copy, a);
    device.download(values.data(), copy.data, copy.bytes());
    return values;
}

void gather_rows(Device& device, Tensor dst, Tensor src, const std::vector<int32_t>& order) {
    CHECK_INTERNAL(dst.rows == int64_t(order.size()) && dst.cols == src.cols && dst.dtype == DType::f32 && src.dtype == DType::f32 && dst.data != src.data,
                   "%zu of %lld rows of length %lld to %lld×%lld", order.size(), (long long)src.rows, (long long)src.cols, (long long)dst.rows, (long long)dst.cols);
    if (order.empty()) return;
    ScratchScope scratch(device);
    Tensor indices = scratch.tensor("order of rows", DType::i32, 1, dst.rows);
    device.upload(indices.data, order.data(), indices.bytes());
    signed_rows(device, dst, src, indices.as<int32_t>());
}

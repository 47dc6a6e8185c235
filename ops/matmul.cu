// Matrix products. See matmul.h.
#include "ops/matmul.h"

#include <cblas.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "runtime/cuda_context.h"
#include "runtime/profile.h"

namespace {

struct Product {  // D (m, n) = alpha·op(A) (m, k)·op(B) (k, n) + beta·C
    int64_t m, n, k;
    float alpha, beta;
    Tensor a, b, c, d;
    Op op_a, op_b;
    bool tf32;

    std::string describe() const {
        auto matrix = [](const char* name, const Tensor& t, Op op) {
            return format("%s %lld×%lld %s ld %lld%s", name, (long long)t.rows, (long long)t.cols, safetensors_name(t.dtype), (long long)t.ld,
                          op == Op::transpose ? " transposed" : "");
        };
        return matrix("D", d, Op::none) + " = " + matrix("A", a, op_a) + " · " + matrix("B", b, op_b) +
               (beta != 0 ? " + " + matrix("C", c, Op::none) : "");
    }
};

// ---- CPU ---------------------------------------------------------------------------------------------------------------

// D is cut into tiles, each one single-threaded sgemm: OpenBLAS's own threading rounds differently for different thread counts, this does
// not (and is as fast). Every tile packs its operands anew, so they are as large as possible; but weights' gradients are small in D and
// long in k, and there should be a tile for every core. The cut depends on the shape only.
constexpr int64_t kMostRows = 256, kMostColumns = 1024, kLeastEdge = 64, kEnoughTiles = 8;

struct Cut {
    int64_t rows, cols;  // of one tile; those at the end may be smaller
};

Cut cut_into_tiles(int64_t m, int64_t n) {
    int64_t row_parts = ceil_div(m, kMostRows), column_parts = ceil_div(n, kMostColumns);
    while (row_parts * column_parts < kEnoughTiles && std::max(m / row_parts, n / column_parts) >= 2 * kLeastEdge)
        (m / row_parts >= n / column_parts ? row_parts : column_parts) *= 2;
    return {round_up(ceil_div(m, row_parts), 16), round_up(ceil_div(n, column_parts), 16)};
}

void matmul_cpu(const Product& p) {
    const float *a = p.a.as<float>(), *b = p.b.as<float>(), *c = p.c.as<float>();
    float* d = p.d.as<float>();
    bool copy_c = p.beta != 0 && c != d;
    openblas_set_num_threads(1);
    Cut cut = cut_into_tiles(p.m, p.n);
    int64_t tile_columns = ceil_div(p.n, cut.cols), tiles = ceil_div(p.m, cut.rows) * tile_columns;
#pragma omp parallel for schedule(dynamic)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        int64_t i0 = tile / tile_columns * cut.rows, rows = std::min(cut.rows, p.m - i0);
        int64_t j0 = tile % tile_columns * cut.cols, cols = std::min(cut.cols, p.n - j0);
        for (int64_t i = i0; i < i0 + rows && (copy_c || p.k == 0); ++i)
            for (int64_t j = j0; j < j0 + cols; ++j) {
                float start = p.beta != 0 ? c[i * p.c.ld + j] : 0.0f;
                d[i * p.d.ld + j] = p.k == 0 ? p.beta * start : start;
            }
        if (p.k == 0) continue;
        cblas_sgemm(CblasRowMajor, p.op_a == Op::transpose ? CblasTrans : CblasNoTrans, p.op_b == Op::transpose ? CblasTrans : CblasNoTrans,
                    blasint(rows), blasint(cols), blasint(p.k), p.alpha, a + (p.op_a == Op::transpose ? i0 : i0 * p.a.ld), blasint(p.a.ld),
                    b + (p.op_b == Op::transpose ? j0 * p.b.ld : j0), blasint(p.b.ld), p.beta, d + i0 * p.d.ld + j0, blasint(p.d.ld));
    }
}

}  // namespace

// ---- CUDA --------------------------------------------------------------------------------------------------------------

#ifdef WITH_CUDA

// Everything that cuBLASLt must know of a product beforehand, and the algorithms that its heuristic offers, best guess first. The opaque
// structs own nothing; a plan stays where it was made, since only algorithms are documented to survive copying.
//
// The guess is often 5 to 20 % slower than the best candidate. Choosing by time alone would make the bits of a run depend on noise, so
// only candidates that compute the same bits as the first one may take its place (most do: they differ in tiles, not in the order of
// sums). Which of them wins then changes nothing but speed.
struct CublasLtPlan {
    cublasLtMatmulDescOpaque_t operation;
    cublasLtMatrixLayoutOpaque_t a, b, c, d;
    std::vector<cublasLtMatmulAlgo_t> candidates;  // one left: the choice is made
    int trials = 0;                                // that ended without one
};
using CublasLtPlanKey = std::array<int64_t, 18>;
struct CublasLtPlans {
    std::map<CublasLtPlanKey, std::unique_ptr<CublasLtPlan>> by_key;
};

namespace {

cudaDataType_t cuda_type(DType t) { return t == DType::bf16 ? CUDA_R_16BF : CUDA_R_32F; }

// The largest power of two up to 16 bytes (one vector access) that divides the address.
int64_t alignment(const void* pointer) {
    int64_t bytes = 16;
    while (reinterpret_cast<uintptr_t>(pointer) % bytes) bytes /= 2;
    return bytes;
}

// cuBLASLt is column-major: the row-major D = op(A)·op(B) is the column-major Dᵀ = op(B)ᵀ·op(A)ᵀ, and a row-major matrix read as a
// column-major one is already transposed. So the operands change places and keep their op, and rows and columns swap.
std::unique_ptr<CublasLtPlan> make_plan(const CudaContext& cuda, const Product& p) {
    auto made = std::make_unique<CublasLtPlan>();
    CublasLtPlan& plan = *made;
    CUBLAS_CHECK(cublasLtMatmulDescInit(&plan.operation, p.tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F));
    cublasOperation_t first = p.op_b == Op::transpose ? CUBLAS_OP_T : CUBLAS_OP_N, second = p.op_a == Op::transpose ? CUBLAS_OP_T : CUBLAS_OP_N;
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(&plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(&plan.operation, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second));
    CUBLAS_CHECK(cublasLtMatrixLayoutInit(&plan.a, cuda_type(p.b.dtype), p.b.cols, p.b.rows, p.b.ld));
    CUBLAS_CHECK(cublasLtMatrixLayoutInit(&plan.b, cuda_type(p.a.dtype), p.a.cols, p.a.rows, p.a.ld));
    CUBLAS_CHECK(cublasLtMatrixLayoutInit(&plan.c, cuda_type(p.c.dtype), p.n, p.m, p.c.ld));
    CUBLAS_CHECK(cublasLtMatrixLayoutInit(&plan.d, cuda_type(p.d.dtype), p.n, p.m, p.d.ld));

    cublasLtMatmulPreferenceOpaque_t preference{};
    CUBLAS_CHECK(cublasLtMatmulPreferenceInit(&preference));
    auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
        CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof value));
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(cuda.workspace_bytes));
    // Split-K only with fp32 partial sums added in a fixed order: in-place reduction has no order, output-type would round to bf16.
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, uint32_t(CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, uint32_t(alignment(p.b.data)));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, uint32_t(alignment(p.a.data)));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, uint32_t(alignment(p.c.data)));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, uint32_t(alignment(p.d.data)));

    constexpr int kCandidates = 16;
    cublasLtMatmulHeuristicResult_t candidates[kCandidates]{};
    int found = 0;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(cuda.blaslt, &plan.operation, &plan.a, &plan.b, &plan.c, &plan.d, &preference,
                                                           kCandidates, candidates, &found);
    for (int i = 0; i < found && status == CUBLAS_STATUS_SUCCESS; ++i) {
        uint32_t reduction = 0;
        size_t written = 0;
        CUBLAS_CHECK(cublasLtMatmulAlgoConfigGetAttribute(&candidates[i].algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &reduction,
                                                          sizeof reduction, &written));
        if (candidates[i].state != CUBLAS_STATUS_SUCCESS || reduction == CUBLASLT_REDUCTION_SCHEME_INPLACE) continue;
        plan.candidates.push_back(candidates[i].algo);
    }
    if (!plan.candidates.empty()) return made;
    throw InternalError("cuBLASLt has no algorithm for " + p.describe() + ": " + cublasGetStatusString(status));
}

cublasStatus_t try_algorithm(const CudaContext& cuda, const Product& p, CublasLtPlan& plan, const cublasLtMatmulAlgo_t& algorithm, float beta) {
    return cublasLtMatmul(cuda.blaslt, &plan.operation, &p.alpha, p.b.data, &plan.a, p.a.data, &plan.b, &beta, p.c.data, &plan.c, p.d.data, &plan.d,
                          &algorithm, cuda.workspace, cuda.workspace_bytes, cuda.stream);
}

void run_algorithm(const CudaContext& cuda, const Product& p, CublasLtPlan& plan, const cublasLtMatmulAlgo_t& algorithm, float beta) {
    cublasStatus_t status = try_algorithm(cuda, p, plan, algorithm, beta);
    if (status != CUBLAS_STATUS_SUCCESS) throw InternalError("cublasLtMatmul failed for " + p.describe() + ": " + cublasGetStatusString(status));
}

constexpr int kMostTrials = 8;

// Smaller products are over before a better kernel could matter.
bool worth_tuning(const Product& p) { return 2.0 * double(p.m) * double(p.n) * double(p.k) >= 1e9; }

// What a matrix holds, for comparing results without keeping them: a 64-bit hash of position and bits, and how many elements are finite
// and not zero. Integer sums do not depend on their order.
struct Fingerprint {
    unsigned long long hash, nonzero;
    bool operator==(const Fingerprint& other) const { return hash == other.hash && nonzero == other.nonzero; }
};

template <class T> __global__ void fingerprint_kernel(Fingerprint* out, const T* d, int64_t ld, int64_t rows, int64_t cols) {
    unsigned long long hash = 0, nonzero = 0;
    for (int64_t r = blockIdx.x; r < rows; r += gridDim.x)
        for (int64_t c = threadIdx.x; c < cols; c += blockDim.x) {
            uint32_t bits = bits_of_float(to_float(d[r * ld + c]));
            unsigned long long x = (uint64_t(r * cols + c) << 32 ^ bits) * 0x9E3779B97F4A7C15ull;  // splitmix64's finalizer
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
            hash += (x ^ x >> 27) * 0x94D049BB133111EBull;
            nonzero += (bits << 1) != 0 && (bits & 0x7f800000u) != 0x7f800000u;
        }
    atomicAdd(&out->hash, hash);
    atomicAdd(&out->nonzero, nonzero);
}

Fingerprint fingerprint(const CudaContext& cuda, const Tensor& d) {
    auto* result = static_cast<Fingerprint*>(cuda.workspace);  // no product is running
    CUDA_CHECK(cudaMemsetAsync(result, 0, sizeof *result, cuda.stream));
    unsigned blocks = unsigned(std::min<int64_t>(d.rows, 4096));
    if (d.dtype == DType::bf16) fingerprint_kernel<<<blocks, 256, 0, cuda.stream>>>(result, d.as<bf16>(), d.ld, d.rows, d.cols);
    else fingerprint_kernel<<<blocks, 256, 0, cuda.stream>>>(result, d.as<float>(), d.ld, d.rows, d.cols);
    LAUNCH_CHECK();
    Fingerprint host{};
    CUDA_CHECK(cudaMemcpyAsync(&host, result, sizeof host, cudaMemcpyDeviceToHost, cuda.stream));
    CUDA_CHECK(cudaStreamSynchronize(cuda.stream));
    return host;
}

// Seconds of the faster of two runs.
double time_algorithm(const CudaContext& cuda, const Product& p, CublasLtPlan& plan, const cublasLtMatmulAlgo_t& algorithm) {
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    double best = 1e30;
    for (int run = 0; run < 2; ++run) {
        CUDA_CHECK(cudaEventRecord(begin, cuda.stream));
        run_algorithm(cuda, p, plan, algorithm, p.beta);
        CUDA_CHECK(cudaEventRecord(end, cuda.stream));
        CUDA_CHECK(cudaEventSynchronize(end));
        float milliseconds = 0;
        CUDA_CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
        best = std::min(best, double(milliseconds) * 1e-3);
    }
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    return best;
}

// The fastest of the plan's candidates among those whose result has the bits of the first one's becomes the only one. D serves as the
// place for trial results; where it is also C it is kept on the host meanwhile. Operands of zeros (B before it has learned
// anything) or NaN would make all results equal: then the choice is left to a later call, and nothing is lost, since the bits are the same.
// A result that stays mostly zeros ends the search after some trials.
void choose_algorithm(const CudaContext& cuda, const Product& p, CublasLtPlan& plan) {
    const bool in_place = p.beta != 0 && p.c.data == p.d.data;
    const size_t element = size_t(size_of(p.d.dtype)), width = size_t(p.d.cols) * element, pitch = size_t(p.d.ld) * element, rows = size_t(p.d.rows);
    std::vector<char> kept(in_place ? width * rows : 0);
    if (in_place) CUDA_CHECK(cudaMemcpy2DAsync(kept.data(), width, p.d.data, pitch, width, rows, cudaMemcpyDeviceToHost, cuda.stream));
    // The bare product first: only it shows whether there is anything to compare. Then with C, or on top of the bare product.
    auto result_of = [&](const cublasLtMatmulAlgo_t& algorithm) {
        run_algorithm(cuda, p, plan, algorithm, 0.0f);
        Fingerprint result = fingerprint(cuda, p.d);
        if (p.beta == 0) return result;
        run_algorithm(cuda, p, plan, algorithm, p.beta);
        result.hash = result.hash * 31 + fingerprint(cuda, p.d).hash;
        return result;
    };
    Fingerprint first = result_of(plan.candidates[0]);
    if (first.nonzero >= uint64_t(p.m * p.n) / 4) {
        double best = time_algorithm(cuda, p, plan, plan.candidates[0]);
        cublasLtMatmulAlgo_t chosen = plan.candidates[0];
        for (size_t i = 1; i < plan.candidates.size(); ++i) {
            // The library may refuse at run time what its heuristic offered.
            if (try_algorithm(cuda, p, plan, plan.candidates[i], 0.0f) != CUBLAS_STATUS_SUCCESS || !(result_of(plan.candidates[i]) == first)) continue;
            double seconds = time_algorithm(cuda, p, plan, plan.candidates[i]);
            if (seconds < best) best = seconds, chosen = plan.candidates[i];
        }
        plan.candidates.assign(1, chosen);
    } else if (first.nonzero && ++plan.trials == kMostTrials) {
        plan.candidates.erase(plan.candidates.begin() + 1, plan.candidates.end());  // sparse by nature, such as gradients of rows of padding
    }
    if (in_place) {
        CUDA_CHECK(cudaMemcpy2DAsync(p.d.data, pitch, kept.data(), width, width, rows, cudaMemcpyHostToDevice, cuda.stream));
        CUDA_CHECK(cudaStreamSynchronize(cuda.stream));
    }
}

template <class T> __global__ void scale_kernel(T* d, int64_t ld_d, const T* c, int64_t ld_c, int64_t rows, int64_t cols, float beta) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= rows * cols) return;
    int64_t r = i / cols, j = i % cols;
    store(d[r * ld_d + j], beta == 0 ? 0.0f : beta * to_float(c[r * ld_c + j]));
}

// D = beta·C, what is left of a product with k = 0.
template <class T> void scale_cuda(const CudaContext& cuda, const Product& p) {
    int64_t blocks = ceil_div(p.m * p.n, 256);
    scale_kernel<T><<<unsigned(blocks), 256, 0, cuda.stream>>>(p.d.as<T>(), p.d.ld, p.c.as<T>(), p.c.ld, p.m, p.n, p.beta);
    LAUNCH_CHECK();
}

void matmul_cuda(CudaContext& cuda, const Product& p) {
    if (p.k == 0) return p.d.dtype == DType::bf16 ? scale_cuda<bf16>(cuda, p) : scale_cuda<float>(cuda, p);
    if (!cuda.plans) cuda.plans = std::make_shared<CublasLtPlans>();
    CublasLtPlanKey key{p.m, p.n, p.k, int64_t(p.op_a), int64_t(p.op_b), int64_t(p.a.dtype), int64_t(p.d.dtype), p.a.ld, p.b.ld, p.c.ld, p.d.ld,
                        alignment(p.a.data), alignment(p.b.data), alignment(p.c.data), alignment(p.d.data), p.beta == 0, p.c.data == p.d.data, p.tf32};
    auto it = cuda.plans->by_key.find(key);
    if (it == cuda.plans->by_key.end()) it = cuda.plans->by_key.emplace(key, make_plan(cuda, p)).first;
    CublasLtPlan& plan = *it->second;
    if (plan.candidates.size() > 1 && cuda.times_products && worth_tuning(p)) choose_algorithm(cuda, p, plan);
    run_algorithm(cuda, p, plan, plan.candidates[0], p.beta);
}

}  // namespace
#endif

void matmul(Device& device, Tensor d, float alpha, Tensor a, Op op_a, Tensor b, Op op_b, float beta, Tensor c, Fp32Products products) {
    if (beta == 0) c = d;  // not read
    bool flip_a = op_a == Op::transpose, flip_b = op_b == Op::transpose;
    Product p{flip_a ? a.cols : a.rows, flip_b ? b.rows : b.cols, flip_a ? a.rows : a.cols, alpha, beta, a, b, c, d, op_a, op_b,
              products == Fp32Products::tf32 && a.dtype == DType::f32};
    CHECK_INTERNAL(p.k == (flip_b ? b.cols : b.rows) && d.rows == p.m && d.cols == p.n && c.rows == p.m && c.cols == p.n, "shapes differ: %s",
                   p.describe().c_str());
    CHECK_INTERNAL(c.data != d.data || c.ld == d.ld, "C is D with another ld: %s", p.describe().c_str());
    bool types = device.is_cuda() ? (a.dtype == DType::bf16 && d.dtype == DType::bf16) || d.dtype == DType::f32 : a.dtype == DType::f32 && d.dtype == DType::f32;
    CHECK_INTERNAL(types && a.dtype == b.dtype && c.dtype == d.dtype && (a.dtype == DType::f32 || a.dtype == DType::bf16),
                   "unsupported types: %s", p.describe().c_str());
    if (p.m == 0 || p.n == 0) return;
    OperationTimer timer(device, "matmul", 2.0 * double(p.m) * double(p.n) * double(p.k),
                         double((p.m * p.k + p.k * p.n) * size_of(a.dtype)) + double(p.m * p.n * size_of(d.dtype)) * (beta != 0 ? 2 : 1));
    ON_DEVICE(device, matmul_cuda(device.cuda(), p), matmul_cpu(p));
}

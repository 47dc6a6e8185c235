// For operation files compiled by nvcc: the CUDA side of a Device and the checks around every call.
#pragma once
#ifdef WITH_CUDA
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <cusolverDn.h>

#include <map>
#include <memory>
#include <string>

#include "runtime/error.h"

// One GPU's stream and library handles. cuBLASLt plans are cached per shape (see ops/matmul.cu).
struct CublasLtPlans;
struct CudaContext {
    int ordinal = 0;
    cudaDeviceProp properties{};
    cudaStream_t stream = nullptr;
    cublasLtHandle_t blaslt = nullptr;
    cublasHandle_t blas = nullptr;          // trsm and other level-3 calls that cuBLASLt lacks
    cusolverDnHandle_t solver = nullptr;
    cusolverDnParams_t solver_params = nullptr;
    void* workspace = nullptr;              // cuBLASLt workspace
    size_t workspace_bytes = 0;
    std::shared_ptr<CublasLtPlans> plans;
    bool times_products = true;             // choose among algorithms by timing; not on a fork, whose neighbours disturb the clock
    size_t lowest_free = size_t(-1);        // for the measured peak
};

#define CUDA_CHECK(call)                                                                                              \
    do {                                                                                                              \
        cudaError_t status_ = (call);                                                                                 \
        if (status_ != cudaSuccess)                                                                                   \
            throw InternalError(format("%s:%d: %s failed: %s", __FILE__, __LINE__, #call, cudaGetErrorString(status_))); \
    } while (0)

#define CUBLAS_CHECK(call)                                                                                            \
    do {                                                                                                              \
        cublasStatus_t status_ = (call);                                                                              \
        if (status_ != CUBLAS_STATUS_SUCCESS)                                                                         \
            throw InternalError(format("%s:%d: %s failed: %s", __FILE__, __LINE__, #call, cublasGetStatusString(status_))); \
    } while (0)

#define CUSOLVER_CHECK(call)                                                                                          \
    do {                                                                                                              \
        cusolverStatus_t status_ = (call);                                                                            \
        if (status_ != CUSOLVER_STATUS_SUCCESS)                                                                       \
            throw InternalError(format("%s:%d: %s failed: cuSOLVER status %d", __FILE__, __LINE__, #call, int(status_))); \
    } while (0)

// After every kernel launch.
#define LAUNCH_CHECK() CUDA_CHECK(cudaGetLastError())
#endif

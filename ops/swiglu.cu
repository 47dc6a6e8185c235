// SwiGLU; see swiglu.h.
#include "ops/swiglu.h"

#include "ops/fast_exp.h"
#include "ops/row_kernels.h"
#include "runtime/profile.h"

namespace {

void forward_cpu(Tensor a, Tensor gate_up) {
    const int64_t f = a.cols;
#pragma omp parallel for
    for (int64_t t = 0; t < a.rows; ++t) {
        float* out = a.as<float>() + t * a.ld;
        const float *g = gate_up.as<float>() + t * gate_up.ld, *u = g + f;
#pragma omp simd
        for (int64_t c = 0; c < f; ++c) out[c] = g[c] / (1.0f + fast_exp(-g[c])) * u[c];
    }
}

// Element c reads g, u, da before it writes dg, du, a at the same places, so dgate_up may be gate_up and a may be da.
template <bool kOutput> void backward_cpu(Tensor dgate_up, Tensor gate_up, Tensor da, Tensor a) {
    const int64_t f = da.cols;
#pragma omp parallel for
    for (int64_t t = 0; t < da.rows; ++t) {
        float *dg = dgate_up.as<float>() + t * dgate_up.ld, *du = dg + f, *out = kOutput ? a.as<float>() + t * a.ld : nullptr;
        const float *g = gate_up.as<float>() + t * gate_up.ld, *u = g + f, *grad = da.as<float>() + t * da.ld;
#pragma omp simd
        for (int64_t c = 0; c < f; ++c) {
            const float gate = g[c], up = u[c], d = grad[c], denominator = 1.0f + fast_exp(-gate), sigma = 1.0f / denominator;
            dg[c] = d * up * sigma * (1.0f + gate * (1.0f - sigma));
            du[c] = d * gate * sigma;
            if (kOutput) out[c] = gate / denominator * up;
        }
    }
}

#ifdef WITH_CUDA
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

template <int N>
__global__ void __launch_bounds__(RowLaunch::threads)
    forward_kernel(bf16* a, int64_t ld_a, const bf16* gate_up, int64_t ld_gate_up, int64_t f, RowLaunch launch) {
    int64_t t, group;
    if (!launch.locate(t, group)) return;
    const int64_t c = group * N;
    float g[N], u[N];
    load_n(gate_up + t * ld_gate_up + c, g);
    load_n(gate_up + t * ld_gate_up + f + c, u);
#pragma unroll
    for (int k = 0; k < N; ++k) u[k] *= g[k] * sigmoid(g[k]);
    store_n(a + t * ld_a + c, u);
}

// Each thread reads its elements before it writes them, so dgate_up may be gate_up and a may be da.
template <int N>
__global__ void __launch_bounds__(RowLaunch::threads)
    backward_kernel(bf16* dgate_up, int64_t ld_dgate_up, const bf16* gate_up, int64_t ld_gate_up, const bf16* da, int64_t ld_da, bf16* a, int64_t ld_a,
                    int64_t f, RowLaunch launch) {
    int64_t t, group;
    if (!launch.locate(t, group)) return;
    const int64_t c = group * N;
    float g[N], u[N], grad[N], out[N];
    load_n(gate_up + t * ld_gate_up + c, g);
    load_n(gate_up + t * ld_gate_up + f + c, u);
    load_n(da + t * ld_da + c, grad);
#pragma unroll
    for (int k = 0; k < N; ++k) {
        const float gate = g[k], up = u[k], sigma = sigmoid(gate);
        g[k] = grad[k] * up * sigma * (1.0f + gate * (1.0f - sigma));
        u[k] = grad[k] * gate * sigma;
        out[k] = up * (gate * sigma);
    }
    if (a) store_n(a + t * ld_a + c, out);
    store_n(dgate_up + t * ld_dgate_up + c, g);
    store_n(dgate_up + t * ld_dgate_up + f + c, u);
}

template <int N> void forward_cuda(CudaContext& cuda, Tensor a, Tensor gate_up) {
    const RowLaunch launch(a.rows, a.cols / N);
    forward_kernel<N><<<launch.blocks, launch.threads, 0, cuda.stream>>>(a.as<bf16>(), a.ld, gate_up.as<bf16>(), gate_up.ld, a.cols, launch);
    LAUNCH_CHECK();
}

void forward_cuda(CudaContext& cuda, Tensor a, Tensor gate_up) {
    if (a.numel() == 0) return;
    if (aligned_rows(a) && aligned_rows(gate_up) && a.cols % kVector == 0) forward_cuda<kVector>(cuda, a, gate_up);
    else forward_cuda<1>(cuda, a, gate_up);
}

template <int N> void backward_cuda(CudaContext& cuda, Tensor dgate_up, Tensor gate_up, Tensor da, Tensor a) {
    const RowLaunch launch(da.rows, da.cols / N);
    backward_kernel<N><<<launch.blocks, launch.threads, 0, cuda.stream>>>(dgate_up.as<bf16>(), dgate_up.ld, gate_up.as<bf16>(), gate_up.ld,
                                                                          da.as<bf16>(), da.ld, a ? a.as<bf16>() : nullptr, a.ld, da.cols, launch);
    LAUNCH_CHECK();
}

void backward_cuda(CudaContext& cuda, Tensor dgate_up, Tensor gate_up, Tensor da, Tensor a) {
    if (da.numel() == 0) return;
    if (aligned_rows(dgate_up) && aligned_rows(gate_up) && aligned_rows(da) && (!a || aligned_rows(a)) && da.cols % kVector == 0)
        backward_cuda<kVector>(cuda, dgate_up, gate_up, da, a);
    else backward_cuda<1>(cuda, dgate_up, gate_up, da, a);
}
#endif

}  // namespace

void swiglu_forward(Device& device, Tensor a, Tensor gate_up) {
    CHECK_INTERNAL(gate_up.rows == a.rows && gate_up.cols == 2 * a.cols, "a %lld × %lld, gate_up %lld × %lld", (long long)a.rows, (long long)a.cols,
                   (long long)gate_up.rows, (long long)gate_up.cols);
    OperationTimer timer(device, "swiglu_forward", 0, 3.0 * double(a.numel()) * size_of(a.dtype));
    ON_DEVICE(device, forward_cuda(device.cuda(), a, gate_up), forward_cpu(a, gate_up));
}

void swiglu_backward(Device& device, Tensor dgate_up, Tensor gate_up, Tensor da, Tensor a) {
    CHECK_INTERNAL(gate_up.rows == da.rows && gate_up.cols == 2 * da.cols && dgate_up.rows == da.rows && dgate_up.cols == 2 * da.cols,
                   "da %lld × %lld, gate_up %lld × %lld, dgate_up %lld × %lld", (long long)da.rows, (long long)da.cols, (long long)gate_up.rows,
                   (long long)gate_up.cols, (long long)dgate_up.rows, (long long)dgate_up.cols);
    CHECK_INTERNAL(!a || (a.rows == da.rows && a.cols == da.cols), "a %lld × %lld, da %lld × %lld", (long long)a.rows, (long long)a.cols,
                   (long long)da.rows, (long long)da.cols);
    OperationTimer timer(device, "swiglu_backward", 0, double(da.numel()) * size_of(da.dtype) * (5 + bool(a)));
    ON_DEVICE(device, backward_cuda(device.cuda(), dgate_up, gate_up, da, a),
              a ? backward_cpu<true>(dgate_up, gate_up, da, a) : backward_cpu<false>(dgate_up, gate_up, da, a));
}

// Rotary position embedding; see rope.h.
#include "ops/rope.h"

#include <cmath>

#include "ops/rope_rotation.h"
#include "ops/row_kernels.h"
#include "runtime/profile.h"

std::vector<float> rope_table(int64_t positions, int64_t head_dim, double base) {
    const int64_t half = head_dim / 2;
    std::vector<float> table(positions * head_dim);
    for (int64_t j = 0; j < half; ++j) {
        const double frequency = std::pow(base, -2.0 * double(j) / double(head_dim));
        for (int64_t p = 0; p < positions; ++p) {
            table[p * head_dim + j] = float(std::cos(double(p) * frequency));
            table[p * head_dim + half + j] = float(std::sin(double(p) * frequency));
        }
    }
    return table;
}

namespace {

// heads here is q and k heads together: they are adjacent and rotate alike. sign = −1 rotates backwards.
void rope_cpu(Tensor qkv, Tensor table, int64_t seq, int64_t heads, int64_t head_dim, float sign) {
    const int64_t half = head_dim / 2;
#pragma omp parallel for
    for (int64_t t = 0; t < qkv.rows; ++t) {
        const float *cosine = table.as<float>() + t % seq * table.ld, *sine = cosine + half;
        for (int64_t head = 0; head < heads; ++head) {
            float *first = qkv.as<float>() + t * qkv.ld + head * head_dim, *second = first + half;
#pragma omp simd
            for (int64_t j = 0; j < half; ++j) {
                const float a = first[j], b = second[j], s = sign * sine[j];
                first[j] = a * cosine[j] - b * s;
                second[j] = b * cosine[j] + a * s;
            }
        }
    }
}

#ifdef WITH_CUDA
constexpr int kWarpsPerBlock = 8;

// One warp per row; a lane rotates N adjacent pairs of one head at a time.
template <int N>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp)
    rope_kernel(bf16* qkv, int64_t ld, const float* table, int64_t ld_table, int64_t rows, int64_t seq, int heads, int half, float sign) {
    const int64_t t = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
    if (t >= rows) return;
    qkv += t * ld;
    table += t % seq * ld_table;
    const int groups_per_head = half / N, groups = heads * groups_per_head;
#pragma unroll 2
    for (int i = threadIdx.x % kWarp; i < groups; i += kWarp) {
        const int j = i % groups_per_head * N;
        bf16* first = qkv + i / groups_per_head * 2 * half + j;
        float a[N], b[N], cosine[N], sine[N];
        load_n(first, a);
        load_n(first + half, b);
        load_n(table + j, cosine);
        load_n(table + half + j, sine);
#pragma unroll
        for (int k = 0; k < N; ++k) rotate_pair(a[k], b[k], cosine[k], sign * sine[k]);
        store_n(first, a);
        store_n(first + half, b);
    }
}

void rope_cuda(CudaContext& cuda, Tensor qkv, Tensor table, int64_t seq, int64_t heads, int64_t head_dim, float sign) {
    if (qkv.rows == 0) return;
    const int64_t half = head_dim / 2;
    const unsigned blocks = unsigned(ceil_div(qkv.rows, kWarpsPerBlock));
    auto launch = [&](auto kernel) {
        kernel<<<blocks, kWarpsPerBlock * kWarp, 0, cuda.stream>>>(qkv.as<bf16>(), qkv.ld, table.as<float>(), table.ld, qkv.rows, seq, int(heads),
                                                                  int(half), sign);
    };
    if (aligned_rows(qkv) && aligned_rows(table) && half % kVector == 0) launch(rope_kernel<kVector>);
    else launch(rope_kernel<1>);
    LAUNCH_CHECK();
}
#endif

}  // namespace

void rope_inplace(Device& device, Tensor qkv, Tensor table, int64_t seq, int64_t heads, int64_t kv_heads, int64_t head_dim, bool inverse) {
    CHECK_INTERNAL(head_dim % 2 == 0 && qkv.cols >= (heads + 2 * kv_heads) * head_dim, "qkv of %lld columns, %lld + 2·%lld heads of %lld",
                   (long long)qkv.cols, (long long)heads, (long long)kv_heads, (long long)head_dim);
    CHECK_INTERNAL(seq > 0 && table.rows >= seq && table.cols == head_dim, "table %lld × %lld, seq %lld, head %lld", (long long)table.rows,
                   (long long)table.cols, (long long)seq, (long long)head_dim);
    const float sign = inverse ? -1.0f : 1.0f;
    OperationTimer timer(device, "rope_inplace", 0, 2.0 * double(qkv.rows * (heads + kv_heads) * head_dim) * size_of(qkv.dtype));
    ON_DEVICE(device, rope_cuda(device.cuda(), qkv, table, seq, heads + kv_heads, head_dim, sign),
              rope_cpu(qkv, table, seq, heads + kv_heads, head_dim, sign));
}

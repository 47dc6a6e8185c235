// Rotary position embedding: time and bandwidth on one GPU, see bench.h.
//   make build/bench_rope && build/bench_rope
#include "bench/kernels/bench.h"
#include "ops/rope.h"

namespace {

constexpr int64_t kSeq = 256;

Tensor table_on(Tensors& tensors, int64_t head_dim) {
    const std::vector<float> host = rope_table(kSeq, head_dim, 1e4);
    Tensor table = tensors.empty(DType::f32, kSeq, head_dim);
    tensors.device().upload(table.data, host.data(), table.bytes());
    return table;
}

}  // namespace

int main() {
    return run_bench([](Bench& bench) {
        for (int64_t head_dim : {64, 128})
            bench.check("rope", 5e-3, [&](Tensors& tensors) {
                Tensor qkv = tensors.activation(2 * kSeq, 8 * head_dim), table = table_on(tensors, head_dim);
                rope_inplace(tensors.device(), qkv, table, kSeq, 4, 2, head_dim, false);
                return std::vector<Tensor>{qkv};
            });
        for (const ModelShape& model : kModels)
            for (int64_t tokens : kTokens) {
                Tensors tensors(bench.gpu());
                Tensor qkv = tensors.activation(tokens, 3 * model.heads * model.head_dim), table = table_on(tensors, model.head_dim);
                // q and k, read and written; v is left alone.
                bench.time("rope_inplace", shape_name(model, tokens, qkv.cols).c_str(), 4.0 / 3 * double(qkv.bytes()),
                           [&] { rope_inplace(bench.gpu(), qkv, table, kSeq, model.heads, model.heads, model.head_dim, false); });
            }
    });
}

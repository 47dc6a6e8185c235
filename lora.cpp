// Where P is trained like B: LoRA and its kin. How the factors start, and ReLoRA's restarts. Training itself is the layer's (loqt.cpp).
#include <algorithm>
#include <cmath>

#include "loqt.h"
#include "ops/elementwise.h"
#include "ops/linalg.h"
#include "ops/matmul.h"
#include "ops/random.h"
#include "runtime/profile.h"

namespace {

constexpr uint32_t kFactorStream = 0x10000000;  // apart from the parameters' other random numbers

// The `share` of the elements of the second moment that are smallest; of equal ones the first.
std::vector<int64_t> smallest_elements(const std::vector<float>& second_moment, double share) {
    std::vector<int64_t> order(second_moment.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(i);
    const int64_t count = std::min<int64_t>(int64_t(order.size()), std::llround(share * double(order.size())));
    auto smaller = [&](int64_t a, int64_t b) {
        float x = second_moment[size_t(a)], y = second_moment[size_t(b)];
        return x < y || (x == y && a < b);
    };
    if (count < int64_t(order.size())) std::nth_element(order.begin(), order.begin() + count, order.end(), smaller);
    order.resize(size_t(count));
    return order;
}

}  // namespace

void LinearGroup::initialize_factors(Device& device, Linear& l, Tensor w) {
    const bool factorizes = config_->method.name == "loftq";
    if (factorizes && !owns(device, l)) return;  // share_initial will bring them
    if (!factorizes || !loftq_factors(device, l, w)) random_factors(device, l, 0);
}

// On the side of x uniform numbers within ±1/√in, on the other zeros: W_eff is W. That is nn.Linear's Kaiming initialization with a = √5, as loralib and PEFT have it.
void LinearGroup::random_factors(Device& device, Linear& l, int64_t step) {
    Parameter &first = l.right ? l.b : l.a, &second = l.right ? l.a : l.b;
    ScratchScope scope(device);
    Tensor uniform = scope.tensor("initial factor", DType::f32, first.rows, first.cols);
    fill_uniform(device, uniform, 1.0f / std::sqrt(float(l.in)), uint64_t(config_->train.seed), kFactorStream + first.stream + (uint32_t(step) << 12));
    convert(device, first.logical(first.value), uniform);
    device.zero(second.value);
    l.projected = true;
}

// LoftQ, Algorithm 1: Q ← NF4(W − s·P·B), then s·P·B ← the best approximation of rank r of W − deq(Q), its singular values shared evenly by both factors.
// False where quantization lost nothing, W being zero for one: two factors of zeros would never learn.
bool LinearGroup::loftq_factors(Device& device, Linear& l, Tensor w) {
    const float s = scale_;
    ScratchScope scope(device);
    Tensor target = scope.tensor("residual of quantization", DType::f32, l.out, l.in);
    Tensor p = scope.tensor("P in fp32", DType::f32, l.rank, l.h()), b = scope.tensor("B in fp32", DType::f32, l.n(), l.rank);
    Tensor diagonal_matrix = scope.tensor("factors' scales", DType::f32, l.rank, l.rank), product = scope.tensor("scaled factor", DType::f32, std::max(l.n(), l.rank), std::max(l.h(), l.rank));
    for (int64_t round = 0; round < config_->method.loftq_rounds; ++round) {
        convert(device, target, w);
        if (round > 0) add_adapter(device, l, target, p, b, 1.0f, -scale_);
        nf4_quantize(device, l.w_q, target, nullptr);
        nf4_dequantize(device, target, l.w_q);
        axpby(device, target, 1.0f, w, -1.0f);  // W − deq(Q)
        ProjectionResult result = leading_singular_vectors(device, p, target, l.right, ProjectionMethod::gram, Tensor{}, uint64_t(config_->train.seed), 0);
        if (!result.ok && !device.dry()) return false;
        matmul(device, b, 1.0f / s, target, l.right ? Op::transpose : Op::none, p, Op::transpose);
        balance(device, p, b, diagonal_matrix, product);
    }
    convert(device, l.a.logical(l.a.value), p);
    convert(device, l.b.logical(l.b.value), b);
    return l.projected = true;
}

// Rows of P are orthonormal, B holds the rest: gives row i of P and column i of B the same length, P·B staying what it is.
void LinearGroup::balance(Device& device, Tensor p, Tensor b, Tensor scales, Tensor product) const {
    const int64_t r = p.rows;
    matmul(device, scales, 1.0f, b, Op::transpose, b, Op::none);
    std::vector<float> squares = diagonal(device, scales), matrix(size_t(r * r));
    auto multiply = [&](bool rows, auto factor_of) {
        std::fill(matrix.begin(), matrix.end(), 0.0f);
        for (int64_t i = 0; i < r; ++i) {
            float length = std::sqrt(std::sqrt(squares[size_t(i)]));  // √σ
            matrix[size_t(i * r + i)] = length > 0 ? factor_of(length) : 1.0f;
        }
        device.upload(scales.data, matrix.data(), scales.bytes());
        Tensor from = rows ? p : b, to{product.data, DType::f32, from.rows, from.cols, from.cols};
        if (rows) matmul(device, to, 1.0f, scales, Op::none, from, Op::none);
        else matmul(device, to, 1.0f, from, Op::none, scales, Op::none);
        convert(device, from, to);
    };
    multiply(true, [](float length) { return length; });
    multiply(false, [](float length) { return 1.0f / length; });
}

// ReLoRA's restart: W takes the adapter in, the factors start anew, most of Adam's moments are set to zero. The function of the layer stays what it was.
// Both moments lose the same elements. Pruned each by its own magnitude, as the authors' code does, some elements keep m and lose v, and the next steps move
// them by lr·m/√(0.001·g²), which has no bound: two of twelve runs of a small model jumped back to where they began.
void LinearGroup::restart(Device& device, Linear& l, int64_t step) {
    {
        ScratchScope scope(device);
        Tensor w = scope.tensor("merged weights", DType::f32, l.out, l.in), p = scope.tensor("P in fp32", DType::f32, l.rank, l.h()),
               b = scope.tensor("B in fp32", DType::f32, l.n(), l.rank);
        load_w(device, w, l);
        convert(device, p, l.a.value);
        convert(device, b, l.b.logical(l.b.value));
        add_adapter(device, l, w, p, b, 1.0f, scale_);
        store_w(device, l, w);
    }
    random_factors(device, l, step);
    for (Parameter* parameter : {&l.a, &l.b}) {
        AdamState& state = parameter->moments;
        if (state.correction) device.zero(state.correction);
        const int64_t n = parameter->rows * parameter->cols;
        std::vector<int64_t> pruned;
        for (bool second : {true, false}) {
            ScratchScope scope(device);
            Tensor moment = scope.tensor("moment in fp32", DType::f32, 1, n);
            adam_load_moment(device, moment, state, second);
            if (device.dry()) continue;
            std::vector<float> host(static_cast<size_t>(n));
            device.download(host.data(), moment.data, moment.bytes());
            if (second) pruned = smallest_elements(host, config_->method.relora_prune);
            for (int64_t i : pruned) host[size_t(i)] = 0;
            device.upload(moment.data, host.data(), moment.bytes());
            adam_store_moment(device, state, second, moment, uint64_t(config_->train.seed), parameter->stream, uint32_t(step));
        }
    }
    l.next_ready = l.merged = true;
}

// A row-major matrix seen as the flat sequence of its *logical* elements: padding (ld > cols) is skipped. Block-wise formats
// (NF4, 8-bit Adam) count their blocks in this order, so a block may straddle rows.
#pragma once
#include <type_traits>

#include "runtime/tensor.h"

template <class T> struct FlatMatrix {
    T* data;
    int64_t cols, ld, numel;

    // A contiguous matrix becomes a single row, so no index arithmetic is left.
    explicit FlatMatrix(const Tensor& t)
        : data(t.as<std::remove_const_t<T>>()), cols(t.contiguous() ? t.numel() : t.cols), ld(t.contiguous() ? t.numel() : t.ld), numel(t.numel()) {}
    HOST_DEVICE FlatMatrix(T* data_, int64_t numel_) : data(data_), cols(numel_), ld(numel_), numel(numel_) {}
};

// Walks the logical elements from one flat index on: *cursor, then ++cursor.
template <class T> class FlatCursor {
  public:
    HOST_DEVICE FlatCursor(const FlatMatrix<T>& matrix, int64_t begin) : cols_(matrix.cols), gap_(matrix.ld - matrix.cols) {
        // 64-bit division is slow on a GPU; nearly every tensor is small enough for the 32-bit one.
        int64_t row = begin < matrix.cols ? 0 : (begin >> 32) == 0 && (matrix.cols >> 32) == 0 ? int64_t(uint32_t(begin) / uint32_t(matrix.cols)) : begin / matrix.cols;
        column_ = begin - row * matrix.cols;
        pointer_ = matrix.data + row * matrix.ld + column_;
    }
    HOST_DEVICE T& operator*() const { return *pointer_; }
    HOST_DEVICE T* pointer() const { return pointer_; }
    HOST_DEVICE int64_t left_in_row() const { return cols_ - column_; }
    HOST_DEVICE FlatCursor& operator++() {
        ++pointer_;
        if (++column_ == cols_) column_ = 0, pointer_ += gap_;
        return *this;
    }

  private:
    T* pointer_;
    int64_t column_, cols_, gap_;
};

#ifdef WITH_CUDA
// Eight elements moved with 16-byte accesses (8-byte for bytes).
template <class T> struct Pack8 {
    using Word = std::conditional_t<sizeof(T) == 1, uint2, uint4>;
    static constexpr int words = 8 * sizeof(T) / sizeof(Word);
    union {
        T x[8];
        Word word[words];
    };
    static __device__ bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & (sizeof(Word) - 1)) == 0; }
    __device__ void load(const T* p) {
#pragma unroll
        for (int i = 0; i < words; ++i) word[i] = reinterpret_cast<const Word*>(p)[i];
    }
    __device__ void store(T* p) const {
#pragma unroll
        for (int i = 0; i < words; ++i) reinterpret_cast<Word*>(p)[i] = word[i];
    }
};

// x = elements begin .. begin + count − 1 (count ≤ 8) as fp32, the rest 0.
template <class T> __device__ void load8(const FlatMatrix<T>& matrix, int64_t begin, int count, float (&x)[8]) {
    using Value = std::remove_const_t<T>;
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] = 0.0f;
    if (count <= 0) return;
    FlatCursor<T> cursor(matrix, begin);
    if (count == 8 && cursor.left_in_row() >= 8 && Pack8<Value>::aligned(cursor.pointer())) {
        Pack8<Value> pack;
        pack.load(cursor.pointer());
#pragma unroll
        for (int k = 0; k < 8; ++k) x[k] = to_float(pack.x[k]);
    } else {
#pragma unroll
        for (int k = 0; k < 8; ++k)
            if (k < count) {
                x[k] = to_float(*cursor);
                ++cursor;
            }
    }
}

// Elements begin .. begin + count − 1 = x[0 .. count − 1].
template <class T> __device__ void store8(const FlatMatrix<T>& matrix, int64_t begin, int count, const T (&x)[8]) {
    if (count <= 0) return;
    FlatCursor<T> cursor(matrix, begin);
    if (count == 8 && cursor.left_in_row() >= 8 && Pack8<T>::aligned(cursor.pointer())) {
        Pack8<T> pack;
#pragma unroll
        for (int k = 0; k < 8; ++k) pack.x[k] = x[k];
        pack.store(cursor.pointer());
    } else {
#pragma unroll
        for (int k = 0; k < 8; ++k)
            if (k < count) {
                *cursor = x[k];
                ++cursor;
            }
    }
}
#endif

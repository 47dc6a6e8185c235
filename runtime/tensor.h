// A tensor is a 2-D row-major view: pointer, element type, rows, columns, leading dimension (elements from row to row).
// It owns nothing. Vectors are one row. Anything of higher rank (tokens × heads × head size) is a matrix with fused columns.
#pragma once
#include <cstdint>

#include "runtime/bfloat16.h"
#include "runtime/error.h"

enum class DType : uint8_t { f32, bf16, u8, i16, i32, f64 };

inline int64_t size_of(DType t) {
    switch (t) {
        case DType::f64: return 8;
        case DType::f32: case DType::i32: return 4;
        case DType::bf16: case DType::i16: return 2;
        case DType::u8: return 1;
    }
    return 0;
}

// The name safetensors uses for the type.
inline const char* safetensors_name(DType t) {
    switch (t) {
        case DType::f64: return "F64";
        case DType::f32: return "F32";
        case DType::i32: return "I32";
        case DType::bf16: return "BF16";
        case DType::i16: return "I16";
        case DType::u8: return "U8";
    }
    return "?";
}

struct Tensor {
    void* data = nullptr;
    DType dtype = DType::f32;
    int64_t rows = 0, cols = 0, ld = 0;  // ld ≥ cols

    int64_t numel() const { return rows * cols; }
    int64_t bytes() const { return rows * ld * size_of(dtype); }  // footprint in memory, padding included
    Tensor flat() const { return Tensor{data, dtype, 1, rows * ld, rows * ld}; }  // the footprint as one row
    bool contiguous() const { return ld == cols || rows == 1; }
    explicit operator bool() const { return data != nullptr; }

    // Typed pointer to the first element; the type must match dtype.
    template <class T> T* as() const {
        CHECK_INTERNAL(int64_t(sizeof(T)) == size_of(dtype), "tensor of %s read with a %zu-byte type", safetensors_name(dtype), sizeof(T));
        return static_cast<T*>(data);
    }
    char* at(int64_t r, int64_t c) const { return static_cast<char*>(data) + (r * ld + c) * size_of(dtype); }
    Tensor row_slice(int64_t begin, int64_t count) const { return Tensor{at(begin, 0), dtype, count, cols, ld}; }
    Tensor col_slice(int64_t begin, int64_t count) const { return Tensor{at(0, begin), dtype, rows, count, ld}; }
};

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

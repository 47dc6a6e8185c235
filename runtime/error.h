// Errors a person can act on. Two kinds, told apart by exit code:
//   UserError      the input is at fault (flag, file, shape, disk): one line, exit code 2
//   InternalError  a failed CUDA/cuBLAS/cuSOLVER/NCCL call or a broken invariant: one line with file:line, exit code 1
// main() prints what() and exits; nothing about input is ever an assert.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

struct UserError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct InternalError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// printf into a std::string.
__attribute__((format(printf, 1, 2))) inline std::string format(const char* fmt, ...) {
    va_list args, again;
    va_start(args, fmt);
    va_copy(again, args);
    int n = std::vsnprintf(nullptr, 0, fmt, args);
    va_end(args);
    std::string text(n > 0 ? n : 0, '\0');
    if (n > 0) std::vsnprintf(&text[0], n + 1, fmt, again);
    va_end(again);
    return text;
}

// REQUIRE-like check of the program's own invariants (shapes, sizes); never for user input.
#define CHECK_INTERNAL(condition, ...)                                                                           \
    do {                                                                                                         \
        if (!(condition)) throw InternalError(format("%s:%d: %s: ", __FILE__, __LINE__, #condition) + format(__VA_ARGS__)); \
    } while (0)

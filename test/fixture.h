// Reads the fixture files of test/fixtures (format in make_nf4_fixtures.py) into named tensors.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "runtime/tensor.h"

struct Fixture {
    DType dtype;
    std::vector<char> bytes;

    template <class T> std::vector<T> as() const {
        std::vector<T> out(bytes.size() / sizeof(T));
        std::memcpy(out.data(), bytes.data(), out.size() * sizeof(T));
        return out;
    }
    std::vector<float> floats() const {  // bf16 and u8 widened
        if (dtype == DType::f32) return as<float>();
        std::vector<float> out;
        if (dtype == DType::bf16)
            for (bf16 x : as<bf16>()) out.push_back(to_float(x));
        else
            for (uint8_t x : as<uint8_t>()) out.push_back(x);
        return out;
    }
};

// path: relative to the repository root, where tests run.
inline std::map<std::string, Fixture> read_fixtures(const std::string& path) {
    std::FILE* file = std::fopen(path.c_str(), "rb");
    if (!file) throw UserError("cannot open " + path + ": run the tests from the repository root");
    std::map<std::string, Fixture> fixtures;
    auto read = [&](void* p, size_t n) {
        if (std::fread(p, 1, n, file) != n) throw UserError(path + ": truncated");
    };
    uint32_t length, type;
    uint64_t count;
    const DType types[3] = {DType::f32, DType::bf16, DType::u8};
    while (std::fread(&length, 1, 4, file) == 4) {
        std::string name(length, ' ');
        read(&name[0], length), read(&type, 4), read(&count, 8);
        Fixture& f = fixtures[name];
        f.dtype = types[type];
        f.bytes.resize(count * size_of(f.dtype));
        read(f.bytes.data(), f.bytes.size());
    }
    std::fclose(file);
    return fixtures;
}

// Files for tests: a directory that removes itself, whole files as bytes, and the place of the fixtures.
#pragma once
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "test/catch.h"

class TempDir {
  public:
    TempDir() {
        // In memory where possible: every checkpoint is synced, which costs a real disk some 10 ms.
        bool memory = access("/dev/shm", W_OK) == 0;
        std::string pattern = (memory ? "/dev/shm" : std::filesystem::temp_directory_path().string()) + "/train_loqt_test_XXXXXX";
        REQUIRE(mkdtemp(&pattern[0]) != nullptr);
        path = pattern;
    }
    ~TempDir() {
        std::error_code ignored;
        std::filesystem::remove_all(path, ignored);
    }
    TempDir(const TempDir&) = delete;
    std::string operator/(const std::string& name) const { return path + "/" + name; }
    size_t files() const { return size_t(std::distance(std::filesystem::directory_iterator(path), std::filesystem::directory_iterator())); }

    std::string path;
};

inline std::string file_bytes(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    REQUIRE(in);
    return std::string(std::istreambuf_iterator<char>(in), {});
}

inline void put_file(const std::string& path, const std::string& bytes) {
    std::ofstream out(path, std::ios::binary | std::ios::trunc);
    out << bytes;
    REQUIRE(out.flush());
}

// A path in the source tree, found from where this header was compiled.
inline std::string repository_path(const std::string& relative) {
    std::filesystem::path root = std::filesystem::path(__FILE__).parent_path().parent_path();
    return (root / relative).string();
}

// The text of the UserError that f throws; fails the test if it throws none.
template <class F> std::string user_error(F f) {
    try {
        f();
    } catch (const UserError& error) {
        return error.what();
    }
    FAIL("no UserError was thrown");
    return "";
}

inline bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// While it lives no file of this process can grow past `bytes`: writes fail with EFBIG after a part was written, like a full disk.
class FileSizeLimit {
  public:
    explicit FileSizeLimit(rlim_t bytes) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
        getrlimit(RLIMIT_FSIZE, &before_);
        rlimit limit{bytes, before_.rlim_max};
        setrlimit(RLIMIT_FSIZE, &limit);
    }
    ~FileSizeLimit() {
        setrlimit(RLIMIT_FSIZE, &before_);
        std::signal(SIGXFSZ, handler_);
    }
    FileSizeLimit(const FileSizeLimit&) = delete;

  private:
    rlimit before_{};
    void (*handler_)(int);
};

// Atomic files. See files.h.
#include "runtime/files.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "runtime/error.h"

namespace fs = std::filesystem;

namespace {

constexpr const char* kTemporaryMark = ".tmp-";  // <name>.tmp-<process>-<n>

std::string directory_of(const std::string& path) {
    std::string parent = fs::path(path).parent_path().string();
    return parent.empty() ? "." : parent;
}

const char* remedy(int error) {
    switch (error) {
        case ENOSPC: case EDQUOT: return "free some space on that disk (or quota), or choose another directory";
        case EFBIG: return "the file is larger than allowed; raise the limit (ulimit -f) or choose another file system";
        case EACCES: case EPERM: case EROFS: return "check the permissions of the directory, or choose another one";
        case ENOENT: case ENOTDIR: return "check the path";
        case EIO: return "the disk reports a fault (see dmesg); choose another one";
        case EMFILE: case ENFILE: return "too many files are open; raise the limit (ulimit -n)";
        default: return "check the path and its file system";
    }
}

// Runs a system call again while signals interrupt it.
template <class Call> auto uninterrupted(Call call) {
    auto result = call();
    while (result < 0 && errno == EINTR) result = call();
    return result;
}

void sync_directory(const std::string& directory) {
    int fd = open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) throw_file_error("open directory", directory, errno);
    int error = uninterrupted([&] { return fsync(fd); }) < 0 ? errno : 0;
    close(fd);  // nothing was written through it
    // Some file systems cannot sync directories and say EINVAL; they have no more to offer.
    if (error && error != EINVAL) throw_file_error("sync directory", directory, error);
}

}  // namespace

void throw_file_error(const char* action, const std::string& path, int error) {
    throw UserError(format("cannot %s %s: %s; %s", action, path.c_str(), std::strerror(error), remedy(error)));
}

AtomicFile::AtomicFile(const std::string& path, int64_t bytes) : path_(path) {
    struct statvfs disk;
    if (statvfs(directory_of(path).c_str(), &disk) < 0) throw_file_error("write", path, errno);
    double available = double(disk.f_bavail) * double(disk.f_frsize);
    if (double(bytes) > available)
        throw UserError(format("cannot write %s: it needs %.2f MiB and the disk has %.2f MiB free; %s", path.c_str(), double(bytes) / 1048576.0,
                               available / 1048576.0, remedy(ENOSPC)));
    for (int n = 0; fd_ < 0; ++n) {
        temporary_ = format("%s%s%d-%d", path.c_str(), kTemporaryMark, int(getpid()), n);
        fd_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd_ < 0 && errno != EEXIST && errno != EINTR) throw_file_error("write", path, errno);
    }
    // Held while the writer lives; where a file system has no locks, temporaries of dead writers merely stay.
    flock(fd_, LOCK_EX | LOCK_NB);
}

AtomicFile::~AtomicFile() {
    if (temporary_.empty()) return;
    if (fd_ >= 0) close(fd_);
    unlink(temporary_.c_str());
}

void AtomicFile::write_at(int64_t offset, const void* data, int64_t bytes) {
    const char* p = static_cast<const char*>(data);
    while (bytes > 0) {
        ssize_t n = uninterrupted([&] { return pwrite(fd_, p, size_t(bytes), off_t(offset)); });
        if (n < 0) throw_file_error("write", path_, errno);
        if (n == 0) throw_file_error("write", path_, EIO);
        p += n, offset += n, bytes -= n;
    }
}

void AtomicFile::commit() {
    if (uninterrupted([&] { return fsync(fd_); }) < 0) throw_file_error("write", path_, errno);
    int fd = fd_;
    fd_ = -1;  // closed below, whether or not that reports an error
    if (close(fd) < 0 && errno != EINTR) throw_file_error("write", path_, errno);
    if (rename(temporary_.c_str(), path_.c_str()) < 0) throw_file_error("write", path_, errno);
    temporary_.clear();
    sync_directory(directory_of(path_));
}

std::string read_file(const std::string& path) {
    FILE* f = std::fopen(path.c_str(), "rb");
    if (!f) throw_file_error("read", path, errno);
    std::string text;
    char buffer[1 << 16];
    while (size_t n = std::fread(buffer, 1, sizeof buffer, f)) text.append(buffer, n);
    int error = std::ferror(f) ? errno : 0;
    std::fclose(f);
    if (error) throw_file_error("read", path, error);
    return text;
}

void write_file(const std::string& path, const std::string& text) {
    AtomicFile file(path, int64_t(text.size()));
    file.write_at(0, text.data(), int64_t(text.size()));
    file.commit();
}

void make_directories(const std::string& path) {
    std::error_code error;
    fs::create_directories(path, error);
    if (error) throw_file_error("create directory", path, error.value());
}

DirectoryLock::DirectoryLock(const std::string& directory) : fd_(open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
    if (fd_ < 0) throw_file_error("open directory", directory, errno);
    if (flock(fd_, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) return;  // a file system without locks cannot tell
    close(fd_);
    throw UserError(directory + " is in use by another train_loqt; stop that one first, or choose another directory");
}

DirectoryLock::~DirectoryLock() { close(fd_); }

void remove_abandoned_temporaries(const std::string& directory) {
    std::error_code ignored;  // housekeeping: a directory or file that cannot be read is left alone
    for (const auto& entry : fs::directory_iterator(directory, ignored)) {
        if (entry.path().filename().string().find(kTemporaryMark) == std::string::npos || !entry.is_regular_file(ignored)) continue;
        int fd = open(entry.path().c_str(), O_RDONLY | O_CLOEXEC);
        if (fd < 0) continue;
        if (flock(fd, LOCK_EX | LOCK_NB) == 0) unlink(entry.path().c_str());
        close(fd);
    }
}

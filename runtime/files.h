// Files that are there whole or not at all, and errors that say what to do about them.
#pragma once
#include <cstdint>
#include <string>

// Throws UserError "cannot <action> <path>: <text of the errno value>; <remedy>".
[[noreturn]] void throw_file_error(const char* action, const std::string& path, int error);

// A new file that appears under its name only when complete: written under a temporary name in the same directory, then fsync,
// close, rename, fsync of the directory. If anything fails, or commit() is never reached, the temporary is removed and whatever
// stood under the name before is untouched. Every failure is a UserError with path, cause and remedy.
class AtomicFile {
  public:
    // bytes: the final size, checked against the free space of the disk before anything is written; 0 = unknown.
    AtomicFile(const std::string& path, int64_t bytes);
    ~AtomicFile();
    AtomicFile(const AtomicFile&) = delete;

    void write_at(int64_t offset, const void* data, int64_t bytes);
    void commit();

  private:
    std::string path_, temporary_;
    int fd_ = -1;
};

// The whole of a file as text, and a file made of one text.
std::string read_file(const std::string& path);
void write_file(const std::string& path, const std::string& text);

// Creates a directory and its parents; no error if it is there already.
void make_directories(const std::string& path);

// Holds a directory for this process alone, until destroyed or the process ends, however it ends. UserError if another process holds it.
class DirectoryLock {
  public:
    explicit DirectoryLock(const std::string& directory);
    ~DirectoryLock();
    DirectoryLock(const DirectoryLock&) = delete;

  private:
    int fd_;
};

// Removes the temporaries in a directory whose writers died (killed, power cut): those that nobody holds a lock on any more.
void remove_abandoned_temporaries(const std::string& directory);

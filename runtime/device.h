// The device: where tensors live and operations run. One value holds stream, library handles and scratch memory;
// there are no globals. The same model and loop run on
//   cpu   plain loops with OpenMP, fp32 (the reference)
//   cuda  kernels and cuBLASLt, bf16 with fp32 accumulation
// and a *dry* device of either kind runs the same program without memory or arithmetic: every operation returns at once and
// only the books are kept. That is how the memory plan is made, so plan and run cannot disagree.
#pragma once
#include <atomic>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "runtime/tensor.h"

class Communicator;  // comm/communicator.h
class Profiler;      // runtime/profile.h
class Workers;       // runtime/workers.h
struct CudaContext;  // streams and handles; defined in runtime/cuda_context.h for operation files only

enum class DeviceKind { cpu, cuda };

class Device {
  public:
    // which: "cpu", "cuda", "cuda:N", "auto" (a GPU if one is usable, else the CPU). Throws UserError if cuda is asked for
    // and not there (or not built in); the message says which.
    static std::unique_ptr<Device> open(const std::string& which);
    // A dry device of the given kind; needs no hardware.
    static std::unique_ptr<Device> open_dry(DeviceKind kind);
    // True if a CUDA device can be used by this binary on this machine; why_not says what is missing.
    static bool cuda_usable(std::string* why_not = nullptr);
    static int cuda_count();  // of the usable GPUs
    // A second device on the same hardware with a stream, library handles, workspace and scratch of its own, for another host thread; dry
    // if this one is. Memory is shared; the order of work is not: see wait_for. Its library workspace and handles take fork_bytes().
    std::unique_ptr<Device> fork() const;
    static int64_t fork_bytes(DeviceKind kind);
    static constexpr int64_t kBlasWorkspaceBytes = int64_t(64) << 20;  // of a cuda device and of every fork
    ~Device();
    Device(const Device&) = delete;

    DeviceKind kind() const { return kind_; }
    bool is_cuda() const { return kind_ == DeviceKind::cuda; }
    bool dry() const { return dry_; }
    // bf16 on cuda, f32 on cpu: activations, effective weights and B.
    DType activation_dtype() const { return is_cuda() ? DType::bf16 : DType::f32; }
    const std::string& name() const { return name_; }  // "NVIDIA H200", "CPU, 2 threads"
    CudaContext& cuda() const { return *cuda_; }
    // Not owned; null (the rule) when nothing is being timed.
    Profiler* profiler() const { return profiler_; }
    void attach_profiler(Profiler* profiler) { profiler_ = profiler; }
    // Not owned; null: whatever could be given to another thread is done at once.
    Workers* workers() const { return workers_; }
    void attach_workers(Workers* workers) { workers_ = workers; }
    // Not owned; null: this process is alone. Forks have none: collective operations belong to one thread.
    Communicator* communicator() const { return communicator_; }
    void attach_communicator(Communicator* communicator) { communicator_ = communicator; }
    // Whether products of a new shape are worth timing (ops/matmul.h): not where hardly any shape comes twice. Changes no result.
    void time_products(bool worth_it);

    // Memory. A failed allocation throws UserError naming `what` and the bytes, with the table of what is held.
    void* allocate(int64_t bytes, const std::string& what);
    void release(void* pointer);
    // What an allocation of so many bytes takes: whole pages of 2 MiB on cuda.
    int64_t block_bytes(int64_t bytes) const;
    // From now on allocations of this device and its forks, with fork_bytes() for every fork, that would together pass `bytes` throw
    // UserError as if memory had run out. What libraries take is the caller's to subtract.
    void limit_memory(int64_t bytes) { books_->limit = bytes; }
    // What may still be allocated: limit or free memory, whichever is less.
    int64_t allowed_bytes() const;
    int64_t allocated_bytes() const { return books_->used; }  // by this device and its forks; a dry device counts what it gave back too
    int64_t free_bytes() const;         // free memory of the device now (host: available memory)
    int64_t process_peak_bytes() const; // cuda: total minus the lowest free memory seen; cpu: peak resident size

    // Copies and fills in stream order; upload/download return when the host memory may be reused/read.
    void upload(void* device_dst, const void* host_src, int64_t bytes);
    // Without waiting: the host memory must stay as it is until the next synchronize or download.
    void upload_async(void* device_dst, const void* host_src, int64_t bytes);
    void download(void* host_dst, const void* device_src, int64_t bytes);
    void copy(void* dst, const void* src, int64_t bytes);
    void zero(void* dst, int64_t bytes);
    void zero(const Tensor& t) { zero(t.data, t.bytes()); }
    void synchronize();
    // What is queued here from now on starts after all that is queued on `other` by now.
    void wait_for(Device& other);
    // A thread that uses a device which another thread opened calls this first.
    void make_current();

    // Scratch: a LIFO stack for everything that lives within one operation, layer or step. Blocks are 256-byte aligned.
    // reserve_scratch allocates the stack once; the high-water mark of a dry run says how much.
    void reserve_scratch(int64_t bytes);
    int64_t scratch_high_water() const { return scratch_peak_; }
    void* scratch_take(int64_t bytes, const char* what);
    int64_t scratch_mark() const { return scratch_used_; }
    void scratch_rewind(int64_t mark) { scratch_used_ = mark; }

  private:
    Device() = default;
    void take(const std::string& what, int64_t bytes) const;
    std::string out_of_memory(const std::string& what, int64_t bytes, int64_t left, const char* kind_of_left) const;
    DeviceKind kind_ = DeviceKind::cpu;
    bool dry_ = false;
    std::string name_;
    std::unique_ptr<CudaContext> cuda_;
    Profiler* profiler_ = nullptr;
    Workers* workers_ = nullptr;
    Communicator* communicator_ = nullptr;
    std::map<void*, std::pair<int64_t, std::string>> held_;
    // Shared with forks, which other threads use.
    struct Books {
        std::atomic<int64_t> used{0}, limit{std::numeric_limits<int64_t>::max()};
    };
    std::shared_ptr<Books> books_ = std::make_shared<Books>();
    int64_t own_library_bytes_ = 0;  // of a fork, in the books
    char* scratch_base_ = nullptr;
    int64_t scratch_size_ = 0, scratch_used_ = 0, scratch_peak_ = 0;
};

// Scratch tensors of one scope: taken in order, all given back when the scope ends.
class ScratchScope {
  public:
    explicit ScratchScope(Device& device) : device_(device), mark_(device.scratch_mark()) {}
    ~ScratchScope() { device_.scratch_rewind(mark_); }
    ScratchScope(const ScratchScope&) = delete;
    // rows × cols of dtype, contents undefined; ld = 0 means ld = cols.
    Tensor tensor(const char* what, DType dtype, int64_t rows, int64_t cols, int64_t ld = 0) {
        if (ld == 0) ld = cols;
        return Tensor{device_.scratch_take(rows * ld * size_of(dtype), what), dtype, rows, cols, ld};
    }

  private:
    Device& device_;
    int64_t mark_;
};

// Runs the CUDA or the CPU form of an operation, or nothing on a dry device. The CUDA form is compiled out of CPU-only builds.
#ifdef WITH_CUDA
#define ON_DEVICE(device, cuda_call, cpu_call)         \
    do {                                               \
        if ((device).dry()) break;                     \
        if ((device).is_cuda()) {                      \
            cuda_call;                                 \
        } else {                                       \
            cpu_call;                                  \
        }                                              \
    } while (0)
#else
#define ON_DEVICE(device, cuda_call, cpu_call) \
    do {                                       \
        if ((device).dry()) break;             \
        cpu_call;                              \
    } while (0)
#endif

// Device: opening, memory, copies, scratch. See device.h.
#include "runtime/device.h"

#include <omp.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>

#include "runtime/cuda_context.h"

#ifndef WITH_CUDA
struct CudaContext {};
#endif

namespace {

constexpr int64_t kScratchAlignment = 256;
constexpr int64_t kCudaPage = int64_t(2) << 20;
// On a dry device blocks have addresses that nobody reads; null would look like "absent".
char* const kDryAddress = reinterpret_cast<char*>(uintptr_t(1) << 40);

std::string amount_text(int64_t bytes) {
    double amount = double(bytes) / double(int64_t(1) << 30);
    return amount < 0.1 ? format("%.3f MiB", 1024 * amount) : format("%.3f GiB", amount);
}

// What the library handles of a fork hold: with four of them 60M, 130M and 1B took 653, 652 and 656 MiB more than all else in their plans
// (H200, CUDA 13.0).
constexpr int64_t kForkLibraryBytes = int64_t(164) << 20;

#ifdef WITH_CUDA
std::unique_ptr<CudaContext> open_cuda(int ordinal) {
    auto context = std::make_unique<CudaContext>();
    context->ordinal = ordinal;
    CUDA_CHECK(cudaSetDevice(ordinal));
    CUDA_CHECK(cudaGetDeviceProperties(&context->properties, ordinal));
    CUDA_CHECK(cudaStreamCreateWithFlags(&context->stream, cudaStreamNonBlocking));
    CUBLAS_CHECK(cublasLtCreate(&context->blaslt));
    CUBLAS_CHECK(cublasCreate(&context->blas));
    CUBLAS_CHECK(cublasSetStream(context->blas, context->stream));
    CUSOLVER_CHECK(cusolverDnCreate(&context->solver));
    CUSOLVER_CHECK(cusolverDnSetStream(context->solver, context->stream));
    CUSOLVER_CHECK(cusolverDnSetDeterministicMode(context->solver, CUSOLVER_DETERMINISTIC_RESULTS));
    CUSOLVER_CHECK(cusolverDnCreateParams(&context->solver_params));
    context->workspace_bytes = size_t(Device::kBlasWorkspaceBytes);
    if (cudaMalloc(&context->workspace, context->workspace_bytes) != cudaSuccess)
        throw UserError(format("not enough memory on %s for the workspace of cuBLAS (%lld MiB); another program holds it", context->properties.name, (long long)(Device::kBlasWorkspaceBytes >> 20)));
    CUBLAS_CHECK(cublasSetWorkspace(context->blas, context->workspace, context->workspace_bytes));
    return context;
}

void note_free_memory(CudaContext& context) {
    size_t free = 0, total = 0;
    if (cudaMemGetInfo(&free, &total) == cudaSuccess) context.lowest_free = std::min(context.lowest_free, free);
}
#endif

}  // namespace

bool Device::cuda_usable(std::string* why_not) {
#ifdef WITH_CUDA
    int count = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess || count == 0) {
        if (why_not)
            *why_not = status == cudaSuccess ? "no CUDA device is visible"
                     : status == cudaErrorInsufficientDriver ? "no NVIDIA driver, or one older than this program's CUDA runtime"
                                                             : cudaGetErrorString(status);
        cudaGetLastError();
        return false;
    }
    return true;
#else
    if (why_not) *why_not = "this binary was built without CUDA; run make (not make cpu) where nvcc is";
    return false;
#endif
}

int Device::cuda_count() {
    int count = 0;
#ifdef WITH_CUDA
    if (cuda_usable()) CUDA_CHECK(cudaGetDeviceCount(&count));
#endif
    return count;
}

std::unique_ptr<Device> Device::open(const std::string& which) {
    std::string why_not;
    bool wants_cuda = which == "cuda" || which.rfind("cuda:", 0) == 0;
    if (!wants_cuda && which != "cpu" && which != "auto")
        throw UserError("--device " + which + ": expected auto, cpu, cuda or cuda:N");
    bool usable = which == "cpu" ? false : cuda_usable(&why_not);
    if (wants_cuda && !usable)
        throw UserError("--device " + which + ": no usable GPU: " + why_not + "; or use --device cpu");

    std::unique_ptr<Device> device(new Device);
#ifdef WITH_CUDA
    if (usable) {
        int ordinal = 0, count = cuda_count();
        if (which.size() > 5) {
            char* end = nullptr;
            ordinal = int(std::strtol(which.c_str() + 5, &end, 10));
            if (*end || ordinal < 0 || ordinal >= count)
                throw UserError(format("--device %s: there are %d GPUs, numbered from 0", which.c_str(), count));
        }
        device->kind_ = DeviceKind::cuda;
        device->cuda_ = open_cuda(ordinal);
        device->name_ = device->cuda_->properties.name;
        note_free_memory(*device->cuda_);
        return device;
    }
#endif
    const int threads = omp_get_max_threads();
    device->name_ = format("CPU, %d thread%s", threads, threads == 1 ? "" : "s");
    return device;
}

std::unique_ptr<Device> Device::open_dry(DeviceKind kind) {
    std::unique_ptr<Device> device(new Device);
    device->kind_ = kind;
    device->dry_ = true;
    device->name_ = "dry run";
    return device;
}

std::unique_ptr<Device> Device::fork() const {
    std::unique_ptr<Device> device(new Device);
    device->kind_ = kind_, device->dry_ = dry_, device->name_ = name_, device->books_ = books_;
    take("another stream and its libraries", fork_bytes(kind_));
    device->own_library_bytes_ = fork_bytes(kind_);
#ifdef WITH_CUDA
    if (is_cuda() && !dry_) {
        device->cuda_ = open_cuda(cuda_->ordinal);
        device->cuda_->times_products = false;
        note_free_memory(*cuda_);
    }
#endif
    return device;
}

int64_t Device::fork_bytes(DeviceKind kind) { return kind == DeviceKind::cuda ? kBlasWorkspaceBytes + kForkLibraryBytes : 0; }

Device::~Device() {
    books_->used -= own_library_bytes_;
    if (dry_) return;
    if (scratch_base_) release(scratch_base_);
    while (!held_.empty()) release(held_.begin()->first);
#ifdef WITH_CUDA
    if (cuda_) {
        cudaStreamSynchronize(cuda_->stream);
        cudaFree(cuda_->workspace);
        cusolverDnDestroyParams(cuda_->solver_params);
        cusolverDnDestroy(cuda_->solver);
        cublasDestroy(cuda_->blas);
        cublasLtDestroy(cuda_->blaslt);
        cudaStreamDestroy(cuda_->stream);
    }
#endif
}

int64_t Device::block_bytes(int64_t bytes) const {
    return round_up(std::max<int64_t>(bytes, 1), is_cuda() ? kCudaPage : kScratchAlignment);
}

// Enters bytes for `what` in the books, unless they would pass the limit.
void Device::take(const std::string& what, int64_t bytes) const {
    if ((books_->used += bytes) <= books_->limit) return;
    books_->used -= bytes;
    throw UserError(out_of_memory(what, bytes, std::max<int64_t>(0, books_->limit - books_->used), "allowed"));
}

std::string Device::out_of_memory(const std::string& what, int64_t bytes, int64_t left, const char* kind_of_left) const {
    std::string table;
    for (auto& [address, block] : held_) table += "; " + block.second + " " + amount_text(block.first);
    return "not enough memory on " + name_ + " for " + what + ": " + amount_text(bytes) + " wanted, " + amount_text(left) + " " + kind_of_left + " (held" +
           (table.empty() ? ": nothing" : table.substr(1)) + "); lower train.micro_batch or see --plan";
}

void* Device::allocate(int64_t bytes, const std::string& what) {
    CHECK_INTERNAL(bytes >= 0, "allocation of %lld bytes for %s", (long long)bytes, what.c_str());
    const int64_t taken = block_bytes(bytes), padded = round_up(std::max<int64_t>(bytes, 1), kScratchAlignment);
    take(what, taken);
    if (dry_) return kDryAddress + books_->used;
    void* pointer = nullptr;
#ifdef WITH_CUDA
    if (is_cuda()) {
        if (cudaMalloc(&pointer, padded) != cudaSuccess) cudaGetLastError(), pointer = nullptr;
        note_free_memory(*cuda_);
    }
#endif
    if (!is_cuda()) pointer = std::aligned_alloc(kScratchAlignment, padded);
    if (!pointer) {
        books_->used -= taken;
        throw UserError(out_of_memory(what, bytes, free_bytes(), "free"));
    }
    held_[pointer] = {taken, what};
    return pointer;
}

void Device::release(void* pointer) {
    auto it = held_.find(pointer);
    if (dry_ || it == held_.end()) return;
    books_->used -= it->second.first;
    held_.erase(it);
#ifdef WITH_CUDA
    if (is_cuda()) {
        cudaStreamSynchronize(cuda_->stream);
        cudaFree(pointer);
        return;
    }
#endif
    std::free(pointer);
}

int64_t Device::allowed_bytes() const { return std::min(books_->limit - books_->used, free_bytes()); }

int64_t Device::free_bytes() const {
    if (dry_) return 0;
#ifdef WITH_CUDA
    if (is_cuda()) {
        size_t free = 0, total = 0;
        CUDA_CHECK(cudaMemGetInfo(&free, &total));
        return int64_t(free);
    }
#endif
    // /proc/meminfo's MemAvailable counts reclaimable caches, which sysconf's free pages do not.
    if (FILE* f = std::fopen("/proc/meminfo", "r")) {
        char line[256];
        long long kib = -1;
        while (std::fgets(line, sizeof line, f))
            if (std::sscanf(line, "MemAvailable: %lld kB", &kib) == 1) break;
        std::fclose(f);
        if (kib >= 0) return kib * 1024;
    }
    return int64_t(sysconf(_SC_AVPHYS_PAGES)) * sysconf(_SC_PAGESIZE);
}

int64_t Device::process_peak_bytes() const {
    if (dry_) return 0;
#ifdef WITH_CUDA
    if (is_cuda()) {
        note_free_memory(*cuda_);
        return int64_t(cuda_->properties.totalGlobalMem) - int64_t(cuda_->lowest_free);
    }
#endif
    // getrusage would count what the process was before it became this program: a launcher's Python, say.
    std::ifstream status("/proc/self/status");
    for (std::string word; status >> word;)
        if (int64_t kilobytes = 0; word == "VmHWM:" && status >> kilobytes) return kilobytes * 1024;
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return int64_t(usage.ru_maxrss) * 1024;
}

void Device::upload(void* device_dst, const void* host_src, int64_t bytes) {
    upload_async(device_dst, host_src, bytes);
    synchronize();
}

void Device::upload_async(void* device_dst, const void* host_src, int64_t bytes) {
    if (dry_ || bytes == 0) return;
#ifdef WITH_CUDA
    if (is_cuda()) {
        CUDA_CHECK(cudaMemcpyAsync(device_dst, host_src, bytes, cudaMemcpyHostToDevice, cuda_->stream));
        return;
    }
#endif
    std::memcpy(device_dst, host_src, bytes);
}

void Device::download(void* host_dst, const void* device_src, int64_t bytes) {
    if (dry_ || bytes == 0) return;
#ifdef WITH_CUDA
    if (is_cuda()) {
        CUDA_CHECK(cudaMemcpyAsync(host_dst, device_src, bytes, cudaMemcpyDeviceToHost, cuda_->stream));
        CUDA_CHECK(cudaStreamSynchronize(cuda_->stream));
        return;
    }
#endif
    std::memcpy(host_dst, device_src, bytes);
}

void Device::copy(void* dst, const void* src, int64_t bytes) {
    if (dry_ || bytes == 0) return;
#ifdef WITH_CUDA
    if (is_cuda()) {
        CUDA_CHECK(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, cuda_->stream));
        return;
    }
#endif
    std::memmove(dst, src, bytes);
}

void Device::zero(void* dst, int64_t bytes) {
    if (dry_ || bytes == 0) return;
#ifdef WITH_CUDA
    if (is_cuda()) {
        CUDA_CHECK(cudaMemsetAsync(dst, 0, bytes, cuda_->stream));
        return;
    }
#endif
    std::memset(dst, 0, bytes);
}

void Device::time_products(bool worth_it) {
    (void)worth_it;
#ifdef WITH_CUDA
    if (cuda_) cuda_->times_products = worth_it;
#endif
}

void Device::synchronize() {
#ifdef WITH_CUDA
    if (is_cuda() && !dry_) CUDA_CHECK(cudaStreamSynchronize(cuda_->stream));
#endif
}

void Device::wait_for(Device& other) {
#ifdef WITH_CUDA
    if (!is_cuda() || dry_ || &other == this) return;
    cudaEvent_t event = nullptr;
    CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    CUDA_CHECK(cudaEventRecord(event, other.cuda_->stream));
    CUDA_CHECK(cudaStreamWaitEvent(cuda_->stream, event, 0));
    CUDA_CHECK(cudaEventDestroy(event));  // freed once it has happened
#else
    (void)other;
#endif
}

void Device::make_current() {
#ifdef WITH_CUDA
    if (is_cuda() && !dry_) CUDA_CHECK(cudaSetDevice(cuda_->ordinal));
#endif
}

void Device::reserve_scratch(int64_t bytes) {
    CHECK_INTERNAL(scratch_used_ == 0, "scratch resized while in use");
    if (scratch_base_) release(scratch_base_);
    scratch_size_ = round_up(bytes, kScratchAlignment);
    scratch_base_ = static_cast<char*>(allocate(scratch_size_, "scratch"));
}

void* Device::scratch_take(int64_t bytes, const char* what) {
    int64_t offset = scratch_used_;
    scratch_used_ += round_up(std::max<int64_t>(bytes, 1), kScratchAlignment);
    scratch_peak_ = std::max(scratch_peak_, scratch_used_);
    if (dry_) return kDryAddress + offset;
    if (scratch_used_ > scratch_size_) {
        int64_t used = offset;
        scratch_used_ = offset;
        throw InternalError(format("scratch memory exhausted by %s: %lld bytes wanted, %lld of %lld in use", what, (long long)bytes,
                                   (long long)used, (long long)scratch_size_));
    }
    return scratch_base_ + offset;
}

// Collectives between GPUs by NCCL, on a stream of their own beside the device's.
//
// The same bits in every run. NCCL chooses algorithm (ring or tree), protocol and number of channels from the topology, the number of ranks and
// the size of an operation by a fixed table of costs; nothing is timed and nothing depends on who comes first. With those given, every
// element is added up along a fixed path (round the ring from a rank that its place in the tensor decides; up the tree), in one place, and the
// result is copied to all: the same on all ranks. In-network sums (NVLS: in the NVLink switch; CollNet) promise no order, so neither is used
// unless the environment asks for it: CollNet is off by default, NVLS is switched off here.
//
// Channels: each takes a multiprocessor from the products that run at the same time, and 12 MiB. Sums of 128 MiB on two H200s: 82 GB/s with 4
// channels, 156 with 8, 249 with 16, 286 with NCCL's own choice. Training of 60m and of 8 layers of 1b was fastest with 16; buffers of 1 MiB (NCCL_BUFFSIZE) in place
// of 4 save 32 MiB and cost 3 % of that speed. The environment variables NCCL_MAX_CTAS and NCCL_BUFFSIZE override.
//
// Sums beside the backward pass cost more time than sums after it, where links are fast: presumably a product's last blocks wait for the
// multiprocessors that NCCL holds, which in turn wait for the slower rank. So where links are so fast that all gradients take a few milliseconds, they are summed at once when the backward pass is done
// (8 layers of 1b on two H200s: 1.6 % of a step that way, 3.8 % in buckets of 32 MiB). Over PCIe or a network they take ten times as long and more, and
// buckets hide it. With three ranks and more the order of additions changes with the choice.
#if defined(WITH_CUDA) && defined(WITH_NCCL)
#include <nccl.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <thread>

#include "comm/backends.h"
#include "runtime/cuda_context.h"

namespace {

constexpr int kMaxChannels = 16;
constexpr int64_t kSumValues = 512;  // that one call of NCCL adds up in sum()
// Queries of a stream, of a microsecond or two each: between two looks at NCCL's state, and before wait() begins to sleep after each look, for so long.
constexpr int kSpins = 32;
constexpr int64_t kSpinsBeforeSleep = 4096;
constexpr std::chrono::microseconds kSleep(500);

std::string uuid_of(const cudaDeviceProp& properties) { return std::string(properties.uuid.bytes, sizeof properties.uuid.bytes); }

// Whether NVLink connects the GPUs of all ranks, as far as every rank sees them; the same answer on all. Over PCIe GPUs have no native atomic
// operations on each other's memory; the runtime has no other way to tell. A process that is shown its own GPU alone cannot know.
bool all_linked(Device& device, Control& control) {
    std::vector<std::string> visible(Device::cuda_count());
    for (size_t i = 0; i < visible.size(); ++i) {
        cudaDeviceProp properties;
        CUDA_CHECK(cudaGetDeviceProperties(&properties, int(i)));
        visible[i] = uuid_of(properties);
    }
    const std::string own = uuid_of(device.cuda().properties);
    bool linked = true;
    for (const std::string& other : control.gather(own)) {
        if (other == own) continue;
        const int peer = int(std::find(visible.begin(), visible.end(), other) - visible.begin());
        int atomic = 0;
        if (peer < int(visible.size())) CUDA_CHECK(cudaDeviceGetP2PAttribute(&atomic, cudaDevP2PAttrNativeAtomicSupported, device.cuda().ordinal, peer));
        linked = linked && atomic;
    }
    for (const std::string& verdict : control.gather(linked ? "linked" : "apart")) linked = linked && verdict == "linked";
    return linked;
}

ncclDataType_t type_of(const Tensor& t) { return t.dtype == DType::bf16 ? ncclBfloat16 : t.dtype == DType::f64 ? ncclFloat64 : ncclFloat32; }

// In members of NcclCommunicator.
#define NCCL_CHECK(call)                                                        \
    do {                                                                        \
        ncclResult_t status_ = (call);                                          \
        if (status_ != ncclSuccess) lost(__FILE__, __LINE__, #call, status_);   \
    } while (0)

class NcclCommunicator : public Communicator {
  public:
    NcclCommunicator(Device& device, Control& control) : Communicator(device, control) {
        int lowest = 0, highest = 0;
        CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
        // Other ranks wait for what is sent here, so it comes before this rank's own work.
        CUDA_CHECK(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, highest));
        CUDA_CHECK(cudaEventCreateWithFlags(&queued_, cudaEventDisableTiming));
        CUDA_CHECK(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming));
        on_host_ = pinned();
        CUDA_CHECK(cudaMalloc(&on_device_, kSumValues * sizeof(double)));  // not through the device: library_bytes has it, as all that is taken here

        all_linked_ = all_linked(device, control);
        setenv("NCCL_NVLS_ENABLE", "0", /*overwrite=*/0);
        ncclUniqueId id;
        if (rank() == 0) NCCL_CHECK(ncclGetUniqueId(&id));
        const std::string bytes = control.broadcast(rank() == 0 ? std::string(id.internal, sizeof id.internal) : std::string());
        CHECK_INTERNAL(bytes.size() == sizeof id.internal, "NCCL's identifier has %zu bytes", bytes.size());
        std::memcpy(id.internal, bytes.data(), bytes.size());
        ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
        config.maxCTAs = kMaxChannels;
        NCCL_CHECK(ncclCommInitRankConfig(&comm_, size(), id, rank(), &config));
        // Connections are made with the first operation: what fails there should fail now.
        std::vector<double> ranks{1.0};
        sum_now(ranks, "the first sum");
        CHECK_INTERNAL(ranks[0] == size(), "NCCL counts %g ranks of %d", ranks[0], size());
    }

    int64_t bucket_bytes() const override { return all_linked_ ? INT64_MAX : Communicator::bucket_bytes(); }

    ~NcclCommunicator() override {
        if (std::uncaught_exceptions() > 0) {  // others may never come to what is queued
            ncclCommAbort(comm_);
        } else {
            Control::Activity activity(&control_, Control::Kind::waiting, "closing NCCL");
            ncclCommDestroy(comm_);
        }
        cudaFree(on_device_);
        cudaFreeHost(on_host_);
        cudaEventDestroy(done_);
        cudaEventDestroy(queued_);
        cudaStreamDestroy(stream_);
    }

  private:
    ncclComm_t comm_ = nullptr;
    bool all_linked_ = false;
    cudaStream_t stream_ = nullptr;
    cudaEvent_t queued_ = nullptr, done_ = nullptr;
    double *on_host_ = nullptr, *on_device_ = nullptr;  // kSumValues each

    static double* pinned() {
        void* pointer = nullptr;
        CUDA_CHECK(cudaMallocHost(&pointer, kSumValues * sizeof(double)));
        return static_cast<double*>(pointer);
    }

    [[noreturn]] void lost(const char* file, int line, const char* call, ncclResult_t status) {
        control_.lost(format("%s:%d: %s failed: %s (%s)", file, line, call, ncclGetErrorString(status), ncclGetLastError(comm_)));
    }

    // What follows on stream_ comes after all that is queued on the device.
    void wait_for_device() {
        CUDA_CHECK(cudaEventRecord(queued_, device_.cuda().stream));
        CUDA_CHECK(cudaStreamWaitEvent(stream_, queued_, 0));
    }

    void queue_all_reduce(const std::vector<Tensor>& tensors) override {
        wait_for_device();
        NCCL_CHECK(ncclGroupStart());
        for (const Tensor& t : tensors) NCCL_CHECK(ncclAllReduce(t.data, t.data, size_t(t.numel()), type_of(t), ncclSum, comm_, stream_));
        NCCL_CHECK(ncclGroupEnd());
    }

    void queue_reduce(Tensor tensor, int root) override {
        wait_for_device();
        NCCL_CHECK(ncclReduce(tensor.data, tensor.data, size_t(tensor.numel()), type_of(tensor), ncclSum, root, comm_, stream_));
    }

    void queue_broadcast(const std::vector<Tensor>& tensors, int root) override {
        wait_for_device();
        NCCL_CHECK(ncclGroupStart());
        for (const Tensor& t : tensors)
            NCCL_CHECK(ncclBroadcast(t.data, t.data, size_t(t.numel() * size_of(t.dtype)), ncclUint8, root, comm_, stream_));
        NCCL_CHECK(ncclGroupEnd());
    }

    void queue_finish() override {
        CUDA_CHECK(cudaEventRecord(done_, stream_));
        CUDA_CHECK(cudaStreamWaitEvent(device_.cuda().stream, done_, 0));
    }

    void sum_now(std::vector<double>& values, const char*) override {
        for (size_t begin = 0; begin < values.size(); begin += kSumValues) {
            const size_t count = std::min(values.size() - begin, size_t(kSumValues)), bytes = count * sizeof(double);
            std::memcpy(on_host_, &values[begin], bytes);
            CUDA_CHECK(cudaMemcpyAsync(on_device_, on_host_, bytes, cudaMemcpyHostToDevice, stream_));
            NCCL_CHECK(ncclAllReduce(on_device_, on_device_, count, ncclFloat64, ncclSum, comm_, stream_));
            CUDA_CHECK(cudaMemcpyAsync(on_host_, on_device_, bytes, cudaMemcpyDeviceToHost, stream_));
            wait();
            std::memcpy(&values[begin], on_host_, bytes);
        }
    }

    // Returns when stream_ is empty. A broken connection does not end what is queued on it, so NCCL is asked from time to time. A thread that slept wakes
    // late, and the GPU soon has nothing to do without it; so for as long as it may be a matter of moments, this one does not sleep.
    void wait() {
        for (int64_t turn = 1;; ++turn) {
            const cudaError_t collectives = cudaStreamQuery(stream_);
            if (collectives == cudaSuccess) return;
            if (collectives != cudaErrorNotReady) CUDA_CHECK(collectives);  // the name is for the message
            if (turn % kSpins != 0) continue;
            ncclResult_t failure = ncclSuccess;
            NCCL_CHECK(ncclCommGetAsyncError(comm_, &failure));
            if (failure != ncclSuccess) lost(__FILE__, __LINE__, "a collective operation", failure);
            if (turn > kSpinsBeforeSleep) std::this_thread::sleep_for(kSleep);
        }
    }
};

}  // namespace

std::unique_ptr<Communicator> connect_nccl(Device& device, Control& control) { return std::make_unique<NcclCommunicator>(device, control); }
#endif

// Which library connects the ranks, and what its operations have in common. See communicator.h.
#include "comm/communicator.h"

#include <csignal>

#include "comm/backends.h"
#include "runtime/profile.h"

namespace {

// Measured: 670 to 676 MiB on an H200 with the 16 channels of comm/nccl.cu (NCCL 2.28). 12 MiB a
// channel; some 200 once ncclCommInitRank is done; some 290 with the first operation: presumably a stack for every thread that the GPU can hold, which smaller GPUs have fewer of.
constexpr int64_t kNcclBytes = int64_t(680) << 20;

int64_t content_bytes(const std::vector<Tensor>& tensors) {
    int64_t bytes = 0;
    for (const Tensor& t : tensors) bytes += t.numel() * size_of(t.dtype);
    return bytes;
}

void check_contiguous(const std::vector<Tensor>& tensors) {
    for (const Tensor& t : tensors)
        CHECK_INTERNAL(t.contiguous(), "%lld × %lld with rows %lld apart", (long long)t.rows, (long long)t.cols, (long long)t.ld);
}

void check_summable(const Device& device, const std::vector<Tensor>& tensors) {
    check_contiguous(tensors);
    for (const Tensor& t : tensors)
        CHECK_INTERNAL(t.dtype == DType::f32 || t.dtype == DType::f64 || (device.is_cuda() && t.dtype == DType::bf16), "sum of %s", safetensors_name(t.dtype));
}

}  // namespace

bool Communicator::available(DeviceKind kind, std::string* why_not) {
    const char* missing = nullptr;
    if (kind == DeviceKind::cuda) {
#ifndef WITH_CUDA
        missing = "this binary was built without CUDA; run make (not make cpu) where nvcc is";
#elif !defined(WITH_NCCL)
        missing = "this binary was built without NCCL; install it (libnccl-dev, or set NCCL_DIR to where it is) and run make";
#endif
    } else {
#ifndef WITH_GLOO
        missing = "this binary was built without Gloo; install it (libgloo-dev) and run make";
#endif
    }
    if (missing && why_not) *why_not = missing;
    return !missing;
}

std::unique_ptr<Communicator> Communicator::connect(Device& device, Control& control) {
    CHECK_INTERNAL(!device.dry(), "ranks of dry devices have nothing to say");
    std::string why_not;
    if (!available(device.kind(), &why_not))
        throw UserError(std::string("several ranks on ") + (device.is_cuda() ? "GPUs" : "CPUs") + " cannot be connected: " + why_not);
    // Gloo writes to sockets whose other end may be gone; that must be an error, which can be told, and not the end.
    std::signal(SIGPIPE, SIG_IGN);
    Control::Activity activity(&control, Control::Kind::waiting, device.is_cuda() ? "connecting the GPUs" : "connecting the CPUs");
#ifdef WITH_NCCL
    if (device.is_cuda()) return connect_nccl(device, control);
#endif
#ifdef WITH_GLOO
    if (!device.is_cuda()) return connect_gloo(device, control);
#endif
    return nullptr;
}

int64_t Communicator::library_bytes(DeviceKind kind) { return kind == DeviceKind::cuda ? kNcclBytes : 0; }

Communicator::Communicator(Device& device, Control& control) : device_(device), control_(control) {
    CHECK_INTERNAL(!device.communicator(), "a communicator is attached already");
    device.attach_communicator(this);
}

Communicator::~Communicator() { device_.attach_communicator(nullptr); }

void Communicator::all_reduce(const std::vector<Tensor>& tensors) {
    check_summable(device_, tensors);
    OperationTimer timer(device_, "all_reduce", 0, 2.0 * double(content_bytes(tensors)));
    queue_all_reduce(tensors);
}

void Communicator::reduce(Tensor tensor, int root) {
    check_summable(device_, {tensor});
    CHECK_INTERNAL(tensor.dtype != DType::f64, "reduce() has no f64");
    OperationTimer timer(device_, "reduce", 0, (rank() == root ? 2.0 : 1.0) * double(content_bytes({tensor})));
    queue_reduce(tensor, root);
}

void Communicator::broadcast(const std::vector<Tensor>& tensors, int root) {
    check_contiguous(tensors);
    OperationTimer timer(device_, "broadcast", 0, double(content_bytes(tensors)));
    queue_broadcast(tensors, root);
}

void Communicator::finish() {
    OperationTimer timer(device_, "wait_for_ranks", 0, 0);
    queue_finish();
}

void Communicator::synchronize(Device& device, const char* what) {
    Control::Activity activity(device.communicator() ? &device.communicator()->control() : nullptr, Control::Kind::waiting, what);
    device.synchronize();
}

void Communicator::sum(std::vector<double>& values, const char* what) {
    Control::Activity activity(&control_, Control::Kind::waiting, what);
    sum_now(values, what);
}

// Collective operations between the devices of a run's ranks: NCCL between GPUs, Gloo between CPUs. All ranks call the same ones in the same
// order, from the thread that owns the device. What fails ends the run by Control::lost.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "comm/control.h"
#include "runtime/device.h"

class Communicator {
  public:
    // Connects all ranks of control.world() and attaches itself to `device` until it ends. UserError where this binary cannot
    // (see available). Not for dry devices.
    static std::unique_ptr<Communicator> connect(Device& device, Control& control);
    // Whether this binary can; why_not names the library that was missing when it was built.
    static bool available(DeviceKind kind, std::string* why_not = nullptr);
    // What the library takes of a device's memory for itself, for the plan (an estimate).
    static int64_t library_bytes(DeviceKind kind);
    virtual ~Communicator();
    Communicator(const Communicator&) = delete;

    // device.synchronize(), as a wait that the watch over the ranks knows of: what the device has to do may wait for another rank that hangs. All ranks
    // call it. Without a communicator nothing but that.
    static void synchronize(Device& device, const char* what);

    Control& control() const { return control_; }
    int rank() const { return control_.world().rank; }
    int size() const { return control_.world().size; }

    // How many bytes of sums are best begun together, where they become ready one after the other while the device computes: the same on all ranks. The
    // default is large enough for the links' full rate, and small enough that the first are under way long before the last are there.
    virtual int64_t bucket_bytes() const { return int64_t(32) << 20; }

    // These are queued: they begin when what is queued on the device by now is done, and may run beside what is queued later, until finish().
    // (On the cpu they are done when they return.) Tensors: contiguous (ld = cols), f32, f64 or bf16 (no bf16 on the cpu), of the same shapes on all ranks.
    // The sums have the same bits on all ranks and, on the same machines, in every run.
    void all_reduce(const std::vector<Tensor>& tensors);           // each ← its sum over ranks
    void reduce(Tensor tensor, int root);                          // no f64; on root: ← the sum, elsewhere left undefined
    void broadcast(const std::vector<Tensor>& tensors, int root);  // any dtype, whole bytes
    // What is queued on the device from now on comes after all of the above. Does not wait. A profiler sees here what the device waits.
    void finish();
    // Values on the host, f64: each ← its sum over ranks, the same bits on all. `what` names it should it never end. Waits for all of the above,
    // not for the device.
    void sum(std::vector<double>& values, const char* what);

  protected:
    Communicator(Device& device, Control& control);
    Device& device_;
    Control& control_;

  private:
    // As above, of tensors that have been checked.
    virtual void queue_all_reduce(const std::vector<Tensor>& tensors) = 0;
    virtual void queue_reduce(Tensor tensor, int root) = 0;
    virtual void queue_broadcast(const std::vector<Tensor>& tensors, int root) = 0;
    virtual void queue_finish() = 0;
    virtual void sum_now(std::vector<double>& values, const char* what) = 0;
};

// See workers.h.
#include "runtime/workers.h"

#include <algorithm>
#include <utility>

#include "runtime/metrics.h"

Workers::Workers(Device& device, int count, int64_t scratch_bytes) : device_(device) {
    CHECK_INTERNAL(count > 0 && !device.workers(), "%d workers, or the device has some already", count);
    for (int i = 0; i < count; ++i) {
        workers_.push_back(std::make_unique<Worker>());
        workers_.back()->device = device.fork();
        workers_.back()->device->reserve_scratch(scratch_bytes);
    }
    try {
        if (!device.dry())
            for (auto& worker : workers_) worker->thread = std::thread([this, &worker = *worker] { serve(worker); });
    } catch (...) {  // no more threads to be had: end those that there are
        close();
        throw;
    }
    device.attach_workers(this);
}

Workers::~Workers() {
    device_.attach_workers(nullptr);
    close();
}

void Workers::close() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        closing_ = true;
    }
    changed_.notify_all();
    for (auto& worker : workers_)
        if (worker->thread.joinable()) worker->thread.join();
}

void Workers::serve(Worker& worker) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        changed_.wait(lock, [&] { return closing_ || worker.job; });
        if (!worker.job) return;
        lock.unlock();
        std::exception_ptr failure;
        try {
            worker.device->make_current();
            worker.job(*worker.device);
            worker.device->synchronize();
        } catch (...) {
            failure = std::current_exception();
        }
        lock.lock();
        if (failure && !failure_) failure_ = failure;
        worker.job = nullptr;
        changed_.notify_all();
    }
}

Device& Workers::idle() {
    double begin = wall_seconds();
    std::unique_lock<std::mutex> lock(mutex_);
    Worker* found = nullptr;
    changed_.wait(lock, [&] {
        for (auto& worker : workers_)
            if (!worker->job && !found) found = worker.get();
        return found != nullptr;
    });
    waited_ += wall_seconds() - begin;
    return *found->device;
}

double Workers::take_waited() { return std::exchange(waited_, 0.0); }

void Workers::start(Device& helper, Job job) {
    auto it = std::find_if(workers_.begin(), workers_.end(), [&](auto& worker) { return worker->device.get() == &helper; });
    CHECK_INTERNAL(it != workers_.end() && job, "no such worker, or no job");
    if (device_.dry()) return job(helper);
    helper.wait_for(device_);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        (*it)->job = std::move(job);
    }
    changed_.notify_all();
}

void Workers::finish() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return std::all_of(workers_.begin(), workers_.end(), [](auto& worker) { return !worker->job; }); });
    if (std::exception_ptr failure = std::exchange(failure_, nullptr)) std::rethrow_exception(failure);
}

int64_t Workers::scratch_high_water() const {
    int64_t most = 0;
    for (auto& worker : workers_) most = std::max(most, worker->device->scratch_high_water());
    return most;
}

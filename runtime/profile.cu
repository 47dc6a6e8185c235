// See profile.h.
#include "runtime/profile.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <utility>

#include "runtime/cuda_context.h"

struct Profiler::Books {
    struct Call {
        const char *label, *name;
        double flops, bytes, seconds;  // seconds: CPU
        size_t event;                  // GPU: index of the event before it; the one after follows
    };
    std::vector<Call> calls;
    const char* label = "";
    int depth = 0;  // operations that are open
    double began = 0;
#ifdef WITH_CUDA
    std::vector<cudaEvent_t> events;  // kept for the next round
    size_t events_used = 0;
    // Called from destructors, so it cannot throw: a failure here shows when the times are read.
    void record_event(cudaStream_t stream) {
        if (events_used == events.size()) {
            events.push_back(nullptr);
            cudaEventCreate(&events.back());
        }
        cudaEventRecord(events[events_used++], stream);
    }
#endif
};

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

Profiler::Profiler(Device& device) : device_(device), books_(std::make_unique<Books>()) {
    CHECK_INTERNAL(!device.profiler() && !device.dry(), "a profiler is attached already, or the device is dry");
    device.attach_profiler(this);
}

Profiler::~Profiler() {
    device_.attach_profiler(nullptr);
#ifdef WITH_CUDA
    for (cudaEvent_t event : books_->events) cudaEventDestroy(event);
#endif
}

void OperationTimer::begin(Profiler& profiler, const char* name, double flops, double bytes) {
    Profiler::Books& books = *profiler.books_;
    profiler_ = &profiler;
    if (books.depth++ > 0) return;
    books.calls.push_back({books.label, name, flops, bytes, 0, 0});
#ifdef WITH_CUDA
    if (profiler.device_.is_cuda()) {
        books.calls.back().event = books.events_used;
        books.record_event(profiler.device_.cuda().stream);
        return;
    }
#endif
    books.began = now();
}

void OperationTimer::end() {
    Profiler::Books& books = *profiler_->books_;
    if (--books.depth > 0) return;
#ifdef WITH_CUDA
    if (profiler_->device_.is_cuda()) {
        books.record_event(profiler_->device_.cuda().stream);
        return;
    }
#endif
    books.calls.back().seconds = now() - books.began;
}

ProfileLabel::ProfileLabel(Device& device, const char* label) : profiler_(device.profiler()) {
    if (profiler_) outer_ = std::exchange(profiler_->books_->label, label);
}

ProfileLabel::~ProfileLabel() {
    if (profiler_) profiler_->books_->label = outer_;
}

std::vector<OperationProfile> Profiler::take() {
    device_.synchronize();
    std::map<std::pair<std::string, std::string>, OperationProfile> by_name;
    for (const Books::Call& call : books_->calls) {
        double seconds = call.seconds;
#ifdef WITH_CUDA
        if (device_.is_cuda()) {
            float milliseconds = 0;
            CUDA_CHECK(cudaEventElapsedTime(&milliseconds, books_->events[call.event], books_->events[call.event + 1]));
            seconds = double(milliseconds) * 1e-3;
        }
#endif
        OperationProfile& p = by_name[{call.label, call.name}];
        p.label = call.label, p.name = call.name;
        ++p.calls, p.seconds += seconds, p.flops += call.flops, p.bytes += call.bytes;
    }
    books_->calls.clear();
#ifdef WITH_CUDA
    books_->events_used = 0;
#endif
    std::vector<OperationProfile> list;
    for (auto& entry : by_name) list.push_back(entry.second);
    std::stable_sort(list.begin(), list.end(), [](const OperationProfile& a, const OperationProfile& b) { return a.seconds > b.seconds; });
    return list;
}

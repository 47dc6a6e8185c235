// How every benchmark here times the GPU.
#pragma once
#include <algorithm>
#include <vector>

#include "runtime/cuda_context.h"
#include "runtime/device.h"

constexpr int kRuns = 20, kWarmUp = 3;

// Median over kRuns, after kWarmUp more, of the milliseconds that what work() queues on the device's stream takes there.
template <class F> double median_ms(Device& device, F&& work) {
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = 0; i < kWarmUp + kRuns; ++i) {
        CUDA_CHECK(cudaEventRecord(begin, device.cuda().stream));
        work();
        CUDA_CHECK(cudaEventRecord(end, device.cuda().stream));
        CUDA_CHECK(cudaEventSynchronize(end));
        float ms = 0;
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (i >= kWarmUp) times.push_back(ms);
    }
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
    return double(times[kRuns / 2]);
}

#include "merge_schedule.h"

#include <algorithm>
#include <cmath>

std::vector<int64_t> merge_schedule(int64_t tau, double growth, int64_t max_gap, int64_t steps) {
    std::vector<int64_t> merges{0};
    double power = 1.0;
    for (int64_t k = 0;; ++k) {
        // growth^k as a running product: floor() must not depend on the maths library's pow.
        int64_t gap = tau;
        if (k > 0 && growth > 0) {
            power *= growth;
            gap = power < double(steps) ? tau + int64_t(std::floor(power)) : tau + steps;
        }
        if (max_gap > 0) gap = std::min(gap, max_gap);
        int64_t next = merges.back() + gap;
        if (next + tau >= steps) return merges;
        merges.push_back(next);
    }
}

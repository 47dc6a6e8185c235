// When adapters are merged and made anew (LoQT section 3.3, "exponentially increasing update interval").
#pragma once
#include <cstdint>
#include <vector>

// Merge steps: 0, then gaps tau + floor(growth^k), k = 1, 2, …, the first gap being tau itself; growth = 0 means a fixed gap tau;
// a gap never exceeds max_gap (0 = no cap). Step u > 0 is dropped unless u + tau < steps: a merge needs time to pay off.
std::vector<int64_t> merge_schedule(int64_t tau, double growth, int64_t max_gap, int64_t steps);

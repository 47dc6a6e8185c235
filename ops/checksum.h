// A number that stands for a tensor's bits, to tell whether two ranks hold the same.
#pragma once
#include "runtime/device.h"

// sums[slot] (device u64) ← a 64-bit checksum of the `bytes` bytes at `data` (device, 4-byte aligned). Depends on every bit and on where it is; the same on
// a cpu and a cuda device. Any change of one 32-bit word changes it; other differences go unseen with a chance of about 2^-64.
void checksum(Device& device, uint64_t* sums, int64_t slot, const void* data, int64_t bytes);

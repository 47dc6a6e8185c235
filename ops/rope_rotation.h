// The rotation of one pair by the rotary embedding, for kernels: the roundings are spelled out, so that every kernel that rotates
// (ops/rope.cu, the stores of ops/attention.cu) gives the same bits whatever the compiler would have contracted.
#pragma once
#ifdef __CUDACC__
// (first, second) turned by the angle whose cosine and sine are given.
__device__ __forceinline__ void rotate_pair(float& first, float& second, float cosine, float sine) {
    const float a = first, b = second;
    first = __fmaf_rn(a, cosine, -__fmul_rn(b, sine));
    second = __fmaf_rn(a, sine, __fmul_rn(b, cosine));
}
#endif

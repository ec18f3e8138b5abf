// Elements of 32 or 16 bits: several as one access, and to and from float.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace trapo {

constexpr int kVectorBytes = 16;  // the widest access of a thread

// kWidth elements of T as one access of 16 bytes (or of kWidth · sizeof(T)).
template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) Pack {
  T lane[kWidth];
};

template <typename T>
__device__ __forceinline__ float to_float(T x) {
  return static_cast<float>(x);
}
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

}  // namespace trapo

// What CUDA adds to C++ and the kernels of csrc use: keywords, indices, 16-bit types, and the tensor map that a kernel is given.

#pragma once

#include <bit>
#include <cstdint>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// bf16 and fp16.
struct __nv_bfloat16 {
  uint16_t bits;
  explicit operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
using __half = _Float16;
inline __half __float2half_rn(float x) { return static_cast<__half>(x); }

// A tensor map as cuTensorMapEncodeTiled makes it: bf16, two dimensions, swizzled by 128 bytes, zeros outside.
struct CUtensorMap {
  const uint16_t* data;
  int64_t columns, rows, stride;
  int box_columns, box_rows;
};

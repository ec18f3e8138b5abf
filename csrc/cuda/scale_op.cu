// The upstream gradient on a gradient: in its place, where a factor of 1 costs nothing, or rounded to 16 bits as it is scaled.
//
//   factor ─▶ in place and 1? ─ yes ─▶ return
//                              └── no ──▶ x ─▶ out = x · factor, 16 bytes of x a thread, the next ones all threads further on
//
// Work: 1 FLOP per element.
// Reads / writes: 4 bytes per block in place where the factor is 1, else every element once in and once out.
// Saved: nothing.
// On chip: 16 bytes a thread.
// Order: elementwise, bitwise repeatable.
// Edges: elements beyond the last whole vector go one by one, and so do all of them where x does not begin at 16 bytes, or out at as
//     many as a vector of its dtype has; addresses are 64-bit.

#include <algorithm>

#include "check.h"
#include "pack.cuh"

namespace trapo {
namespace {

constexpr int kScaleThreads = 256;
constexpr int64_t kMostBlocks = 1056;  // eight for each of an H200's 132 multiprocessors

// `out` may be `x`.
template <typename T, typename Out, int kWidth>
__global__ void __launch_bounds__(kScaleThreads) scale_kernel(const T* x, const float* factor, Out* out, int64_t elements) {
  const float f = *factor;
  if (f == 1.0f && static_cast<const void*>(x) == out) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kScaleThreads, packs = elements / kWidth;
  const auto* const packed = reinterpret_cast<const Pack<T, kWidth>*>(x);
  auto* const packed_out = reinterpret_cast<Pack<Out, kWidth>*>(out);
  for (int64_t i = first; i < packs; i += threads) {
    const Pack<T, kWidth> pack = packed[i];
    Pack<Out, kWidth> scaled;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) scaled.lane[k] = from_float<Out>(to_float(pack.lane[k]) * f);
    packed_out[i] = scaled;
  }
  for (int64_t i = packs * kWidth + first; i < elements; i += threads) out[i] = from_float<Out>(to_float(x[i]) * f);
}

template <typename T, typename Out>
void launch_scale(const char* op, const Tensor& x, const float* factor, const Tensor& out) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  const auto* from = static_cast<const T*>(x.const_data_ptr());
  auto* to = static_cast<Out*>(out.mutable_data_ptr());
  const bool in_vectors = reinterpret_cast<uintptr_t>(from) % sizeof(Pack<T, kWidth>) == 0 &&
                          reinterpret_cast<uintptr_t>(to) % sizeof(Pack<Out, kWidth>) == 0;
  const auto kernel = in_vectors ? scale_kernel<T, Out, kWidth> : scale_kernel<T, Out, 1>;
  const int64_t elements = x.numel(), per_block = int64_t{kScaleThreads} * kWidth;
  const int64_t blocks = std::min(kMostBlocks, (elements + per_block - 1) / per_block);
  launch_blocks(op, kernel, blocks, kScaleThreads, current_stream(x), from, factor, to, elements);
}

void scale(Tensor x, Tensor factor, Tensor out) {
  const char* op = "scale";
  const Device device = check_device(op, "x", x);
  check_same_device(op, device, "factor", factor);
  check_same_device(op, device, "out", out);
  for (const Tensor& dense : {x, out})
    STD_TORCH_CHECK(dense.is_contiguous(), op, ": x and out must be contiguous, got shape ", shape_of(dense),
                    ". Pass x.contiguous() and an out like it.");
  STD_TORCH_CHECK(shape_of(out) == shape_of(x), op, ": out must have the shape of x, ", shape_of(x), ", got ", shape_of(out),
                  ". Pass torch.empty_like(x).");
  STD_TORCH_CHECK(factor.numel() == 1, op, ": factor must be one number, got shape ", shape_of(factor), ". Pass a 0-d tensor.");
  check_dtype(op, "factor", factor, ScalarType::Float);
  if (x.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const float* by = factor.const_data_ptr<float>();
  const ScalarType dtype = x.scalar_type(), to = out.scalar_type();
  if (dtype == ScalarType::Float && to == dtype) return launch_scale<float, float>(op, x, by, out);
  if (dtype == ScalarType::Float && to == ScalarType::BFloat16) return launch_scale<float, __nv_bfloat16>(op, x, by, out);
  if (dtype == ScalarType::Float && to == ScalarType::Half) return launch_scale<float, __half>(op, x, by, out);
  if (dtype == ScalarType::BFloat16 && to == dtype) return launch_scale<__nv_bfloat16, __nv_bfloat16>(op, x, by, out);
  if (dtype == ScalarType::Half && to == dtype) return launch_scale<__half, __half>(op, x, by, out);
  STD_TORCH_CHECK(false, op, ": x must be float32, bfloat16 or float16 and out of its dtype or narrower, got ", dtype_name(dtype),
                  " and ", dtype_name(to), ". Choose another backend.");
}

}  // namespace
}  // namespace trapo

STABLE_TORCH_LIBRARY_IMPL(trapo_native, CUDA, m) { m.impl("scale", TORCH_BOX(&trapo::scale)); }

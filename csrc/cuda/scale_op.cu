// The upstream gradient on a gradient that is there already: where it is 1, nothing is read or written.
//
//   factor ─▶ 1? ─ yes ─▶ return
//             └── no ──▶ x ─▶ x · factor, 16 bytes a thread, the next ones all threads further on
//
// Work: 1 FLOP per element.
// Reads / writes: 4 bytes per block where the factor is 1, else every element once in and once out.
// Saved: nothing.
// On chip: 16 bytes a thread.
// Order: elementwise, bitwise repeatable.
// Edges: elements beyond the last whole vector, or all of them where x does not begin at 16 bytes, go one by one; addresses are 64-bit.

#include <algorithm>

#include "check.h"
#include "pack.cuh"

namespace trapo {
namespace {

constexpr int kScaleThreads = 256;
constexpr int64_t kMostBlocks = 1056;  // eight for each of an H200's 132 multiprocessors

template <typename T, int kWidth>
__global__ void __launch_bounds__(kScaleThreads) scale_kernel(T* x, const float* factor, int64_t elements) {
  const float f = *factor;
  if (f == 1.0f) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kScaleThreads, packs = elements / kWidth;
  auto* const packed = reinterpret_cast<Pack<T, kWidth>*>(x);
  for (int64_t i = first; i < packs; i += threads) {
    Pack<T, kWidth> pack = packed[i];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) pack.lane[k] = from_float<T>(to_float(pack.lane[k]) * f);
    packed[i] = pack;
  }
  for (int64_t i = packs * kWidth + first; i < elements; i += threads) x[i] = from_float<T>(to_float(x[i]) * f);
}

template <typename T>
void launch_scale(const char* op, void* data, const float* factor, int64_t elements, cudaStream_t stream) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  const auto kernel = reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 ? scale_kernel<T, kWidth> : scale_kernel<T, 1>;
  const int64_t per_block = int64_t{kScaleThreads} * kWidth, blocks = std::min(kMostBlocks, (elements + per_block - 1) / per_block);
  launch_blocks(op, kernel, blocks, kScaleThreads, stream, static_cast<T*>(data), factor, elements);
}

void scale(Tensor x, Tensor factor) {
  const char* op = "scale";
  check_same_device(op, check_device(op, "x", x), "factor", factor);
  STD_TORCH_CHECK(x.is_contiguous(), op, ": x must be contiguous, as it is scaled in its place, got shape ", shape_of(x),
                  ". Pass x.contiguous().");
  STD_TORCH_CHECK(factor.numel() == 1, op, ": factor must be one number, got shape ", shape_of(factor), ". Pass a 0-d tensor.");
  check_dtype(op, "factor", factor, ScalarType::Float);
  const int64_t elements = x.numel();
  if (elements == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const float* by = factor.const_data_ptr<float>();
  const cudaStream_t stream = current_stream(x);
  const ScalarType dtype = x.scalar_type();
  if (dtype == ScalarType::Float) return launch_scale<float>(op, x.mutable_data_ptr(), by, elements, stream);
  if (dtype == ScalarType::BFloat16) return launch_scale<__nv_bfloat16>(op, x.mutable_data_ptr(), by, elements, stream);
  if (dtype == ScalarType::Half) return launch_scale<__half>(op, x.mutable_data_ptr(), by, elements, stream);
  STD_TORCH_CHECK(false, op, ": x must be float32, bfloat16 or float16, got ", dtype_name(dtype), ". Choose another backend.");
}

}  // namespace
}  // namespace trapo

STABLE_TORCH_LIBRARY_IMPL(trapo_native, CUDA, m) { m.impl("scale", TORCH_BOX(&trapo::scale)); }

// What the CUDA ops check beyond csrc/checks.h, and launch details that they share.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <map>
#include <optional>
#include <string>
#include <tuple>

#include "../checks.h"

namespace trapo {

// The argument on whose GPU an op runs, and that GPU.
struct Device {
  const char* name;
  int gpu;
};

inline Device check_device(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda(), op, ": ", name, " must be on a GPU, got a tensor on the CPU. Pass ", name, ".cuda().");
  return {name, x.get_device_index()};
}

// That an op was dispatched here says that one of its arguments is on some GPU, not that all are on the same one.
inline void check_same_device(const char* op, const Device& device, const char* name, const Tensor& x) {
  const bool on_gpu = x.is_cuda();
  STD_TORCH_CHECK(on_gpu && x.get_device_index() == device.gpu, op, ": ", name, " must be on the GPU of ", device.name, ", cuda:",
                  device.gpu, ", got a tensor on ", on_gpu ? "cuda:" + std::to_string(x.get_device_index()) : "the CPU", ". Pass ",
                  name, ".to(", device.name, ".device).");
}

template <typename T>
const T* check_gpu_vector(const char* op, const Device& device, const char* name, const Tensor& x, int64_t length,
                          const char* axis = "C") {
  check_same_device(op, device, name, x);
  return check_vector<T>(op, name, x, length, axis);
}

inline const float* check_gpu_optional(const char* op, const Device& device, const char* name, const std::optional<Tensor>& x,
                                       int64_t length, const char* axis = "C") {
  return x.has_value() ? check_gpu_vector<float>(op, device, name, *x, length, axis) : nullptr;
}

inline void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch, an innocent one, would be told of it
  STD_TORCH_CHECK(error == cudaSuccess, op, ": a CUDA call must succeed, got \"", cudaGetErrorString(error),
                  "\". Run with CUDA_LAUNCH_BLOCKING=1 to see whether an earlier kernel failed.");
}

inline cudaStream_t current_stream(const Tensor& like) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int device_attribute(const char* op, cudaDeviceAttr which) {
  int device = 0, value = 0;
  check_cuda(op, cudaGetDevice(&device));
  check_cuda(op, cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Allows a kernel all the shared memory that a block can have, and of a multiprocessor's all that can be shared, so that as many blocks
// fit as were counted on. Never what one launch needs: of another thread's, which may need more, the limit is the same.
template <typename... Parameters>
void allow_shared_memory(const char* op, void (*kernel)(Parameters...)) {
  cudaFuncAttributes own;
  check_cuda(op, cudaFuncGetAttributes(&own, kernel));
  const int most = device_attribute(op, cudaDevAttrMaxSharedMemoryPerBlockOptin) - static_cast<int>(own.sharedSizeBytes);
  check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
}

// A launch of `blocks` blocks, `cluster` of which form a cluster, 0 for none; `attribute` must live as long.
template <typename... Parameters>
cudaLaunchConfig_t launch_config(const char* op, void (*kernel)(Parameters...), int64_t blocks, int cluster, int threads,
                                 int64_t shared_bytes, cudaStream_t stream, cudaLaunchAttribute* attribute) {
  if (shared_bytes > 0) allow_shared_memory(op, kernel);
  *attribute = {};
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = cluster > 0 ? 1 : 0;
  return config;
}

// Whether this GPU has room for such a cluster: a part of one (MIG) may have too few multiprocessors side by side. Asked once, on the
// host alone, so that a graph that is being captured does not mind.
template <typename... Parameters>
bool can_place(const char* op, void (*kernel)(Parameters...), int cluster, int threads, int64_t shared_bytes) {
  int device = 0, clusters = 0;
  check_cuda(op, cudaGetDevice(&device));
  thread_local std::map<std::tuple<const void*, int, int64_t, int>, bool> known;
  const std::tuple key(reinterpret_cast<const void*>(kernel), cluster, shared_bytes, device);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = launch_config(op, kernel, cluster, cluster, threads, shared_bytes, nullptr, &attribute);
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    cudaGetLastError();  // or the launch of another kernel would be told of it
    return false;        // not known: it may be asked again
  }
  return known[key] = clusters > 0;
}

// Launches a kernel on `blocks` blocks, `cluster` of which form a cluster; 0 for none.
template <typename... Parameters, typename... Arguments>
void launch_clusters(const char* op, void (*kernel)(Parameters...), int64_t blocks, int cluster, int threads, int64_t shared_bytes,
                     cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = launch_config(op, kernel, blocks, cluster, threads, shared_bytes, stream, &attribute);
  check_cuda(op, cudaLaunchKernelEx(&config, kernel, arguments...));
}

// The same without clusters and dynamic shared memory.
template <typename... Parameters, typename... Arguments>
void launch_blocks(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  launch_clusters(op, kernel, blocks, 0, threads, 0, stream, arguments...);
}

}  // namespace trapo

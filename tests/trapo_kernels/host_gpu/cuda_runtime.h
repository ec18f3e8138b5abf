// The CUDA runtime and driver calls of csrc/cuda, for the machine of machine.h; what a call must keep to is checked.

#pragma once

#include <cstdint>
#include <tuple>

#include "machine.h"

namespace host_gpu {

// The GPU that is emulated, as HostGpu of __init__.py sets it.
struct Properties {
  uint64_t seed;
  int major, shared_per_multiprocessor, shared_per_block, multiprocessors, room_for_clusters;
};
inline Properties properties;
inline int device = 0;  // one of its own for every set of properties
inline std::map<const void*, size_t> shared_allowed;  // by kernel
inline std::string last_error;
inline unsigned largest_cluster = 0;  // blocks of a cluster, over all launches since the properties were set; 0 without clusters
inline thread_local bool has_context = false;  // which some calls of the runtime give to a thread, and the driver's do not

}  // namespace host_gpu

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorUnknown };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

constexpr int kStaticShared = 256;  // bytes of a kernel's own; more than any has, which its __shared__ do not tell here

inline cudaError_t failed(const std::string& message) {
  host_gpu::last_error = message;
  return cudaErrorUnknown;
}
inline const char* cudaGetErrorString(cudaError_t) { return host_gpu::last_error.c_str(); }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = host_gpu::device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const host_gpu::Properties& p = host_gpu::properties;
  const int values[] = {p.major, p.shared_per_multiprocessor, p.shared_per_block, p.multiprocessors};
  *value = values[which];
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int) {
  host_gpu::has_context = true;
  return cudaSuccess;
}

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};

template <typename... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(P...)) {
  *attributes = {kStaticShared};
  return cudaSuccess;
}

template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute which, int bytes) {
  host_gpu::has_context = true;
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  const int most = host_gpu::properties.shared_per_block - kStaticShared;
  if (bytes > most) return failed("too much shared memory for a block: " + std::to_string(bytes));
  if (bytes < most) return failed("a limit of shared memory that another thread's launch may exceed: " + std::to_string(bytes));
  host_gpu::shared_allowed[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

// What is wrong with a launch, or nothing.
template <typename... P>
std::string launch_fault(const cudaLaunchConfig_t* config, void (*kernel)(P...)) {
  const unsigned cluster = config->numAttrs == 0 ? 1 : config->attrs->val.clusterDim.x;
  const unsigned threads = config->blockDim.x;
  if (config->gridDim.x == 0 || threads == 0 || threads > 1024) return "an empty grid, or no block of 1 to 1024 threads";
  if (cluster == 0 || cluster > 8 || config->gridDim.x % cluster) return "a grid must be whole clusters of 1 to 8 blocks";
  if (cluster > 1 && host_gpu::properties.major < 9) return "clusters before sm_90";
  if (config->dynamicSmemBytes > host_gpu::shared_allowed[reinterpret_cast<const void*>(kernel)]) {
    return "more dynamic shared memory than was asked for with cudaFuncSetAttribute";
  }
  return "";
}

inline bool has_room(const cudaLaunchConfig_t* config) {
  return config->numAttrs == 0 || static_cast<int>(config->attrs->val.clusterDim.x) <= host_gpu::properties.room_for_clusters;
}

template <typename... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(P...), const cudaLaunchConfig_t* config) {
  const std::string fault = launch_fault(config, kernel);
  if (!fault.empty()) return failed(fault);
  *clusters = has_room(config) ? 1 : 0;
  return cudaSuccess;
}

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), const A&... arguments) {
  const unsigned cluster = config->numAttrs == 0 ? 1 : config->attrs->val.clusterDim.x;
  const std::string fault = launch_fault(config, kernel);
  host_gpu::has_context = true;
  if (!fault.empty()) return failed(fault);
  if (!has_room(config)) return failed("no room for a cluster of " + std::to_string(cluster));
  if (config->numAttrs > 0) host_gpu::largest_cluster = std::max(host_gpu::largest_cluster, cluster);
  const std::tuple<P...> values(arguments...);
  const std::string error = host_gpu::launch(config->gridDim.x, config->blockDim.x, cluster, config->dynamicSmemBytes,
                                             host_gpu::properties.seed, [&] { std::apply(kernel, values); });
  return error.empty() ? cudaSuccess : failed(error);
}

// The driver's encoder of tensor maps and how it is found.
using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_INVALID_CONTEXT = 201 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data, const cuuint64_t* size,
                                       const cuuint64_t* stride_bytes, const cuuint32_t* box, const cuuint32_t* element_stride,
                                       CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool fits = rank == 2 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride_bytes[0] % 16 == 0 &&
                    stride_bytes[0] >= size[0] * 2 && size[0] > 0 && size[1] > 0 && box[1] >= 1 && box[1] <= 256 &&
                    element_stride[0] == 1 && element_stride[1] == 1;
  if (!host_gpu::has_context) return CUDA_ERROR_INVALID_CONTEXT;
  if (!fits || box[0] * 2 != 128) return CUDA_ERROR_INVALID_VALUE;  // the machine copies rows of 128 bytes only
  *map = {static_cast<const uint16_t*>(data), static_cast<int64_t>(size[0]), static_cast<int64_t>(size[1]),
          static_cast<int64_t>(stride_bytes[0] / 2), static_cast<int>(box[0]), static_cast<int>(box[1])};
  return CUDA_SUCCESS;
}

enum { cudaEnableDefault };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* found) {
  const bool known = std::string(name) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

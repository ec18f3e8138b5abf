// All of csrc's CUDA code as ops on the CPU, in a namespace of their own (-Dtrapo_native=...): kernels and what launches them run from
// their own source, on the machine of machine.h.

#define aoti_torch_get_device_index host_gpu_device_index
#include "csrc/ops.cpp"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "csrc/cuda/softmax.h"  // before __CUDA_ARCH__: it then has the host's exponential, not PTX
#include "cuda_runtime.h"

#define __CUDA_ARCH__ 900
#define __CUDA_ARCH_FEAT_SM90_ALL

// To torch the tensors lie on the CPU. One of them, whose data begin at `elsewhere`, counts as another GPU's.
static const void* elsewhere = nullptr;
AOTITorchError host_gpu_device_index(AtenTensorHandle tensor, int32_t* index) {
  void* data = nullptr;
  aoti_torch_get_data_ptr(tensor, &data);
  *index = data != nullptr && data == elsewhere ? 1 : 0;
  return AOTI_TORCH_SUCCESS;
}
#define CUDA CPU
#define is_cuda is_cpu
#define DeviceGuard HostGuard
namespace torch::stable::accelerator {
struct HostGuard {
  explicit HostGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator
inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

namespace trapo {
using std::min;  // CUDA has it in the global namespace
}

#include "csrc/cuda/row_ops.cu"
#include "csrc/cuda/scale_op.cu"
#include "csrc/cuda/scoring_op.cu"

extern "C" {

void set_properties(uint64_t seed, int major, int shared_per_multiprocessor, int shared_per_block, int multiprocessors,
                    int room_for_clusters) {
  host_gpu::properties = {seed, major, shared_per_multiprocessor, shared_per_block, multiprocessors, room_for_clusters};
  ++host_gpu::device;
  host_gpu::largest_cluster = 0;
}

void put_elsewhere(const void* data) { elsewhere = data; }

void set_fault(int number) { host_gpu::fault = number; }

unsigned largest_cluster() { return host_gpu::largest_cluster; }
}

// The CUDA implementation of `scoring`: argument checks, tensor maps, and the launch of the Hopper kernel.

#include "check.h"
#include "hopper_scoring.cuh"

namespace trapo {
namespace {

// Elements from one row to the next; where there is one row, whatever its tensor says, so many that TMA agrees.
int64_t row_stride(const Tensor& x) { return x.size(0) == 1 ? (x.size(1) + 7) / 8 * 8 : x.stride(0); }

// A row-major bf16 matrix that TMA can read.
void check_operand(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, "scoring: ", name, " must have two dimensions, got shape ", shape_of(x), ". Flatten it.");
  check_dtype("scoring", name, x, ScalarType::BFloat16);
  STD_TORCH_CHECK(x.stride(1) == 1, "scoring: ", name, " must have unit stride in a row, got ", x.stride(1), ". Pass ", name,
                  ".contiguous().");
  STD_TORCH_CHECK(row_stride(x) % 8 == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, "scoring: rows of ", name,
                  " must start at multiples of 16 bytes for TMA, got a row stride of ", x.stride(0),
                  " elements. Use backend=\"triton\".");
}

// The map of such a matrix in boxes of [box_rows, kTileDepth], swizzled by 128 bytes.
CUtensorMap tensor_map(const char* name, const Tensor& x, uint32_t box_rows) {
  void* encode = nullptr;
  cudaDriverEntryPointQueryResult found;
  check_cuda("scoring", cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found));
  STD_TORCH_CHECK(found == cudaDriverEntryPointSuccess, "scoring: the driver must know cuTensorMapEncodeTiled, got one that does ",
                  "not. Update it to CUDA 12 or later.");
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(x.size(1)), static_cast<cuuint64_t>(x.size(0))};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(row_stride(x)) * 2};
  const cuuint32_t box[2] = {kTileDepth, box_rows}, element_stride[2] = {1, 1};
  CUtensorMap map;
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(x.const_data_ptr()), size, stride, box, element_stride,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "scoring: ", name, " must have a tensor map, got driver error ", static_cast<int>(result),
                  " for shape ", shape_of(x), ". Use backend=\"triton\".");
  return map;
}

Statistics scoring(Tensor hidden, Tensor weight, Tensor target, std::optional<Tensor> row_temperature, double temperature) {
  const char* op = "scoring";
  const Device device = check_device(op, "hidden", hidden);
  check_same_device(op, device, "weight", weight);
  check_operand("hidden", hidden);
  check_operand("weight", weight);
  STD_TORCH_CHECK(weight.size(1) == hidden.size(1), op, ": weight must have shape [V, D] with the D of hidden, ", hidden.size(1), ", got ",
                  shape_of(weight), ". Pass the head of the model that hidden is of.");
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  check_cuda(op, cudaSetDevice(device.gpu));  // tensor maps want a context, which the guard need not give to a thread that is new
  const int major = device_attribute(op, cudaDevAttrComputeCapabilityMajor);
  STD_TORCH_CHECK(major == 9, op, ": the kernel is for sm_90, got sm_", major, "x. Use backend=\"triton\".");
  const int64_t rows = hidden.size(0), vocab_size = weight.size(0);
  const Schedule schedule(rows > 0 ? rows : 1, vocab_size, device_attribute(op, cudaDevAttrMultiProcessorCount));
  StatisticsOutput out;
  const Statistics statistics = new_statistics(hidden, rows, &out);
  if (rows == 0) return statistics;
  const Tensor partial = torch::stable::new_empty(hidden, {schedule.splits, rows, 3}, ScalarType::Float);
  const Tensor target_logit = torch::stable::new_empty(hidden, {rows}, ScalarType::Float);
  const ScoringArguments a = {rows,
                              vocab_size,
                              hidden.size(1),
                              check_gpu_vector<int64_t>(op, device, "target", target, rows),
                              check_gpu_optional(op, device, "row_temperature", row_temperature, rows),
                              static_cast<float>(temperature),
                              static_cast<RunningSoftmax*>(partial.mutable_data_ptr()),
                              target_logit.mutable_data_ptr<float>(),
                              schedule};
  const CUtensorMap hidden_map = tensor_map("hidden", hidden, kTileRows);
  const CUtensorMap weight_map = tensor_map("weight", weight, static_cast<uint32_t>(kTileColumns / schedule.cluster_blocks));
  const cudaStream_t stream = current_stream(hidden);
  const auto kernel = schedule.cluster_blocks == 1 ? hopper_scoring_kernel<1> : hopper_scoring_kernel<kScoringCluster>;
  const int clusters = schedule.items() < schedule.resident_clusters ? schedule.items() : schedule.resident_clusters;
  launch_clusters(op, kernel, clusters * schedule.cluster_blocks, schedule.cluster_blocks, kScoringThreads, kScoringShared, stream,
                  hidden_map, weight_map, a);
  launch_blocks(op, combine_splits_kernel, (rows + 7) / 8, 256, stream, a, out.logprob, out.entropy, out.row_max, out.log_sum);
  return statistics;
}

}  // namespace
}  // namespace trapo

STABLE_TORCH_LIBRARY_IMPL(trapo_native, CUDA, m) { m.impl("scoring", TORCH_BOX(&trapo::scoring)); }

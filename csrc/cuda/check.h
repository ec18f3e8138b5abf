// Argument checks and launch details that the CUDA ops share.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

namespace trapo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Statistics = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename T>
const T* check_vector(const char* op, const char* name, const Tensor& x, int64_t length, ScalarType dtype) {
  STD_TORCH_CHECK(x.is_cuda(), op, ": ", name, " must be on the GPU of the logits, got a tensor on the CPU.");
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == length && x.is_contiguous() && x.scalar_type() == dtype, op, ": ", name,
                  " must be contiguous, of length ", length, " and of the dtype of the schema, got ", x.dim(), " dimensions.");
  return static_cast<const T*>(x.const_data_ptr());
}

inline const float* check_floats(const char* op, const char* name, const std::optional<Tensor>& x, int64_t length) {
  return x.has_value() ? check_vector<float>(op, name, *x, length, ScalarType::Float) : nullptr;
}

inline void check_cuda(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the launch failed: ", cudaGetErrorString(error), ".");
}

inline cudaStream_t current_stream(const Tensor& like) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

struct StatisticsOutput {
  float *logprob, *entropy, *row_max, *log_sum;
};

inline std::vector<Tensor> new_statistics(const Tensor& like, int64_t rows, StatisticsOutput* out) {
  std::vector<Tensor> tensors;
  for (int i = 0; i < 4; ++i) tensors.push_back(torch::stable::new_empty(like, {rows}, ScalarType::Float));
  *out = {tensors[0].mutable_data_ptr<float>(), tensors[1].mutable_data_ptr<float>(), tensors[2].mutable_data_ptr<float>(),
          tensors[3].mutable_data_ptr<float>()};
  return tensors;
}

}  // namespace trapo

// The input rules of the native ops, in the manner of trapo_kernels/checks.py: the rule, what was given, the remedy; and the
// statistics that they return.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "gates.h"

namespace trapo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& x) {
  std::string shape;
  for (int64_t i = 0; i < x.dim(); ++i) shape += (i ? ", " : "") + std::to_string(x.size(i));
  return "[" + shape + "]";
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Byte:
      return "torch.uint8";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline void check_dtype(const char* op, const char* name, const Tensor& x, ScalarType dtype) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, op, ": ", name, " must be ", dtype_name(dtype), ", got ", dtype_name(x.scalar_type()),
                  ". Convert it with ", name, ".to(", dtype_name(dtype), ").");
}

// The data of a contiguous vector with one T per row ("C") or column ("V") of the logits.
template <typename T>
const T* check_vector(const char* op, const char* name, const Tensor& x, int64_t length, const char* axis = "C") {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == length, op, ": ", name, " must have shape [", axis, "] = [", length, "], got ",
                  shape_of(x), ". Pass one value per ", *axis == 'C' ? "row" : "column", " of the logits.");
  check_dtype(op, name, x, torch::headeronly::CppTypeToScalarType<T>::value);
  STD_TORCH_CHECK(x.is_contiguous(), op, ": ", name, " must be contiguous, got stride ", x.stride(0), ". Pass ", name,
                  ".contiguous().");
  return x.const_data_ptr<T>();
}

inline const float* check_optional(const char* op, const char* name, const std::optional<Tensor>& x, int64_t length,
                                   const char* axis = "C") {
  return x.has_value() ? check_vector<float>(op, name, *x, length, axis) : nullptr;
}

// Logits or their gradient: rows of any stride, elements one after the other.
inline void check_rows(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, op, ": ", name, " must have shape [C, V], got ", shape_of(x), ". Flatten all but the vocabulary.");
  STD_TORCH_CHECK(x.stride(1) == 1 || x.size(1) == 1, op, ": ", name, " must have unit stride in a row, got ", x.stride(1),
                  ". Pass ", name, ".contiguous().");
}

// That a gradient goes with logits [rows, vocab_size].
inline void check_gradient_shape(const char* op, const Tensor& grad, int64_t rows, int64_t vocab_size) {
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == rows && grad.size(1) == vocab_size, op, ": grad must have the shape of logits, [",
                  rows, ", ", vocab_size, "], got ", shape_of(grad), ". Pass the logits or torch.empty_like(logits).");
}

using Statistics = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Where the data of fp32 statistics [C] lie.
struct StatisticsOutput {
  float *logprob, *entropy, *row_max, *log_sum;
};

// Room for the statistics of some rows, for an op to return; `out` says where it is.
inline Statistics new_statistics(const Tensor& like, int64_t rows, StatisticsOutput* out) {
  const auto room = [&](float** data) {
    Tensor tensor = torch::stable::new_empty(like, {rows}, ScalarType::Float);
    *data = tensor.mutable_data_ptr<float>();
    return tensor;
  };
  return {room(&out->logprob), room(&out->entropy), room(&out->row_max), room(&out->log_sum)};
}

inline Gates check_gates(const char* op, const std::vector<int64_t>& codes, const std::vector<double>& s) {
  STD_TORCH_CHECK(codes.size() == 3 && s.size() == kNumScalars, op, ": codes and scalars must have 3 and ", kNumScalars,
                  " entries, got ", codes.size(), " and ", s.size(), ". Take them from terms.gate_scalars(objective).");
  const bool known = codes[0] >= 0 && codes[0] <= kLastGate && codes[1] >= 0 && codes[1] <= kLastGate && codes[2] >= 0 &&
                     codes[2] <= kLastKl;
  STD_TORCH_CHECK(known, op, ": codes must lie in [0, ", kLastGate, "], [0, ", kLastGate, "] and [0, ", kLastKl, "], got ", codes[0],
                  ", ", codes[1], " and ", codes[2], ". Install trapo again, so that csrc/gates.h has the gates of gates.py.");
  const auto f = [&](int i) { return static_cast<float>(s[i]); };
  return {static_cast<int>(codes[0]), static_cast<int>(codes[1]), static_cast<int>(codes[2]),
          {f(0), f(1), f(2)},         {f(3), f(4), f(5)},         f(6), f(7)};
}

}  // namespace trapo

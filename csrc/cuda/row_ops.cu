// The CUDA implementations of the row schemas in csrc/ops.cpp: argument checks and the choice of kernel.

#include <string>

#include "check.h"
#include "row_kernels.cuh"

namespace trapo {
namespace {

constexpr int64_t kMostColumns = int64_t{1} << 30;  // the kernels count the columns of a row in 32 bits
constexpr int64_t kReservedBytes = 2048;  // of shared memory, per block: its static part, a slice's rounding, what the system keeps

struct Matrix {
  void* data;
  int64_t rows, columns, stride, element_size;
  ScalarType dtype;
  Device device;

  bool aligned() const {
    return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 && stride * element_size % kVectorBytes == 0;
  }
};

Matrix check_matrix(const char* op, const char* name, const Tensor& x) {
  const Device device = check_device(op, name, x);
  check_rows(op, name, x);
  STD_TORCH_CHECK(x.size(1) < kMostColumns, op, ": ", name, " must have fewer than 2^30 columns, got ", x.size(1),
                  ". Shard the vocabulary with process_group.");
  return {x.mutable_data_ptr(), x.size(0), x.size(1), x.stride(0), static_cast<int64_t>(x.element_size()), x.scalar_type(), device};
}

Matrix check_grad(const char* op, const Matrix& logits, const Tensor& x) {
  check_same_device(op, logits.device, "grad", x);
  check_gradient_shape(op, x, logits.rows, logits.columns);
  return check_matrix(op, "grad", x);
}

// What a list holds where a CPU may have several parts.
const Tensor& only_part(const char* op, const char* name, const std::vector<Tensor>& parts) {
  STD_TORCH_CHECK(parts.size() == 1, op, ": ", name, " must be in one part on a GPU, got ", parts.size(), ". Pass a list of one tensor.");
  return parts[0];
}

RowArguments check_arguments(const char* op, const Matrix& logits, const Tensor& target, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& row_temperature, double temperature, double softcap) {
  RowArguments a = {};
  a.logits = logits.data;
  a.row_stride = logits.stride;
  a.vocab_size = logits.columns;
  a.target = check_gpu_vector<int64_t>(op, logits.device, "target", target, logits.rows);
  a.bias = check_gpu_optional(op, logits.device, "bias", bias, logits.columns, "V");
  a.row_temperature = check_gpu_optional(op, logits.device, "row_temperature", row_temperature, logits.rows);
  a.temperature = static_cast<float>(temperature);
  a.softcap = static_cast<float>(softcap);
  return a;
}

enum class Kind { kPolicy, kGradient };

// Launches a kernel on clusters whose shared memory holds a row: of so many blocks that two fit a multiprocessor, else one. False where
// this GPU can place no such cluster.
template <typename T, typename G>
bool launch_cluster_per_row(const char* op, const RowArguments& a, int64_t rows, cudaStream_t stream) {
  if (device_attribute(op, cudaDevAttrComputeCapabilityMajor) < 9) return false;
  constexpr int kWidth = kVectorBytes / sizeof(T);
  const auto kernel = cluster_policy_kernel<T, G, kWidth>;
  const int64_t row_bytes = a.vocab_size * int64_t{sizeof(T)};
  const int shared[] = {device_attribute(op, cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2,
                        device_attribute(op, cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  for (const int of_block : shared) {
    for (int blocks = 1; blocks <= kLargestCluster; blocks *= 2) {
      const int64_t slice = cluster_slice(a.vocab_size, blocks, kWidth), bytes = slice * int64_t{sizeof(T)};
      if ((row_bytes + blocks - 1) / blocks + kReservedBytes > of_block || !can_place(op, kernel, blocks, kThreads, bytes)) continue;
      launch_clusters(op, kernel, rows * blocks, blocks, kThreads, bytes, stream, a, slice);
      return true;
    }
  }
  return false;
}

template <typename T, typename G>
void launch(const char* op, Kind kind, const RowArguments& a, int64_t rows, bool aligned, cudaStream_t stream) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  if (kind == Kind::kPolicy && a.grad && aligned && launch_cluster_per_row<T, G>(op, a, rows, stream)) return;
  const auto kernel = kind == Kind::kPolicy ? (aligned ? row_policy_kernel<T, G, kWidth> : row_policy_kernel<T, G, 1>)
                                            : (aligned ? row_gradient_kernel<T, G, kWidth> : row_gradient_kernel<T, G, 1>);
  launch_blocks(op, kernel, rows, kThreads, stream, a);
}

void dispatch(const char* op, Kind kind, const RowArguments& a, const Matrix& logits, const Matrix* grad, cudaStream_t stream) {
  if (logits.rows == 0) return;
  const bool aligned = logits.aligned() && (!grad || grad->aligned());
  const ScalarType from = logits.dtype, to = grad ? grad->dtype : logits.dtype;
  if (from == ScalarType::Float && to == ScalarType::Float) return launch<float, float>(op, kind, a, logits.rows, aligned, stream);
  if (from == ScalarType::Float && to == ScalarType::BFloat16) {
    return launch<float, __nv_bfloat16>(op, kind, a, logits.rows, aligned, stream);
  }
  if (from == ScalarType::Float && to == ScalarType::Half) return launch<float, __half>(op, kind, a, logits.rows, aligned, stream);
  if (from == ScalarType::BFloat16 && to == from) {
    return launch<__nv_bfloat16, __nv_bfloat16>(op, kind, a, logits.rows, aligned, stream);
  }
  if (from == ScalarType::Half && to == from) return launch<__half, __half>(op, kind, a, logits.rows, aligned, stream);
  STD_TORCH_CHECK(false, op, ": logits must be float32, bfloat16 or float16 and their gradient of that dtype, or of 16 bits ",
                  "beside float32, got ", dtype_name(from), " and ", dtype_name(to), ". Convert the logits, or choose another backend.");
}

Statistics row_statistics(Tensor logits_tensor, Tensor target, std::optional<Tensor> bias, std::optional<Tensor> row_temperature,
                          double temperature, double softcap) {
  const char* op = "row_statistics";
  const Matrix logits = check_matrix(op, "logits", logits_tensor);
  const torch::stable::accelerator::DeviceGuard guard(logits_tensor.get_device_index());
  RowArguments a = check_arguments(op, logits, target, bias, row_temperature, temperature, softcap);
  StatisticsOutput out;
  const Statistics statistics = new_statistics(logits_tensor, logits.rows, &out);
  a.logprob = out.logprob, a.entropy = out.entropy, a.row_max = out.row_max, a.log_sum = out.log_sum;
  dispatch(op, Kind::kPolicy, a, logits, nullptr, current_stream(logits_tensor));
  return statistics;
}

void row_gradient(std::vector<Tensor> logits_parts, Tensor target, std::optional<Tensor> bias,
                  std::optional<Tensor> row_temperature, double temperature, double softcap, Tensor logprob, Tensor entropy,
                  Tensor row_max, Tensor log_sum, std::optional<Tensor> grad_logprob, std::optional<Tensor> grad_entropy,
                  std::vector<Tensor> grad_parts) {
  const char* op = "row_gradient";
  const Tensor& logits_tensor = only_part(op, "logits", logits_parts);
  const Matrix logits = check_matrix(op, "logits", logits_tensor), grad = check_grad(op, logits, only_part(op, "grad", grad_parts));
  const torch::stable::accelerator::DeviceGuard guard(logits_tensor.get_device_index());
  RowArguments a = check_arguments(op, logits, target, bias, row_temperature, temperature, softcap);
  a.grad = grad.data;
  a.grad_stride = grad.stride;
  const auto given = [&](const char* name, const Tensor& x) {
    return const_cast<float*>(check_gpu_vector<float>(op, logits.device, name, x, logits.rows));  // read only
  };
  a.logprob = given("logprob", logprob), a.entropy = given("entropy", entropy);
  a.row_max = given("row_max", row_max), a.log_sum = given("log_sum", log_sum);
  a.grad_logprob = check_gpu_optional(op, logits.device, "grad_logprob", grad_logprob, logits.rows);
  a.grad_entropy = check_gpu_optional(op, logits.device, "grad_entropy", grad_entropy, logits.rows);
  dispatch(op, Kind::kGradient, a, logits, &grad, current_stream(logits_tensor));
}

void put_streams(const char* op, const Device& device, RowArguments& a, int64_t rows, const Tensor& role, const Tensor& anchor,
                 const Tensor& signal, const Tensor& advantage, const std::optional<Tensor>& kl_weight,
                 const std::optional<Tensor>& ref_logprob, const std::vector<int64_t>& codes, const std::vector<double>& scalars) {
  a.role = check_gpu_vector<uint8_t>(op, device, "role", role, rows);
  a.anchor = check_gpu_vector<float>(op, device, "anchor", anchor, rows);
  a.signal = check_gpu_vector<float>(op, device, "signal", signal, rows);
  a.advantage = check_gpu_vector<float>(op, device, "advantage", advantage, rows);
  a.kl_weight = check_gpu_optional(op, device, "kl_weight", kl_weight, rows);
  a.ref_logprob = check_gpu_optional(op, device, "ref_logprob", ref_logprob, rows);
  a.gates = check_gates(op, codes, scalars);
}

Statistics row_policy(std::vector<Tensor> logits_parts, Tensor target, std::optional<Tensor> bias,
                      std::optional<Tensor> row_temperature, double temperature, double softcap, Tensor role, Tensor anchor,
                      Tensor signal, Tensor advantage, std::optional<Tensor> kl_weight, std::optional<Tensor> ref_logprob,
                      std::optional<Tensor> grad_entropy, std::vector<int64_t> codes, std::vector<double> scalars,
                      std::vector<Tensor> grad_parts) {
  const char* op = "row_policy";
  const Tensor& logits_tensor = only_part(op, "logits", logits_parts);
  const Matrix logits = check_matrix(op, "logits", logits_tensor);
  const torch::stable::accelerator::DeviceGuard guard(logits_tensor.get_device_index());
  RowArguments a = check_arguments(op, logits, target, bias, row_temperature, temperature, softcap);
  put_streams(op, logits.device, a, logits.rows, role, anchor, signal, advantage, kl_weight, ref_logprob, codes, scalars);
  a.grad_entropy = check_gpu_optional(op, logits.device, "grad_entropy", grad_entropy, logits.rows);
  StatisticsOutput out;
  const Statistics statistics = new_statistics(logits_tensor, logits.rows, &out);
  a.logprob = out.logprob, a.entropy = out.entropy, a.row_max = out.row_max, a.log_sum = out.log_sum;
  std::optional<Matrix> grad;
  if (!grad_parts.empty()) {
    grad = check_grad(op, logits, only_part(op, "grad", grad_parts));
    a.grad = grad->data;
    a.grad_stride = grad->stride;
  }
  dispatch(op, Kind::kPolicy, a, logits, grad ? &*grad : nullptr, current_stream(logits_tensor));
  return statistics;
}

Tensor token_coefficient(Tensor logprob, Tensor role, Tensor anchor, Tensor signal, Tensor advantage,
                         std::optional<Tensor> kl_weight, std::optional<Tensor> ref_logprob, std::vector<int64_t> codes,
                         std::vector<double> scalars) {
  const char* op = "token_coefficient";
  const int64_t tokens = logprob.dim() == 0 ? 0 : logprob.size(0);
  const Device device = check_device(op, "logprob", logprob);
  const float* values = check_vector<float>(op, "logprob", logprob, tokens);
  const torch::stable::accelerator::DeviceGuard guard(logprob.get_device_index());
  RowArguments a = {};
  put_streams(op, device, a, tokens, role, anchor, signal, advantage, kl_weight, ref_logprob, codes, scalars);
  Tensor out = torch::stable::new_empty(logprob, {tokens});
  if (tokens == 0) return out;
  launch_blocks(op, token_coefficient_kernel, (tokens + 255) / 256, 256, current_stream(logprob), a, values,
                out.mutable_data_ptr<float>(), tokens);
  return out;
}

}  // namespace
}  // namespace trapo

STABLE_TORCH_LIBRARY_IMPL(trapo_native, CUDA, m) {
  m.impl("row_statistics", TORCH_BOX(&trapo::row_statistics));
  m.impl("row_gradient", TORCH_BOX(&trapo::row_gradient));
  m.impl("row_policy", TORCH_BOX(&trapo::row_policy));
  m.impl("token_coefficient", TORCH_BOX(&trapo::token_coefficient));
}

#ifdef TRAPO_CUDA_ARCHS  // by csrc/build.py: what this was compiled for, such as 80_90a_100+PTX
#define TRAPO_QUOTED(x) #x
#define TRAPO_STRING(x) TRAPO_QUOTED(x)

static std::string cuda_archs() { return TRAPO_STRING(TRAPO_CUDA_ARCHS); }

STABLE_TORCH_LIBRARY_FRAGMENT(trapo_native, m) { m.def("cuda_archs() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(trapo_native, CompositeExplicitAutograd, m) { m.impl("cuda_archs", TORCH_BOX(&cuda_archs)); }
#endif

// The CPU implementations of the schemas in csrc/ops.cpp: rows shared out to threads, per-row arithmetic.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "../checks.h"
#include "gemm.h"
#include "rows.h"

namespace trapo {
namespace {

constexpr int64_t kLogitsPerTask = 1 << 15;  // below it a thread costs more than it saves

// Rows [C, V] of fp32 or bf16. Their columns may lie in several tensors, one beside the other.
struct Rows {
  struct Columns {
    char* data;
    int64_t first, count, row_bytes;

    char* row(int64_t i) const { return data + i * row_bytes; }
    float* floats(int64_t i) const { return reinterpret_cast<float*>(row(i)); }
    BFloat16* narrow(int64_t i) const { return reinterpret_cast<BFloat16*>(row(i)); }
  };

  std::vector<Columns> parts;
  int64_t rows = 0, vocab_size = 0;
  bool narrow = false;  // bf16

  int64_t element_size() const { return narrow ? 2 : 4; }
  int64_t rows_per_task() const { return vocab_size >= kLogitsPerTask ? 1 : kLogitsPerTask / (vocab_size + 1) + 1; }
  bool has(int64_t column) const { return column >= 0 && column < vocab_size; }
  // Element `column` of row i, which it has.
  char* at(int64_t i, int64_t column) const {
    const Columns* part = parts.data();
    while (column >= part->first + part->count) ++part;
    return part->row(i) + (column - part->first) * element_size();
  }
  void put(int64_t i, int64_t column, float x) const {
    const c10::BFloat16 rounded(x);
    std::memcpy(at(i, column), narrow ? static_cast<const void*>(&rounded) : &x, element_size());
  }
  void put_zeros(int64_t i) const {
    for (const Columns& part : parts) std::memset(part.row(i), 0, part.count * element_size());
  }
};

Rows check_parts(const char* op, const char* name, const std::vector<Tensor>& tensors, ScalarType dtype) {
  STD_TORCH_CHECK(!tensors.empty(), op, ": ", name, " must be one tensor or more, got none. Pass all columns of the rows.");
  Rows all;
  all.narrow = dtype == ScalarType::BFloat16;
  for (const Tensor& x : tensors) {
    check_rows(op, name, x);
    check_dtype(op, name, x, dtype);
    if (all.parts.empty()) all.rows = x.size(0);
    STD_TORCH_CHECK(x.size(0) == all.rows, op, ": parts of ", name, " must have as many rows as the first, ", all.rows, ", got ",
                    shape_of(x), ". Pass the columns of the same rows.");
    all.parts.push_back({static_cast<char*>(x.mutable_data_ptr()), all.vocab_size, x.size(1), x.stride(0) * all.element_size()});
    all.vocab_size += x.size(1);
  }
  return all;
}

Rows check_logits(const char* op, const std::vector<Tensor>& tensors) { return check_parts(op, "logits", tensors, ScalarType::Float); }

// Where dL/dlogits goes, fp32 or bf16: memory of its own or that of the logits, row by row, in the same parts.
Rows check_grad(const char* op, const std::vector<Tensor>& logits, const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(tensors.size() == logits.size(), op, ": grad must have as many parts as logits, ", logits.size(), ", got ",
                  tensors.size(), ". Pass one for each.");
  for (size_t i = 0; i < tensors.size(); ++i) check_gradient_shape(op, tensors[i], logits[i].size(0), logits[i].size(1));
  const bool narrow = tensors[0].scalar_type() == ScalarType::BFloat16;
  return check_parts(op, "grad", tensors, narrow ? ScalarType::BFloat16 : ScalarType::Float);
}

// The parts of one row of logits, for the sweeps.
class RowParts {
 public:
  explicit RowParts(const Rows& logits) : logits_(logits), parts_(logits.parts.size()) {}

  const std::vector<Part>& of(int64_t i) {
    for (size_t k = 0; k < parts_.size(); ++k) parts_[k] = {logits_.parts[k].floats(i), logits_.parts[k].count};
    return parts_;
  }

 private:
  const Rows& logits_;
  std::vector<Part> parts_;
};

// The transform of every row: one softcap, and one temperature or one for each row.
struct Transforms {
  const float* bias;
  const float* row_temperature;
  float temperature, softcap;

  RowTransform of(int64_t i) const { return {softcap, row_temperature ? row_temperature[i] : temperature}; }

  // The raw logits of a row, in place, become what the gradient's sweep reads.
  void apply(const RowSweeps& sweeps, const Rows& logits, const std::vector<Part>& row, const RowTransform& t) const {
    if (bias == nullptr && t.softcap == 0.0f && t.temperature == 1.0f) return;
    for (size_t k = 0; k < row.size(); ++k) {
      sweeps.transform(row[k].data, bias ? bias + logits.parts[k].first : nullptr, row[k].count, t);
    }
  }
};

Transforms check_transforms(const char* op, const Rows& logits, const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& row_temperature, double temperature, double softcap) {
  return {check_optional(op, "bias", bias, logits.vocab_size, "V"),
          check_optional(op, "row_temperature", row_temperature, logits.rows),
          static_cast<float>(temperature), static_cast<float>(softcap)};
}

struct Output : StatisticsOutput {
  void ignore(int64_t i) const { logprob[i] = entropy[i] = row_max[i] = log_sum[i] = 0.0f; }

  void put(int64_t i, const Row& row) const {
    logprob[i] = static_cast<float>(row.logprob);
    entropy[i] = static_cast<float>(row.entropy);
    row_max[i] = row.row_max;
    log_sum[i] = static_cast<float>(row.log_sum);
  }
};

// dL/d(raw logit) of row i, which `held` holds transformed; the gradient may take its place. A target below 0 lies on another shard of
// the vocabulary; one beyond it has made the row NaN.
void write_gradient(const RowSweeps& sweeps, const std::vector<Part>& held, const Rows& grad, int64_t i, int64_t target,
                    const Row& row, float c, float e, const RowTransform& t) {
  const float bracket = static_cast<float>(c + e * (row.entropy - row.log_sum));
  for (size_t k = 0; k < held.size(); ++k) {
    const Rows::Columns& to = grad.parts[k];
    if (grad.narrow) {
      sweeps.gradient_bf16(held[k].data, to.narrow(i), to.count, row.row_max, row.inverse_total, e, bracket, t);
    } else {
      sweeps.gradient(held[k].data, to.floats(i), to.count, row.row_max, row.inverse_total, e, bracket, t);
    }
  }
  if (!grad.has(target)) return;
  const double probability = std::exp(row.logprob);
  double at_target = -c * std::expm1(row.logprob);  // c (1 - p) without cancellation at p → 1
  if (e != 0.0f && probability != 0.0) at_target -= probability * e * (row.logprob + row.entropy);
  at_target /= t.temperature;
  if (t.softcap != 0.0f) at_target *= 1.0 - static_cast<double>(row.target_held) * row.target_held;
  grad.put(i, target, static_cast<float>(at_target));
}

Statistics row_statistics(Tensor logits_tensor, Tensor target_tensor, std::optional<Tensor> bias,
                          std::optional<Tensor> row_temperature, double temperature, double softcap) {
  const char* op = "row_statistics";
  const Rows logits = check_logits(op, {logits_tensor});
  const auto transforms = check_transforms(op, logits, bias, row_temperature, temperature, softcap);
  const int64_t* target = check_vector<int64_t>(op, "target", target_tensor, logits.rows);
  Output out;
  const Statistics statistics = new_statistics(logits_tensor, logits.rows, &out);
  const RowSweeps& sweeps = row_sweeps();
  torch::stable::parallel_for(0, logits.rows, logits.rows_per_task(), [&](int64_t begin, int64_t end) {
    RowParts parts(logits);
    for (int64_t i = begin; i < end; ++i) {
      if (target[i] == kIgnoredTarget) {
        out.ignore(i);
        continue;
      }
      const std::vector<Part>& row = parts.of(i);
      out.put(i, sweeps.statistics(row.data(), row.size(), transforms.bias, target[i], transforms.of(i)));
    }
  });
  return statistics;
}

void row_gradient(std::vector<Tensor> logits_tensors, Tensor target_tensor, std::optional<Tensor> bias,
                  std::optional<Tensor> row_temperature, double temperature, double softcap, Tensor logprob_tensor,
                  Tensor entropy_tensor, Tensor row_max_tensor, Tensor log_sum_tensor, std::optional<Tensor> grad_logprob_tensor,
                  std::optional<Tensor> grad_entropy_tensor, std::vector<Tensor> grad_tensors) {
  const char* op = "row_gradient";
  const Rows logits = check_logits(op, logits_tensors), grads = check_grad(op, logits_tensors, grad_tensors);
  const auto transforms = check_transforms(op, logits, bias, row_temperature, temperature, softcap);
  const int64_t* target = check_vector<int64_t>(op, "target", target_tensor, logits.rows);
  const float* logprob = check_vector<float>(op, "logprob", logprob_tensor, logits.rows);
  const float* entropy = check_vector<float>(op, "entropy", entropy_tensor, logits.rows);
  const float* row_max = check_vector<float>(op, "row_max", row_max_tensor, logits.rows);
  const float* log_sum = check_vector<float>(op, "log_sum", log_sum_tensor, logits.rows);
  const float* grad_logprob = check_optional(op, "grad_logprob", grad_logprob_tensor, logits.rows);
  const float* grad_entropy = check_optional(op, "grad_entropy", grad_entropy_tensor, logits.rows);
  const RowSweeps& sweeps = row_sweeps();
  torch::stable::parallel_for(0, logits.rows, logits.rows_per_task(), [&](int64_t begin, int64_t end) {
    RowParts parts(logits);
    for (int64_t i = begin; i < end; ++i) {
      if (target[i] == kIgnoredTarget) {
        grads.put_zeros(i);
        continue;
      }
      const RowTransform t = transforms.of(i);
      const std::vector<Part>& held = parts.of(i);
      transforms.apply(sweeps, logits, held, t);
      const float target_held = logits.has(target[i]) ? *reinterpret_cast<float*>(logits.at(i, target[i])) : NAN;
      const Row row = {logprob[i], entropy[i], log_sum[i], row_max[i], target_held,
                       static_cast<float>(std::exp(-static_cast<double>(log_sum[i])))};
      write_gradient(sweeps, held, grads, i, target[i], row, grad_logprob ? grad_logprob[i] : 0.0f,
                     grad_entropy ? grad_entropy[i] : 0.0f, t);
    }
  });
}

// The streams of trapo_kernels/terms.py, on which the coefficient of a token depends besides its logprob.
struct Streams {
  const uint8_t* role;
  const float *anchor, *signal, *advantage, *kl_weight, *ref_logprob;

  float coefficient(const Gates& gates, int64_t i, float logprob) const {
    return trapo::coefficient(gates, logprob, role[i], anchor[i], signal[i], advantage[i], kl_weight ? kl_weight[i] : 0.0f,
                              ref_logprob ? ref_logprob[i] : 0.0f);
  }
};

Streams check_streams(const char* op, int64_t rows, const Tensor& role, const Tensor& anchor, const Tensor& signal,
                      const Tensor& advantage, const std::optional<Tensor>& kl_weight, const std::optional<Tensor>& ref_logprob) {
  return {check_vector<uint8_t>(op, "role", role, rows), check_vector<float>(op, "anchor", anchor, rows),
          check_vector<float>(op, "signal", signal, rows), check_vector<float>(op, "advantage", advantage, rows),
          check_optional(op, "kl_weight", kl_weight, rows), check_optional(op, "ref_logprob", ref_logprob, rows)};
}

Statistics row_policy(std::vector<Tensor> logits_tensors, Tensor target_tensor, std::optional<Tensor> bias,
                      std::optional<Tensor> row_temperature, double temperature, double softcap, Tensor role, Tensor anchor,
                      Tensor signal, Tensor advantage, std::optional<Tensor> kl_weight, std::optional<Tensor> ref_logprob,
                      std::optional<Tensor> grad_entropy_tensor, std::vector<int64_t> codes, std::vector<double> scalars,
                      std::vector<Tensor> grad_tensors) {
  const char* op = "row_policy";
  const Rows logits = check_logits(op, logits_tensors);
  const Rows grads = grad_tensors.empty() ? Rows{} : check_grad(op, logits_tensors, grad_tensors);
  const auto transforms = check_transforms(op, logits, bias, row_temperature, temperature, softcap);
  const int64_t* target = check_vector<int64_t>(op, "target", target_tensor, logits.rows);
  const Streams streams = check_streams(op, logits.rows, role, anchor, signal, advantage, kl_weight, ref_logprob);
  const float* grad_entropy = check_optional(op, "grad_entropy", grad_entropy_tensor, logits.rows);
  const Gates gates = check_gates(op, codes, scalars);
  Output out;
  const Statistics statistics = new_statistics(target_tensor, logits.rows, &out);
  const RowSweeps& sweeps = row_sweeps();
  torch::stable::parallel_for(0, logits.rows, logits.rows_per_task(), [&](int64_t begin, int64_t end) {
    RowParts parts(logits);
    for (int64_t i = begin; i < end; ++i) {
      if (streams.role[i] == kIgnored) {
        out.ignore(i);
        grads.put_zeros(i);
        continue;
      }
      const RowTransform t = transforms.of(i);
      const std::vector<Part>& held = parts.of(i);
      const Row row = sweeps.statistics(held.data(), held.size(), transforms.bias, target[i], t);
      out.put(i, row);
      if (!grads.parts.empty()) {
        const float c = streams.coefficient(gates, i, static_cast<float>(row.logprob));
        write_gradient(sweeps, held, grads, i, target[i], row, c, grad_entropy ? grad_entropy[i] : 0.0f, t);
      }
    }
  });
  return statistics;
}

Tensor token_coefficient(Tensor logprob_tensor, Tensor role, Tensor anchor, Tensor signal, Tensor advantage,
                         std::optional<Tensor> kl_weight, std::optional<Tensor> ref_logprob, std::vector<int64_t> codes,
                         std::vector<double> scalars) {
  const char* op = "token_coefficient";
  const int64_t tokens = logprob_tensor.size(0);
  const float* logprob = check_vector<float>(op, "logprob", logprob_tensor, tokens);
  const Streams streams = check_streams(op, tokens, role, anchor, signal, advantage, kl_weight, ref_logprob);
  const Gates gates = check_gates(op, codes, scalars);
  Tensor out = torch::stable::new_empty(logprob_tensor, {tokens});
  float* c = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, tokens, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      c[i] = streams.role[i] == kIgnored ? 0.0f : streams.coefficient(gates, i, logprob[i]);
    }
  });
  return out;
}

std::string instruction_set_in_use() { return instruction_set(); }

void choose_instruction_set(std::string name) {
  STD_TORCH_CHECK(use_instruction_set(name.c_str()), "_use_instruction_set: this processor or build has no ", name,
                  ". Choose another: portable is everywhere.");
}

int64_t num_scalars() { return kNumScalars; }

}  // namespace
}  // namespace trapo

STABLE_TORCH_LIBRARY_IMPL(trapo_native, CPU, m) {
  m.impl("row_statistics", TORCH_BOX(&trapo::row_statistics));
  m.impl("row_gradient", TORCH_BOX(&trapo::row_gradient));
  m.impl("row_policy", TORCH_BOX(&trapo::row_policy));
  m.impl("token_coefficient", TORCH_BOX(&trapo::token_coefficient));
  m.impl("gemm", TORCH_BOX(&trapo::gemm));
}

STABLE_TORCH_LIBRARY_IMPL(trapo_native, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&trapo::instruction_set_in_use));
  m.impl("_use_instruction_set", TORCH_BOX(&trapo::choose_instruction_set));
  m.impl("bf16_units", TORCH_BOX(&trapo::bf16_units));
  m.impl("num_scalars", TORCH_BOX(&trapo::num_scalars));
}

// Schemas of the native operations. csrc/cpu and csrc/cuda both implement those on rows of logits, row_* and token_coefficient;
// scoring and scale are of csrc/cuda alone, and gemm, bf16_units, num_scalars and *instruction_set are of csrc/cpu alone.
// trapo_kernels/backends/native.py is their only caller and says what the arguments mean.
//
// Shapes: logits [C, V] with unit stride in a row, bias [V], all other tensors [C]; in place of logits scoring has hidden [C, D] and
// weight [V, D]; scale has x and out of any one shape, which may be one tensor, and a 0-d factor; gemm has a [M, K], b [K, N] and
// out [M, N]. softcap 0 means none. `row_temperature`, where given, replaces `temperature`. `grad` may be `logits` itself, or begin where they do: the gradient then takes
// their place. Those of row_gradient and row_policy are lists: on a CPU the columns of the logits may lie in several tensors [C, V₁],
// [C, V₂], …; no `grad` at all means that none is wanted. (Marks of aliasing cannot say that it may be the logits.)

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(trapo_native, m) {
  m.def(
      "row_statistics(Tensor(a!) logits, Tensor target, Tensor? bias, Tensor? row_temperature, float temperature, "
      "float softcap) -> (Tensor logprob, Tensor entropy, Tensor row_max, Tensor log_sum)");
  m.def(
      "row_gradient(Tensor(a!)[] logits, Tensor target, Tensor? bias, Tensor? row_temperature, float temperature, "
      "float softcap, Tensor logprob, Tensor entropy, Tensor row_max, Tensor log_sum, Tensor? grad_logprob, "
      "Tensor? grad_entropy, Tensor(b!)[] grad) -> ()");
  m.def(
      "row_policy(Tensor(a!)[] logits, Tensor target, Tensor? bias, Tensor? row_temperature, float temperature, "
      "float softcap, Tensor role, Tensor anchor, Tensor signal, Tensor advantage, Tensor? kl_weight, "
      "Tensor? ref_logprob, Tensor? grad_entropy, int[] codes, float[] scalars, Tensor(b!)[] grad) "
      "-> (Tensor logprob, Tensor entropy, Tensor row_max, Tensor log_sum)");
  m.def(
      "token_coefficient(Tensor logprob, Tensor role, Tensor anchor, Tensor signal, Tensor advantage, Tensor? kl_weight, "
      "Tensor? ref_logprob, int[] codes, float[] scalars) -> Tensor");
  m.def(
      "scoring(Tensor hidden, Tensor weight, Tensor target, Tensor? row_temperature, float temperature) "
      "-> (Tensor logprob, Tensor entropy, Tensor row_max, Tensor log_sum)");
  m.def("scale(Tensor x, Tensor factor, Tensor(a!) out) -> ()");
  m.def("gemm(Tensor a, Tensor b, Tensor(a!) out, float beta) -> ()");
  m.def("bf16_units() -> str");
  m.def("num_scalars() -> int");
  m.def("instruction_set() -> str");
  m.def("_use_instruction_set(str name) -> ()");  // for tests
}

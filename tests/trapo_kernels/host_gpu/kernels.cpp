// The CUDA kernels of csrc on the machine of machine.h, and their host-side arithmetic, for __init__.py to call.

#include "csrc/cuda/layout.h"
#include "csrc/cuda/softmax.h"
#include "csrc/cuda/ptx.cuh"  // the one beside this file: __init__.py puts it there

#define __CUDA_ARCH__ 900
#define __CUDA_ARCH_FEAT_SM90_ALL

namespace trapo {

using std::min;
alignas(1024) thread_local unsigned char memory[host_gpu::kSharedBytes];  // the kernels' names for their dynamic shared memory
alignas(1024) thread_local uint8_t shared[host_gpu::kSharedBytes];

}  // namespace trapo

#include "csrc/cuda/hopper_scoring.cuh"
#include "csrc/cuda/row_kernels.cuh"

using namespace trapo;

namespace {

char* row_memory() { return reinterpret_cast<char*>(memory); }
char* scoring_memory() { return reinterpret_cast<char*>(shared); }

int put_error(const std::string& error, char* text, size_t size) {
  std::strncpy(text, error.c_str(), size - 1);
  return error.empty() ? 0 : 1;
}

enum Kind { kPolicy, kGradient, kCluster };

template <typename T, typename G, int kWidth>
std::string run(int kind, const RowArguments& a, unsigned rows, unsigned cluster, uint64_t seed) {
  if (kind == kPolicy) return host_gpu::launch(rows, kThreads, 1, 0, seed, row_memory, [&] { row_policy_kernel<T, G, kWidth>(a); });
  if (kind == kGradient) return host_gpu::launch(rows, kThreads, 1, 0, seed, row_memory, [&] { row_gradient_kernel<T, G, kWidth>(a); });
  if constexpr (kWidth > 1) {
    const int64_t slice = cluster_slice(a.vocab_size, static_cast<int>(cluster), kWidth);
    return host_gpu::launch(rows * cluster, kThreads, cluster, static_cast<size_t>(slice) * sizeof(T), seed, row_memory,
                            [&] { cluster_policy_kernel<T, G, kWidth>(a, slice); });
  }
  return "a cluster needs aligned rows";
}

template <typename T, typename G>
std::string run(int kind, const RowArguments& a, unsigned rows, unsigned cluster, bool aligned, uint64_t seed) {
  return aligned ? run<T, G, 16 / sizeof(T)>(kind, a, rows, cluster, seed) : run<T, G, 1>(kind, a, rows, cluster, seed);
}

}  // namespace

extern "C" {

size_t row_arguments_size() { return sizeof(RowArguments); }

// dtypes: 0 fp32, 1 bf16, 2 fp16. Returns 0, or 1 with the reason in `error`.
int run_rows(int kind, int from, int to, const RowArguments* a, unsigned rows, unsigned cluster, int aligned, uint64_t seed, char* error,
             size_t error_size) {
  std::string found = "no such pair of dtypes";
  const auto call = [&]<typename T, typename G>() { found = run<T, G>(kind, *a, rows, cluster, aligned != 0, seed); };
  if (from == 0 && to == 0) call.operator()<float, float>();
  if (from == 0 && to == 1) call.operator()<float, __nv_bfloat16>();
  if (from == 0 && to == 2) call.operator()<float, __half>();
  if (from == 1 && to == 1) call.operator()<__nv_bfloat16, __nv_bfloat16>();
  if (from == 2 && to == 2) call.operator()<__half, __half>();
  return put_error(found, error, error_size);
}

int run_coefficients(const RowArguments* a, const float* logprob, float* out, int64_t tokens, uint64_t seed, char* error, size_t error_size) {
  const unsigned blocks = static_cast<unsigned>((tokens + 255) / 256);
  return put_error(host_gpu::launch(blocks, 256, 1, 0, seed, row_memory, [&] { token_coefficient_kernel(*a, logprob, out, tokens); }),
                   error, error_size);
}

// Scoring on a GPU of so many multiprocessors; out is [4, rows]: logprob, entropy, row_max, log_sum.
int run_scoring(const uint16_t* hidden, const uint16_t* weight, int64_t rows, int64_t hidden_size, int64_t vocab_size, const int64_t* target,
                const float* row_temperature, float temperature, int processors, uint64_t seed, float* out, char* error,
                size_t error_size) {
  const Schedule schedule(rows, vocab_size, processors);
  std::vector<RunningSoftmax> partial(static_cast<size_t>(schedule.splits * rows), {NAN, NAN, NAN});
  std::vector<float> target_logit(static_cast<size_t>(rows), NAN);
  const ScoringArguments a = {rows,        vocab_size,     hidden_size,         target,  row_temperature,
                              temperature, partial.data(), target_logit.data(), schedule};
  const CUtensorMap hidden_map = {hidden, hidden_size, rows, hidden_size, kTileDepth, kTileRows};
  const CUtensorMap weight_map = {weight, hidden_size, vocab_size, hidden_size, kTileDepth, kTileColumns / schedule.cluster};
  const unsigned blocks = static_cast<unsigned>(schedule.cluster), clusters = static_cast<unsigned>(min(schedule.items(), schedule.clusters));
  std::string found = host_gpu::launch(clusters * blocks, kScoringThreads, blocks, kScoringShared, seed, scoring_memory, [&] {
    if (blocks == 1) hopper_scoring_kernel<1>(hidden_map, weight_map, a);
    else hopper_scoring_kernel<kScoringCluster>(hidden_map, weight_map, a);
  });
  if (found.empty()) {
    found = host_gpu::launch(static_cast<unsigned>((rows + 255) / 256), 256, 1, 0, seed, scoring_memory,
                             [&] { combine_splits_kernel(a, out, out + rows, out + 2 * rows, out + 3 * rows); });
  }
  return put_error(found, error, error_size);
}
}

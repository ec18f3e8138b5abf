// One row of logits per block, or per cluster of blocks: statistics, coefficient and gradient in one launch.
//
//   one block     row in HBM ─▶ sums ─▶ c, e ─▶ row in HBM (L2 where it still lies there) ─▶ gradient
//   a cluster     row in HBM ─▶ slices in the shared memory of K blocks ─▶ sums ─▶ exchanged between the blocks ─▶ gradient
//
// Reads / writes per fp32 logit with bf16 gradients: one block 4 + 4 + 2 bytes, a cluster 4 + 2. Order: a thread's columns ascend,
// then lanes, warps and blocks combine in a fixed order: bitwise repeatable. Addresses are 64-bit.
// A block of a cluster asks for its whole slice at once, and two blocks of different rows share a multiprocessor where they fit: one
// computes while the other waits for memory.
// Edges: a row that is ignored is written as zeros and never read; rows whose start is not 16-byte aligned load one by one.

#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"
#include "warp.cuh"

namespace trapo {

namespace cg = cooperative_groups;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kIgnoredTarget = -100;

// What the kernels read and write. A policy kernel takes the coefficient from the streams; a gradient kernel gets statistics and
// both gradients; `grad` null means statistics alone.
struct RowArguments {
  const void* logits;
  void* grad;
  int64_t row_stride, grad_stride, vocab_size;
  const int64_t* target;
  const float *bias, *row_temperature;
  float temperature, softcap;
  float *logprob, *entropy, *row_max, *log_sum;
  const uint8_t* role;  // null: rows with target -100 are ignored
  const float *anchor, *signal, *advantage, *kl_weight, *ref_logprob;
  const float *grad_logprob, *grad_entropy;
  Gates gates;

  __device__ bool ignored(int64_t row) const { return role ? role[row] == kIgnored : target[row] == kIgnoredTarget; }
  __device__ Transform transform(int64_t row) const { return Transform(softcap, row_temperature ? row_temperature[row] : temperature); }
};

// kWidth elements of T as one access of 16 bytes (or of kWidth · sizeof(T)).
template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) Pack {
  T lane[kWidth];
};

template <typename T>
__device__ __forceinline__ float to_float(T x) {
  return static_cast<float>(x);
}
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// z of up to kWidth raw logits that lie at `from` and are those of columns i, i + 1, …; -inf beyond `end`. What a call has none of,
// bias or softcap, costs a branch per kWidth logits.
template <typename T, int kWidth>
__device__ __forceinline__ void load_z(const RowArguments& a, const T* from, const Transform& t, int64_t i, int64_t end, float (&z)[kWidth]) {
  if (i + kWidth <= end) {
    const Pack<T, kWidth> pack = *reinterpret_cast<const Pack<T, kWidth>*>(from);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) z[k] = to_float(pack.lane[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) z[k] = i + k < end ? to_float(from[k]) : -INFINITY;
  }
  if (a.bias) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) z[k] += i + k < end ? a.bias[i + k] : 0.0f;
  }
  if (t.softcap == 0.0f) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) z[k] *= t.inverse_temperature;
  } else {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) z[k] = i + k < end ? t.z(z[k]) : -INFINITY;
  }
}

template <typename T, int kWidth>
__device__ __forceinline__ void store_gradient(T* row, int64_t i, int64_t end, const float (&g)[kWidth]) {
  if (i + kWidth <= end) {
    Pack<T, kWidth> pack;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) pack.lane[k] = from_float<T>(g[k]);
    *reinterpret_cast<Pack<T, kWidth>*>(row + i) = pack;
  } else {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      if (i + k < end) row[i + k] = from_float<T>(g[k]);
    }
  }
}

template <typename T, int kWidth>
__device__ void write_zeros(T* row, int64_t begin, int64_t end) {
  const float zeros[kWidth] = {};
  for (int64_t i = begin + threadIdx.x * kWidth; i < end; i += kThreads * kWidth) store_gradient<T, kWidth>(row, i, end, zeros);
}

// Which of columns i, i + 1, … i + kWidth - 1 is the target; -1 if none is.
template <int kWidth>
__device__ __forceinline__ int place_of(int64_t target, int64_t i) {
  return target >= i && target < i + kWidth ? static_cast<int>(target - i) : -1;
}

// Adds kWidth logits to the sums; the one at `target_place`, if any, stays out of them.
template <int kWidth>
__device__ __forceinline__ void add_logits(RunningSoftmax& s, const float (&z)[kWidth], int target_place) {
  float others[kWidth], most = s.max;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    others[k] = k == target_place ? -INFINITY : z[k];
    most = most < others[k] ? others[k] : most;
  }
  if (most > s.max) raise_max(s, most);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) add_logit(s, others[k]);
}

// The sums of all threads, in every thread.
__device__ __forceinline__ RunningSoftmax block_combine(RunningSoftmax s, RunningSoftmax* per_warp) {
  s = combine_lanes<32>(s);
  if (threadIdx.x % 32 == 0) per_warp[threadIdx.x / 32] = s;
  __syncthreads();
  s = per_warp[0];
  for (int warp = 1; warp < kWarps; ++warp) s = combine(s, per_warp[warp]);
  return s;
}

// What the coefficient of a row is made of, besides its logprob, and the weight of its entropy's gradient.
struct RowStreams {
  uint8_t role;
  float anchor, signal, advantage, kl_weight, ref_logprob, entropy;

  __device__ RowStreams(const RowArguments& a, int64_t row)
      : role(a.role ? a.role[row] : uint8_t{kIgnored}), anchor(a.role ? a.anchor[row] : 0.0f), signal(a.role ? a.signal[row] : 0.0f),
        advantage(a.role ? a.advantage[row] : 0.0f), kl_weight(a.kl_weight ? a.kl_weight[row] : 0.0f),
        ref_logprob(a.ref_logprob ? a.ref_logprob[row] : 0.0f), entropy(a.grad_entropy ? a.grad_entropy[row] : 0.0f) {}

  __device__ float coefficient_at(const Gates& gates, float logprob) const {
    return role == kIgnored ? 0.0f : coefficient(gates, logprob, role, anchor, signal, advantage, kl_weight, ref_logprob);
  }
};

__device__ __forceinline__ void put_statistics(const RowArguments& a, int64_t row, const RowStatistics& s) {
  a.logprob[row] = s.logprob;
  a.entropy[row] = s.entropy;
  a.row_max[row] = s.row_max;
  a.log_sum[row] = s.log_sum;
}

template <typename T>
__device__ __forceinline__ float target_logit(const RowArguments& a, const T* row, const Transform& t, int64_t target) {
  if (target < 0 || target >= a.vocab_size) return NAN;
  return t.z(to_float(row[target]) + (a.bias ? a.bias[target] : 0.0f));
}

// The gradient of columns [i, i + kWidth), from their z.
template <typename G, int kWidth>
__device__ __forceinline__ void gradient_of(const RowGradient& row, const Transform& t, float z_target, const float (&z)[kWidth],
                                            int target_place, float (&g)[kWidth]) {
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    g[k] = k == target_place ? row.at_target * t.slope(z_target) : row.elsewhere(z[k]) * t.slope(z[k]);
  }
}

// One block per row; the gradient may lie over the row itself in a narrower dtype: a tile's bytes have been read by tiles up to
// itself, and the barrier keeps a fast warp from overwriting what a slow one has still to load, the target's logit included.
template <typename T, typename G, int kWidth>
__device__ void gradient_sweep(const RowArguments& a, const T* logits, G* grad, const Transform& t, const RowGradient& row, float z_target,
                               int64_t target) {
  for (int64_t tile = 0; tile < a.vocab_size; tile += kThreads * kWidth) {
    const int64_t i = tile + threadIdx.x * kWidth;
    float z[kWidth], g[kWidth];
    load_z<T, kWidth>(a, logits + i, t, i, a.vocab_size, z);
    gradient_of<G, kWidth>(row, t, z_target, z, place_of<kWidth>(target, i), g);
    __syncthreads();
    store_gradient<G, kWidth>(grad, i, a.vocab_size, g);
  }
}

template <typename T, typename G, int kWidth>
__global__ void __launch_bounds__(kThreads) row_policy_kernel(const __grid_constant__ RowArguments a) {
  __shared__ RunningSoftmax per_warp[kWarps];
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(a.logits) + row * a.row_stride;
  G* grad = a.grad ? static_cast<G*>(a.grad) + row * a.grad_stride : nullptr;
  if (a.ignored(row)) {
    if (threadIdx.x == 0) a.logprob[row] = a.entropy[row] = a.row_max[row] = a.log_sum[row] = 0.0f;
    if (grad) write_zeros<G, kWidth>(grad, 0, a.vocab_size);
    return;
  }
  const Transform t = a.transform(row);
  const int64_t target = a.target[row];
  const float z_target = target_logit(a, logits, t, target);
  RunningSoftmax s = empty_softmax();
  for (int64_t i = threadIdx.x * kWidth; i < a.vocab_size; i += kThreads * kWidth) {
    float z[kWidth];
    load_z<T, kWidth>(a, logits + i, t, i, a.vocab_size, z);
    add_logits<kWidth>(s, z, place_of<kWidth>(target, i));
  }
  const RowStatistics statistics = finish(block_combine(s, per_warp), z_target);
  if (threadIdx.x == 0) put_statistics(a, row, statistics);
  if (!grad) return;
  const RowStreams streams(a, row);
  const RowGradient gradient(statistics, streams.coefficient_at(a.gates, statistics.logprob), streams.entropy);
  gradient_sweep<T, G, kWidth>(a, logits, grad, t, gradient, z_target, target);
}

template <typename T, typename G, int kWidth>
__global__ void __launch_bounds__(kThreads) row_gradient_kernel(const __grid_constant__ RowArguments a) {
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(a.logits) + row * a.row_stride;
  G* grad = static_cast<G*>(a.grad) + row * a.grad_stride;
  if (a.ignored(row)) {
    write_zeros<G, kWidth>(grad, 0, a.vocab_size);
    return;
  }
  const Transform t = a.transform(row);
  const int64_t target = a.target[row];
  const float z_target = target_logit(a, logits, t, target);
  const RowStatistics statistics = {a.logprob[row], a.entropy[row], a.row_max[row], a.log_sum[row]};
  const RowGradient gradient(statistics, a.grad_logprob ? a.grad_logprob[row] : 0.0f, a.grad_entropy ? a.grad_entropy[row] : 0.0f);
  gradient_sweep<T, G, kWidth>(a, logits, grad, t, gradient, z_target, target);
}

// How many of a row's columns each block of a cluster keeps, whole vectors of `width`; the last one has what is left.
TRAPO_HD int64_t cluster_slice(int64_t vocab_size, int blocks, int width) {
  return ((vocab_size + blocks - 1) / blocks + width - 1) / width * width;
}

// A cluster of blocks per row: each keeps its slice of `slice` columns in shared memory, so HBM is read once. Every thread reads
// there what it has copied itself, so the copies need no barrier.
template <typename T, typename G, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) cluster_policy_kernel(const __grid_constant__ RowArguments a, int64_t slice) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ RunningSoftmax per_warp[kWarps];
  __shared__ RunningSoftmax of_block;
  const cg::cluster_group cluster = cg::this_cluster();
  const int64_t row = blockIdx.x / cluster.num_blocks();
  const int64_t begin = cluster.block_rank() * slice;
  const int64_t end = begin + slice < a.vocab_size ? begin + slice : a.vocab_size;
  const T* logits = static_cast<const T*>(a.logits) + row * a.row_stride;
  G* grad = static_cast<G*>(a.grad) + row * a.grad_stride;
  const bool writer = threadIdx.x == 0 && cluster.block_rank() == 0;
  if (a.ignored(row)) {  // the same in every block of the cluster, so none waits for another
    if (writer) a.logprob[row] = a.entropy[row] = a.row_max[row] = a.log_sum[row] = 0.0f;
    write_zeros<G, kWidth>(grad, begin, end);
    return;
  }
  T* const mine = reinterpret_cast<T*>(memory);
  const int64_t first = begin + threadIdx.x * kWidth, step = kThreads * kWidth;
  const int64_t half = first + (end - begin) / (2 * step) * step;  // one half is summed while the other is on its way
  for (int64_t i = first; i < end; i += step) {
    if (i == half) commit_copies();
    start_copy(mine + (i - begin), logits + i, static_cast<int>(min(int64_t{kWidth}, end - i) * sizeof(T)));
  }
  commit_copies();
  const Transform t = a.transform(row);
  const int64_t target = a.target[row];
  const float z_target = target_logit(a, logits, t, target);
  const RowStreams streams(a, row);  // now, so that nothing waits for them when the sums are there
  RunningSoftmax s = empty_softmax();
  const auto add_columns = [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i += step) {
      float z[kWidth];
      load_z<T, kWidth>(a, mine + (i - begin), t, i, end, z);
      add_logits<kWidth>(s, z, place_of<kWidth>(target, i));
    }
  };
  wait_copies<1>();
  add_columns(first, half);
  wait_copies<0>();
  add_columns(half, end);
  s = block_combine(s, per_warp);
  if (threadIdx.x == 0) of_block = s;
  cluster.sync();  // all slices are read and all sums are there
  const unsigned lane = threadIdx.x % 32;  // all blocks are read at once, then combined in their order
  if (lane < cluster.num_blocks()) s = *cluster.map_shared_rank(&of_block, lane);
  cluster.barrier_arrive();
  RunningSoftmax whole = of_lane(s, 0);
  for (unsigned block = 1; block < cluster.num_blocks(); ++block) whole = combine(whole, of_lane(s, block));
  const RowStatistics statistics = finish(whole, z_target);
  if (writer) put_statistics(a, row, statistics);
  const RowGradient gradient(statistics, streams.coefficient_at(a.gates, statistics.logprob), streams.entropy);
  for (int64_t i = first; i < end; i += step) {
    float z[kWidth], g[kWidth];
    load_z<T, kWidth>(a, mine + (i - begin), t, i, end, z);
    gradient_of<G, kWidth>(gradient, t, z_target, z, place_of<kWidth>(target, i), g);
    store_gradient<G, kWidth>(grad, i, end, g);
  }
  cluster.barrier_wait();  // no block leaves while another reads its sums
#else
  __trap();  // launched on sm_90 and later only
#endif
}

// c = dL/dlogp of every token, where the statistics are known; one thread each.
__global__ void token_coefficient_kernel(const __grid_constant__ RowArguments a, const float* logprob, float* out, int64_t tokens) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= tokens) return;
  out[i] = RowStreams(a, i).coefficient_at(a.gates, logprob[i]);
}

}  // namespace trapo

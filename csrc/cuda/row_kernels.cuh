// One row of logits per block, or per cluster of blocks: statistics, coefficient and gradient in one launch.
//
//   one block     row in HBM ─▶ sums ─▶ c, e ─▶ row in HBM (L2 where it still lies there) ─▶ gradient
//   a cluster     row in HBM ─▶ slices in the shared memory of K blocks ─▶ sums ─▶ exchanged between the blocks ─▶ gradient
//
// Work: about 12 FLOP and 2 exp per logit, half of it for statistics or a gradient alone; a tanh more with a softcap.
// Reads / writes per fp32 logit with bf16 gradients: one block 4 + 4 + 2 bytes, a cluster 4 + 2.
// Saved: four statistics per row, and the gradient, in the logits' place.
// On chip: one block, sums in registers and 12 bytes of shared memory per warp; a cluster, the row in the shared memory of its blocks.
//     A block of it asks for its whole slice at once, and at least two blocks of different rows share a multiprocessor where they fit:
//     one computes while the other waits for memory.
// Order: a thread's columns ascend, those beside the target and at a ragged end come last, then lanes, warps and blocks combine in a
//     fixed order: bitwise repeatable.
// Edges: a row that is ignored is written as zeros and never read; rows whose start is not 16-byte aligned load one by one; addresses
//     are 64-bit.

#pragma once

#include <cooperative_groups.h>

#include <type_traits>

#include "pack.cuh"
#include "ptx.cuh"
#include "warp.cuh"

namespace trapo {

namespace cg = cooperative_groups;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLargestCluster = 8;  // the largest that CUDA promises; a part of a GPU (MIG) may have no room for it, see can_place

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

// y of up to kWidth raw logits, those of columns i, i + 1, … of the ones at `logits`; -inf beyond `end`, where kWhole does not say that all
// lie before it. `bias` null means none. Neither bias nor softcap: kPlain says so, otherwise each costs a branch.
template <typename T, int kWidth, bool kPlain, bool kWhole>
__device__ __forceinline__ void load_y(const T* logits, const float* bias, const Transform& t, int i, int end, float (&y)[kWidth]) {
  if (kWhole || i + kWidth <= end) {
    const Pack<T, kWidth> pack = *reinterpret_cast<const Pack<T, kWidth>*>(logits + i);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) y[k] = to_float(pack.lane[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) y[k] = i + k < end ? to_float(logits[i + k]) : -INFINITY;
  }
  if (!kPlain && bias) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) y[k] += kWhole || i + k < end ? bias[i + k] : 0.0f;
  }
  if (!kPlain && t.softcap != 0.0f) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) y[k] = kWhole || i + k < end ? t.capped(y[k]) : -INFINITY;
  }
}

template <typename T, int kWidth, bool kWhole = false>
__device__ __forceinline__ void store_gradient(T* row, int i, int end, const float (&g)[kWidth]) {
  if (kWhole || i + kWidth <= end) {
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
__device__ void write_zeros(T* row, int columns) {
  const float zeros[kWidth] = {};
  for (int i = threadIdx.x * kWidth; i < columns; i += kThreads * kWidth) store_gradient<T, kWidth>(row, i, columns, zeros);
}

// Whether the pack of column i belongs to this thread.
template <int kWidth>
__device__ __forceinline__ bool owns(int i) {
  return i / kWidth % kThreads == static_cast<int>(threadIdx.x);
}

// Adds kWidth logits to the sums.
template <int kWidth>
__device__ __forceinline__ void add_logits(RunningSoftmax& s, const float (&y)[kWidth], float scale) {
  float most = y[0];
#pragma unroll
  for (int k = 1; k < kWidth; ++k) most = fmaxf(most, y[k]);  // passes over NaN, which the sums keep
  if (most * scale > s.max) raise_max(s, most * scale);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) add_logit(s, y[k], scale);
}

// A thread's columns of a row and their sums without the target. Two packs need care, that of the target and one cut off at the end; they
// wait until the others are summed, so that those pay nothing for them.
template <typename T, int kWidth, bool kPlain>
struct RowSums {
  const T* logits;
  const float* bias;
  const Transform& t;
  int columns, target;  // the latter outside 0 … columns - 1 where it lies elsewhere
  RunningSoftmax sums = empty_softmax();

  __device__ int whole() const { return columns / kWidth * kWidth; }

  // Those from `from`, which must be this thread's first or a tile's width further, up to `to`.
  __device__ __forceinline__ void add(int from, int to) {
    const int end = min(to, whole()), of_target = target < 0 ? -1 : target / kWidth * kWidth;
    for (int i = from; i < end; i += kThreads * kWidth) {
      if (i == of_target) continue;
      float y[kWidth];
      load_y<T, kWidth, kPlain, true>(logits, bias, t, i, columns, y);
      add_logits<kWidth>(sums, y, t.scale);
    }
  }

  __device__ __forceinline__ void add_special() {
    const bool here = target >= 0 && target < columns;
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      const int i = turn == 0 ? target / kWidth * kWidth : whole();
      const bool there = turn == 0 ? here : i < columns && !(here && target >= i);
      if (!there || !owns<kWidth>(i)) continue;
      float y[kWidth];
      load_y<T, kWidth, kPlain, false>(logits, bias, t, i, columns, y);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) y[k] = i + k == target ? -INFINITY : y[k];
      add_logits<kWidth>(sums, y, t.scale);
    }
  }
};

// The sums of all threads, in every thread.
__device__ __forceinline__ RunningSoftmax block_combine(RunningSoftmax s, RunningSoftmax* per_warp) {
  s = combine_lanes<32>(s);
  if (threadIdx.x % 32 == 0) per_warp[threadIdx.x / 32] = s;
  __syncthreads();
  return combine_lanes<kWarps>(per_warp[threadIdx.x % kWarps]);
}

// What the coefficient of a row is made of, besides its logprob, and the weight of its entropy's gradient. There always is a role: without
// these tests of it row_policy_kernel of 16-bit logits spills 8 bytes on sm_90a (nvcc 13.0, benchmarks/offline_native.py).
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

// The target's column; -1 where the row has none of that number.
__device__ __forceinline__ int target_column(const RowArguments& a, int64_t row) {
  const int64_t target = a.target[row];
  return target >= 0 && target < a.vocab_size ? static_cast<int>(target) : -1;
}

// y of the target, NaN where the row has none.
template <typename T>
__device__ __forceinline__ float target_logit(const RowArguments& a, const T* row, const Transform& t, int target) {
  return target < 0 ? NAN : t.capped(to_float(row[target]) + (a.bias ? a.bias[target] : 0.0f));
}

// The gradient of kWidth columns other than the target's, from their y.
template <int kWidth, bool kPlain>
__device__ __forceinline__ void gradient_of(const RowGradient& row, const Transform& t, const float (&y)[kWidth], float (&g)[kWidth]) {
#pragma unroll
  for (int k = 0; k < kWidth; ++k) g[k] = row.elsewhere(y[k]) * (kPlain ? 1.0f : t.slope(y[k]));
}

// Writes the target's gradient over what its thread has written there: the one that has the pack of column `target`, counted as the
// columns of `grad`.
template <typename G, int kWidth>
__device__ __forceinline__ void put_target(G* grad, int target, int columns, const RowStatistics& s, const Transform& t, float y_target,
                                           float c, float e) {
  if (target < 0 || target >= columns || !owns<kWidth>(target)) return;
  grad[target] = from_float<G>(gradient_at_target(s, t, c, e) * t.slope(y_target));
}

// One block per row; the gradient may lie over the row itself in a narrower dtype: a tile's bytes have been read by tiles up to
// itself, and the barrier keeps a fast warp from overwriting what a slow one has still to load, the target's logit included.
template <typename T, typename G, int kWidth>
__device__ void gradient_sweep(const RowArguments& a, const T* logits, G* grad, const Transform& t, const RowStatistics& s, float c,
                               float e, float y_target, int target) {
  const int columns = static_cast<int>(a.vocab_size);
  const RowGradient row(s, t, c, e);
  for (int tile = 0; tile < columns; tile += kThreads * kWidth) {
    const int i = tile + threadIdx.x * kWidth;
    float y[kWidth], g[kWidth];
    load_y<T, kWidth, false, false>(logits, a.bias, t, i, columns, y);
    gradient_of<kWidth, false>(row, t, y, g);
    __syncthreads();
    store_gradient<G, kWidth>(grad, i, columns, g);
  }
  put_target<G, kWidth>(grad, target, columns, s, t, y_target, c, e);
}

// One block per row, as sketched above: statistics, coefficient and gradient; statistics alone where `grad` is null.
template <typename T, typename G, int kWidth>
__global__ void __launch_bounds__(kThreads) row_policy_kernel(const __grid_constant__ RowArguments a) {
  __shared__ RunningSoftmax per_warp[kWarps];
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(a.logits) + row * a.row_stride;
  G* grad = a.grad ? static_cast<G*>(a.grad) + row * a.grad_stride : nullptr;
  if (a.ignored(row)) {
    if (threadIdx.x == 0) put_statistics(a, row, {});
    if (grad) write_zeros<G, kWidth>(grad, static_cast<int>(a.vocab_size));
    return;
  }
  const Transform t = a.transform(row);
  const int target = target_column(a, row);
  const float y_target = target_logit(a, logits, t, target);
  const int columns = static_cast<int>(a.vocab_size);
  RowSums<T, kWidth, false> row_sums{logits, a.bias, t, columns, target};
  row_sums.add(threadIdx.x * kWidth, columns);
  row_sums.add_special();
  const RowStatistics statistics = finish(block_combine(row_sums.sums, per_warp), y_target, t.scale);
  if (threadIdx.x == 0) put_statistics(a, row, statistics);
  if (!grad) return;
  const RowStreams streams(a, row);
  const float c = streams.coefficient_at(a.gates, statistics.logprob);
  gradient_sweep<T, G, kWidth>(a, logits, grad, t, statistics, c, streams.entropy, y_target, target);
}

// One block per row whose statistics are known: logits are read once, 4 + 2 bytes each; the rest as sketched above.
template <typename T, typename G, int kWidth>
__global__ void __launch_bounds__(kThreads) row_gradient_kernel(const __grid_constant__ RowArguments a) {
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(a.logits) + row * a.row_stride;
  G* grad = static_cast<G*>(a.grad) + row * a.grad_stride;
  if (a.ignored(row)) {
    write_zeros<G, kWidth>(grad, static_cast<int>(a.vocab_size));
    return;
  }
  const Transform t = a.transform(row);
  const int target = target_column(a, row);
  const float y_target = target_logit(a, logits, t, target);
  const RowStatistics statistics = {a.logprob[row], a.entropy[row], a.row_max[row], a.log_sum[row]};
  const float c = a.grad_logprob ? a.grad_logprob[row] : 0.0f, e = a.grad_entropy ? a.grad_entropy[row] : 0.0f;
  gradient_sweep<T, G, kWidth>(a, logits, grad, t, statistics, c, e, y_target, target);
}

// How many of a row's columns each block of a cluster keeps, whole vectors of `width`; the last one has what is left.
TRAPO_HD int64_t cluster_slice(int64_t vocab_size, int blocks, int width) {
  return ((vocab_size + blocks - 1) / blocks + width - 1) / width * width;
}

// A cluster of blocks per row: each keeps its slice in shared memory, so HBM is read once. Every thread reads there what it has copied
// itself, so the copies need no barrier. Columns count from the start of the slice.
template <typename T, typename G, int kWidth, bool kPlain>
__device__ __forceinline__ void cluster_policy(const RowArguments& a, int64_t row, int64_t begin, int columns, T* mine) {
  __shared__ RunningSoftmax per_warp[kWarps];
  __shared__ RunningSoftmax of_block;
  const cg::cluster_group cluster = cg::this_cluster();
  const T* logits = static_cast<const T*>(a.logits) + row * a.row_stride;
  G* grad = static_cast<G*>(a.grad) + row * a.grad_stride + begin;
  const float* bias = a.bias ? a.bias + begin : nullptr;
  constexpr int kStep = kThreads * kWidth;
  const int first = threadIdx.x * kWidth, half = first + columns / (2 * kStep) * kStep;  // one half is summed while the other comes
  const int whole = columns / kWidth * kWidth;
  const auto copy_columns = [&](int from, int to) {
    const int end = min(to, whole);
    int i = from;
    for (; i < end; i += kStep) start_copy(mine + i, logits + begin + i);
    if (i < min(to, columns)) start_copy(mine + i, logits + begin + i, (columns - i) * static_cast<int>(sizeof(T)));
    commit_copies();
  };
  copy_columns(first, half);
  copy_columns(half, columns);
  const Transform t = a.transform(row);
  const int target = target_column(a, row), target_here = target - static_cast<int>(begin);
  const float y_target = target_logit(a, logits, t, target);
  const RowStreams streams(a, row);  // now, so that nothing waits for them when the sums are there
  RowSums<T, kWidth, kPlain> row_sums{mine, bias, t, columns, target_here};
  wait_copies<1>();
  row_sums.add(first, half);
  wait_copies<0>();
  row_sums.add(half, columns);
  row_sums.add_special();
  RunningSoftmax s = block_combine(row_sums.sums, per_warp);
  if (threadIdx.x == 0) of_block = s;
  cluster.sync();  // all slices are read and all sums are there
  const unsigned block = threadIdx.x % kLargestCluster;
  s = combine_lanes<kLargestCluster>(block < cluster.num_blocks() ? *cluster.map_shared_rank(&of_block, block) : empty_softmax());
  cluster.barrier_arrive();
  const RowStatistics statistics = finish(s, y_target, t.scale);
  if (threadIdx.x == 0 && cluster.block_rank() == 0) put_statistics(a, row, statistics);
  const float c = streams.coefficient_at(a.gates, statistics.logprob), e = streams.entropy;
  const RowGradient gradient(statistics, t, c, e);
  const auto write_pack = [&](int i, auto is_whole) {
    float y[kWidth], g[kWidth];
    load_y<T, kWidth, kPlain, is_whole>(mine, bias, t, i, columns, y);
    gradient_of<kWidth, kPlain>(gradient, t, y, g);
    store_gradient<G, kWidth, is_whole>(grad, i, columns, g);
  };
  int i = first;
  for (; i < whole; i += kStep) write_pack(i, std::true_type());
  if (i < columns) write_pack(i, std::false_type());
  put_target<G, kWidth>(grad, target_here, columns, statistics, t, y_target, c, e);
  cluster.barrier_wait();  // no block leaves while another reads its sums
}

// `slice` columns for each block of a cluster.
template <typename T, typename G, int kWidth>
__global__ void __launch_bounds__(kThreads, 3) cluster_policy_kernel(const __grid_constant__ RowArguments a, int64_t slice) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char memory[];
  const cg::cluster_group cluster = cg::this_cluster();
  const int64_t row = blockIdx.x / cluster.num_blocks(), begin = cluster.block_rank() * slice;
  const int columns = static_cast<int>(min(slice, a.vocab_size - begin));
  T* const mine = reinterpret_cast<T*>(memory);
  if (a.ignored(row)) {  // the same in every block of the cluster, so none waits for another
    if (threadIdx.x == 0 && cluster.block_rank() == 0) put_statistics(a, row, {});
    write_zeros<G, kWidth>(static_cast<G*>(a.grad) + row * a.grad_stride + begin, columns);
  } else if (!a.bias && a.softcap == 0.0f) {
    cluster_policy<T, G, kWidth, true>(a, row, begin, columns, mine);
  } else {
    cluster_policy<T, G, kWidth, false>(a, row, begin, columns, mine);
  }
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

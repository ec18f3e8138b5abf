// Scoring on Hopper: hidden [N, D] · weightᵀ [D, V] with the softmax sums in the epilogue; no logit leaves the chip.
//
//   producer warp    hidden tile [128, 64], weight tile [256, 64] ──TMA──▶ 4 stages of shared memory
//   2 warpgroups     wgmma m64n256k16 ─▶ 128 registers of logits a thread ─▶ max, Σexp, Σexp·z of its 2 rows
//   combine kernel   the sums of all splits of the vocabulary ─▶ logprob, entropy, row_max, log_sum
//
// A block takes one tile of rows along a run of vocabulary tiles, so its sums stay in registers until the run ends.
// Work: 2·N·D·V FLOP on the tensor cores, N·V exp. Reads: the operands, from L2 again for every tile. Writes: 12 bytes per row and
// split. Registers: 128 accumulators in a consumer thread. Shared memory: 4 · 48 KiB. Order: columns ascend, then lanes, then
// splits in order: bitwise repeatable for one number of processors.
// Edges: rows beyond N, columns beyond V and D beyond its end arrive as zeros; columns beyond V are left out of the sums. No bias and no
// softcap: with either the 128 accumulators no longer fit the registers.

#pragma once

#include "layout.h"
#include "ptx.cuh"
#include "softmax.h"

namespace trapo {

constexpr int kScoringThreads = 128 * (1 + kConsumers);
constexpr int kHiddenBytes = kTileRows * kTileDepth * 2;
constexpr int kWeightBytes = kTileColumns * kTileDepth * 2;
constexpr int kStageBytes = kHiddenBytes + kWeightBytes;
constexpr int kScoringShared = kStages * kStageBytes + 1024 + 2 * kStages * 8;  // tiles start at multiples of 1024 bytes

struct ScoringArguments {
  int64_t rows, vocab_size, hidden_size;
  const int64_t* target;
  const float* row_temperature;
  float temperature;
  RunningSoftmax* partial;  // [splits, rows]
  float* target_logit;      // [rows] z of the target, NaN where there is none
  Schedule schedule;
};

// One of the two rows whose logits a thread holds.
struct ThreadRow {
  int64_t row, target;
  float inverse_temperature;
  RunningSoftmax sums;
};

// Adds a tile to the sums of both rows of a thread; register i belongs to row i / 2 % 2 and to column accumulator_column(thread, i),
// of which the first `columns` lie within V. Both rows in one sweep: two would keep 64 column numbers alive between them.
__device__ __forceinline__ void add_tile(ThreadRow (&rows)[2], float (&logits)[kAccumulators], const ScoringArguments& a,
                                         int64_t first_column) {
  const int mine = accumulator_column(threadIdx.x % 128, 0);
  const int64_t left = a.vocab_size - first_column - mine;
  const int columns = left < kTileColumns ? static_cast<int>(left) : kTileColumns;
  float most[2] = {rows[0].sums.max, rows[1].sums.max};
  int target[2];
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int64_t place = rows[upper].target - first_column - mine;
    target[upper] = place >= 0 && place < columns ? static_cast<int>(place) : -1;
  }
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) {
    const int upper = i / 2 % 2, column = accumulator_column(0, i);
    float z = -INFINITY;
    if (column < columns) z = logits[i] * rows[upper].inverse_temperature;
    if (column == target[upper]) {
      a.target_logit[rows[upper].row] = z;
      z = -INFINITY;
    }
    most[upper] = most[upper] < z ? z : most[upper];
    logits[i] = z;
  }
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    if (most[upper] > rows[upper].sums.max) raise_max(rows[upper].sums, most[upper]);
  }
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) add_logit(rows[i / 2 % 2].sums, logits[i]);
}

__device__ __forceinline__ RunningSoftmax combine_quad(RunningSoftmax s) {
#pragma unroll
  for (int offset = 1; offset < 4; offset *= 2) {
    const RunningSoftmax other = {__shfl_xor_sync(~0u, s.max, offset), __shfl_xor_sync(~0u, s.others, offset),
                                  __shfl_xor_sync(~0u, s.moment, offset)};
    s = threadIdx.x & offset ? combine(other, s) : combine(s, other);
  }
  return s;
}

__global__ void __launch_bounds__(kScoringThreads, 1)
    hopper_scoring_kernel(const __grid_constant__ CUtensorMap hidden_map, const __grid_constant__ CUtensorMap weight_map,
                          const __grid_constant__ ScoringArguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t shared[];
  uint8_t* const tiles = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(shared) + 1023) / 1024 * 1024);
  uint64_t* const full = reinterpret_cast<uint64_t*>(tiles + kStages * kStageBytes);
  uint64_t* const empty = full + kStages;
  const int warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&full[stage], 1);
      barrier_init(&empty[stage], kConsumers * 4);  // one arrival per warp
    }
    barrier_fence();
  }
  __syncthreads();
  const int depth_steps = static_cast<int>((a.hidden_size + kTileDepth - 1) / kTileDepth);
  uint32_t step = 0;  // stages passed so far: stage step % kStages, in its round step / kStages

  if (warpgroup == 0) {  // the producer: one thread starts the copies
    give_registers<40>();
    if (threadIdx.x != 0) return;
    for (int index = blockIdx.x; index < a.schedule.items(); index += gridDim.x) {
      const WorkItem item = a.schedule.item(index);
      for (int tile = item.first_column_tile; tile < item.last_column_tile; ++tile) {
#pragma unroll 1
        for (int k = 0; k < depth_steps; ++k, ++step) {
          const uint32_t stage = step % kStages, round = step / kStages;
          barrier_wait(&empty[stage], round % 2 ^ 1);  // passes at once in the first round
          uint8_t* const hidden = tiles + stage * kStageBytes;
          barrier_expect(&full[stage], kStageBytes);
          tma_load(hidden, &hidden_map, k * kTileDepth, item.row_tile * kTileRows, &full[stage]);
          tma_load(hidden + kHiddenBytes, &weight_map, k * kTileDepth, tile * kTileColumns, &full[stage]);
        }
      }
    }
    return;
  }

  take_registers<232>();
  const int consumer = warpgroup - 1, thread = threadIdx.x % 128;
  for (int index = blockIdx.x; index < a.schedule.items(); index += gridDim.x) {
    const WorkItem item = a.schedule.item(index);
    const int64_t first_row = static_cast<int64_t>(item.row_tile) * kTileRows + consumer * 64;
    const auto thread_row = [&](int i) {
      const int64_t row = first_row + accumulator_row(thread, i);
      const bool inside = row < a.rows;
      const float temperature = inside && a.row_temperature ? a.row_temperature[row] : a.temperature;
      return ThreadRow{row, inside ? a.target[row] : -1, quotient(1.0f, temperature), empty_softmax()};
    };
    ThreadRow rows[2] = {thread_row(0), thread_row(2)};
    for (int tile = item.first_column_tile; tile < item.last_column_tile; ++tile) {
      float logits[kAccumulators];
      for (int k = 0; k < depth_steps; ++k, ++step) {
        const uint32_t stage = step % kStages;
        barrier_wait(&full[stage], step / kStages % 2);
        const uint8_t* const hidden = tiles + stage * kStageBytes;
        const uint64_t hidden_operand = operand_descriptor(shared_address(hidden) + consumer * 64 * kTileDepth * 2);
        const uint64_t weight_operand = operand_descriptor(shared_address(hidden) + kHiddenBytes);
        wgmma_begin();
#pragma unroll
        for (int part = 0; part < kTileDepth / 16; ++part) {  // 16 of bf16 are 32 bytes, 2 units of the descriptor
          wgmma_m64n256k16(logits, hidden_operand + 2 * part, weight_operand + 2 * part, k + part > 0);
        }
        wgmma_commit();
        wgmma_wait<1>();  // the step before this one has read its stage
        if (k > 0 && thread % 32 == 0) barrier_arrive(&empty[(step - 1) % kStages]);
      }
      wgmma_wait<0>();
      pin_registers(logits);
      if (thread % 32 == 0) barrier_arrive(&empty[(step - 1) % kStages]);
      add_tile(rows, logits, a, static_cast<int64_t>(tile) * kTileColumns);
    }
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const RunningSoftmax s = combine_quad(rows[upper].sums);
      if (thread % 4 == 0 && rows[upper].row < a.rows) a.partial[item.split * a.rows + rows[upper].row] = s;
    }
  }
#endif
}

// One thread per row: the splits in order, then the target.
__global__ void combine_splits_kernel(const __grid_constant__ ScoringArguments a, float* logprob, float* entropy, float* row_max,
                                      float* log_sum) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= a.rows) return;
  if (a.target[row] == -100) {
    logprob[row] = entropy[row] = row_max[row] = log_sum[row] = 0.0f;
    return;
  }
  RunningSoftmax s = a.partial[row];
  for (int split = 1; split < a.schedule.splits; ++split) s = combine(s, a.partial[split * a.rows + row]);
  const bool known = a.target[row] >= 0 && a.target[row] < a.vocab_size;
  const RowStatistics statistics = finish(s, known ? a.target_logit[row] : NAN);
  logprob[row] = statistics.logprob;
  entropy[row] = statistics.entropy;
  row_max[row] = statistics.row_max;
  log_sum[row] = statistics.log_sum;
}

}  // namespace trapo

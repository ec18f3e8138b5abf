// Scoring on Hopper: hidden [N, D] · weightᵀ [D, V] with the softmax sums in the epilogue; no logit leaves the chip.
//
//   producer thread  hidden tile [128, 64], its part of the weight tile [256, 64] ──TMA──▶ 4 stages of shared memory
//   2 warpgroups     wgmma m64n256k16 ─▶ 128 registers of logits a thread ─▶ max, Σexp, Σexp·z of its 2 rows
//   combine kernel   the sums of all splits of the vocabulary ─▶ logprob, entropy, row_max, log_sum
//
// The two blocks of a cluster have neighbouring row tiles and the same weight tiles: each loads half of one into both, so a step of
// 64 costs a block 32 KiB from L2 instead of 48. With up to 128 rows a cluster is one block.
// A block takes one tile of rows along a run of vocabulary tiles, so its sums stay in registers until the run ends.
// Work: 2·N·D·V FLOP on the tensor cores, N·V exp.
// Reads / writes: the operands, from L2 again for every tile; 12 bytes per row and split.
// Saved: nothing beside the statistics; backward computes the logits again.
// On chip: 128 accumulators in a consumer thread; 4 · 48 KiB of shared memory.
// Order: columns ascend, then lanes, then splits in a fixed order: bitwise repeatable for one number of processors.
// Edges: rows beyond N, columns beyond V and D beyond its end arrive as zeros; columns beyond V are left out of the sums. No bias and no
// softcap: with either the 128 accumulators no longer fit the registers.

#pragma once

#include <cooperative_groups.h>

#include "layout.h"
#include "ptx.cuh"
#include "warp.cuh"

namespace trapo {

constexpr int kScoringThreads = 128 * (1 + kConsumers);
// Registers of a thread: at the launch, in eights, and once the producer's are given to the consumers, who would wait for more for ever.
constexpr int kLaunchRegisters = 65536 / kScoringThreads / 8 * 8, kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(128 * kProducerRegisters + 128 * kConsumers * kConsumerRegisters <= kScoringThreads * kLaunchRegisters);
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
  float* target_logit;      // [rows] the target's, NaN where there is none
  Schedule schedule;

  __device__ float scale(int64_t row) const { return Transform(0.0f, row_temperature ? row_temperature[row] : temperature).scale; }
};

// One of the two rows whose logits a thread holds.
struct ThreadRow {
  int64_t row, target;
  float scale;  // bits per logit
  RunningSoftmax sums;
};

// Adds a tile to the sums of both rows of a thread; register i belongs to row i / 2 % 2 and to column accumulator_column(thread, i),
// of which the first `columns` lie within V. Both rows in one sweep: two would keep 64 column numbers alive between them. In a whole
// tile without targets there is nothing to leave out.
template <bool kWhole>
__device__ __forceinline__ void add_tile(ThreadRow (&rows)[2], float (&logits)[kAccumulators], const int (&target)[2], int columns,
                                         float* target_logit) {
  float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) {
    const int upper = i / 2 % 2, column = accumulator_column(0, i);
    if (!kWhole && column >= columns) logits[i] = -INFINITY;
    if (!kWhole && column == target[upper]) {
      target_logit[rows[upper].row] = logits[i];
      logits[i] = -INFINITY;
    }
    most[upper] = fmaxf(most[upper], logits[i]);  // passes over NaN, which the sums keep
  }
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const float bits = most[upper] * rows[upper].scale;
    if (bits > rows[upper].sums.max) raise_max(rows[upper].sums, bits);
  }
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) add_logit(rows[i / 2 % 2].sums, logits[i], rows[i / 2 % 2].scale);
}

// The same, for a tile that starts at this column.
__device__ __forceinline__ void add_tile(ThreadRow (&rows)[2], float (&logits)[kAccumulators], const ScoringArguments& a,
                                         int64_t first_column) {
  const int mine = accumulator_column(threadIdx.x % 128, 0);
  const int64_t left = a.vocab_size - first_column - mine;
  const int columns = left < kTileColumns ? static_cast<int>(left) : kTileColumns;
  int target[2];
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int64_t place = rows[upper].target - first_column - mine;
    target[upper] = place >= 0 && place < columns ? static_cast<int>(place) : -1;
  }
  if (__all_sync(~0u, columns == kTileColumns && target[0] < 0 && target[1] < 0)) {
    add_tile<true>(rows, logits, target, columns, a.target_logit);
  } else {
    add_tile<false>(rows, logits, target, columns, a.target_logit);
  }
}

// The shared memory of a block: kStages of a hidden tile and a weight tile, each with two barriers.
struct Stages {
  uint8_t* tiles;
  uint64_t* full;   // the stage's copies have arrived
  uint64_t* empty;  // its readers are done, in every block of the cluster

  __device__ explicit Stages(uint8_t* memory)
      : tiles(reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory) + 1023) / 1024 * 1024)),
        full(reinterpret_cast<uint64_t*>(tiles + kStages * kStageBytes)), empty(full + kStages) {}
  __device__ uint8_t* hidden(uint32_t stage) const { return tiles + stage * kStageBytes; }
  __device__ uint8_t* weight(uint32_t stage) const { return hidden(stage) + kHiddenBytes; }
};

// One thread of a block: loads the hidden tile of its rows and its part of every weight tile, the latter into all blocks.
template <int kCluster>
__device__ __forceinline__ void load_tiles(const Stages& stages, const CUtensorMap* hidden_map, const CUtensorMap* weight_map,
                                           const ScoringArguments& a, int rank, int depth_steps) {
  uint32_t step = 0;  // stages passed so far: stage step % kStages, in its round step / kStages
  for (int index = blockIdx.x / kCluster; index < a.schedule.items(); index += gridDim.x / kCluster) {
    const WorkItem item = a.schedule.item(index);
    const int first_row = (item.first_row_tile + rank) * kTileRows;
    for (int tile = item.first_column_tile; tile < item.last_column_tile; ++tile) {
      const int first_column = tile * kTileColumns + rank * (kTileColumns / kCluster);
#pragma unroll 1
      for (int k = 0; k < depth_steps; ++k, ++step) {
        const uint32_t stage = step % kStages, round = step / kStages;
        uint64_t* const full = &stages.full[stage];
        barrier_wait(&stages.empty[stage], round % 2 ^ 1);  // passes at once in the first round
        barrier_arrive_expect(full, kStageBytes);
        tma_load(stages.hidden(stage), hidden_map, k * kTileDepth, first_row, full);
        uint8_t* const weight = stages.weight(stage) + rank * (kWeightBytes / kCluster);
        if constexpr (kCluster == 1) {
          tma_load(weight, weight_map, k * kTileDepth, first_column, full);
        } else {
          tma_load_multicast(weight, weight_map, k * kTileDepth, first_column, full, (1 << kCluster) - 1);
        }
      }
    }
  }
}

// A warpgroup: the logits of its 64 rows, tile by tile, and their sums.
template <int kCluster>
__device__ __forceinline__ void sum_tiles(const Stages& stages, const ScoringArguments& a, int rank, int consumer, int depth_steps) {
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  uint32_t step = 0;
  const auto give_back = [&](uint32_t stage) {  // to every block that loads it
    if (lane < kCluster) barrier_arrive(&stages.empty[stage], lane);
  };
  for (int index = blockIdx.x / kCluster; index < a.schedule.items(); index += gridDim.x / kCluster) {
    const WorkItem item = a.schedule.item(index);
    const int64_t first_row = static_cast<int64_t>(item.first_row_tile + rank) * kTileRows + consumer * 64;
    const auto thread_row = [&](int i) {
      const int64_t row = first_row + accumulator_row(thread, i);
      const bool inside = row < a.rows;
      return ThreadRow{row, inside ? a.target[row] : -1, inside ? a.scale(row) : 0.0f, empty_softmax()};
    };
    ThreadRow rows[2] = {thread_row(0), thread_row(2)};
    for (int tile = item.first_column_tile; tile < item.last_column_tile; ++tile) {
      float logits[kAccumulators] = {};  // defined, or ptxas 12.8 waits after every wgmma
      for (int k = 0; k < depth_steps; ++k, ++step) {
        const uint32_t stage = step % kStages;
        barrier_wait(&stages.full[stage], step / kStages % 2);
        const uint64_t hidden_operand = operand_descriptor(shared_address(stages.hidden(stage)) + consumer * 64 * kTileDepth * 2);
        const uint64_t weight_operand = operand_descriptor(shared_address(stages.weight(stage)));
        wgmma_fence();
#pragma unroll
        for (int part = 0; part < kTileDepth / 16; ++part) {  // 16 of bf16 are 32 bytes, 2 units of the descriptor
          wgmma_m64n256k16(logits, hidden_operand + 2 * part, weight_operand + 2 * part, k + part > 0);
        }
        wgmma_commit();
        wgmma_wait<1>();  // the step before this one has read its stage
        if (k > 0) give_back((step - 1) % kStages);
      }
      wgmma_wait<0>();
      pin_registers(logits);
      give_back((step - 1) % kStages);
      add_tile(rows, logits, a, static_cast<int64_t>(tile) * kTileColumns);
    }
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const RunningSoftmax s = combine_lanes<4>(rows[upper].sums);
      if (thread % 4 == 0 && rows[upper].row < a.rows) a.partial[item.split * a.rows + rows[upper].row] = s;
    }
  }
}

// weight_map has boxes of kTileColumns / kCluster rows.
template <int kCluster>
__global__ void __launch_bounds__(kScoringThreads, 1)
    hopper_scoring_kernel(const __grid_constant__ CUtensorMap hidden_map, const __grid_constant__ CUtensorMap weight_map,
                          const __grid_constant__ ScoringArguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(16) unsigned char memory[];
  const Stages stages(memory);
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // so the compiler knows that a warp has one
  const int rank = static_cast<int>(cluster.block_rank());
  const int depth_steps = static_cast<int>((a.hidden_size + kTileDepth - 1) / kTileDepth);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&stages.full[stage], 1);
      barrier_init(&stages.empty[stage], kCluster * kConsumers * 4);  // one arrival per warp of every block
    }
    barrier_fence();
  }
  cluster.sync();  // the other block may load into this one as soon as its barriers stand
  if (warpgroup == 0) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) load_tiles<kCluster>(stages, &hidden_map, &weight_map, a, rank, depth_steps);
    __syncwarp();
  } else {
    take_registers<kConsumerRegisters>();
    sum_tiles<kCluster>(stages, a, rank, warpgroup - 1, depth_steps);
  }
  cluster.sync();  // no block leaves while the other arrives at its barriers
#else
  __trap();  // launched on sm_90 only, where it must be compiled for sm_90a
#endif
}

// One warp per row: every lane takes its splits in order, then the lanes combine, then the target joins: 12 bytes per row and split in,
// 16 per row out. A row with target -100 gives zeros, one whose target is in no vocabulary NaN.
__global__ void combine_splits_kernel(const __grid_constant__ ScoringArguments a, float* logprob, float* entropy, float* row_max,
                                      float* log_sum) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= a.rows) return;  // the whole warp
  RunningSoftmax s = empty_softmax();
  for (int split = lane; split < a.schedule.splits; split += 32) s = combine(s, a.partial[split * a.rows + row]);
  s = combine_lanes<32>(s);
  if (lane != 0) return;
  const bool ignored = a.target[row] == kIgnoredTarget, known = a.target[row] >= 0 && a.target[row] < a.vocab_size;
  const RowStatistics statistics = ignored ? RowStatistics{} : finish(s, known ? a.target_logit[row] : NAN, a.scale(row));
  logprob[row] = statistics.logprob;
  entropy[row] = statistics.entropy;
  row_max[row] = statistics.row_max;
  log_sum[row] = statistics.log_sum;
}

}  // namespace trapo

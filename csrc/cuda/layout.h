// Which thread holds which logit, how wgmma is told where its operands lie, and which block works on which tiles: the index arithmetic
// of the scoring kernel, compiled for the host as well, where the tests check that every logit is met exactly once.

#pragma once

#include <cstdint>

#include "../gates.h"

namespace trapo {

constexpr int kTileRows = 128;    // hidden states per tile: 64 for each of two consumer warpgroups
constexpr int kTileColumns = 256; // vocabulary entries per tile
constexpr int kTileDepth = 64;    // of D per stage: 128 bytes of bf16, the width of the shared-memory swizzle
constexpr int kStages = 4;
constexpr int kConsumers = 2;
constexpr int kAccumulators = 64 * kTileColumns / 128;  // fp32 registers of a consumer thread
constexpr int kScoringCluster = 2;  // row tiles that share their weight tiles: each block loads half of one for both
constexpr int kRowGroup = 12;       // row tiles that work on one part of the vocabulary at a time, so that both operands stay in L2

// wgmma m64n256: register `i` of thread `thread` (0-127) of a warpgroup lies in this row (0-63) and column (0-255) of its tile.
TRAPO_HD int accumulator_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + (i / 2 % 2) * 8; }
TRAPO_HD int accumulator_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// The operand descriptor of a K-major tile at `address` of shared memory whose rows are 128 bytes, swizzled by 128 bytes: start
// address, 1024 bytes between groups of 8 rows, layout 1 (128-byte swizzle), all in units of 16 bytes.
TRAPO_HD uint64_t operand_descriptor(uint32_t address) {
  const uint64_t start = (address & 0x3FFFF) >> 4;
  return start | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// A piece of work: the row tiles of a cluster, one for each of its blocks, against a run of vocabulary tiles.
struct WorkItem {
  int first_row_tile, split;
  int first_column_tile, last_column_tile;  // half open
};

// How the [row tiles × column tiles] of a problem are shared out to clusters. 32-bit numbers: tiles are counted, not elements.
struct Schedule {
  int cluster_blocks, resident_clusters;  // blocks of a cluster, and clusters that run at a time
  int units, column_tiles, group, splits;  // a unit is the row tiles of a cluster; where they are odd, the last one is empty

  TRAPO_HD Schedule(int64_t rows, int64_t vocab_size, int multiprocessors)
      : cluster_blocks(rows > kTileRows ? kScoringCluster : 1),
        resident_clusters(multiprocessors < cluster_blocks ? 1 : multiprocessors / cluster_blocks),
        units(static_cast<int>((rows + kTileRows * cluster_blocks - 1) / (kTileRows * cluster_blocks))),
        column_tiles(static_cast<int>((vocab_size + kTileColumns - 1) / kTileColumns)) {
    const int most = kRowGroup / cluster_blocks;
    group = units < most ? units : most;
    // The fewest splits that make whole rounds of all clusters and let one group fill a round; a vocabulary of fewer tiles than that is
    // split into its tiles, and the last round is not full.
    const int whole = resident_clusters / common_divisor(units, resident_clusters);
    const int wanted = (resident_clusters + group - 1) / group;
    splits = (wanted + whole - 1) / whole * whole;
    if (splits > column_tiles) splits = column_tiles;
  }

  TRAPO_HD int items() const { return units * splits; }

  // Groups of units follow each other; within a group the units of one split are neighbours. The last group may be smaller. Splits with
  // a tile more than others lie elsewhere in every group, or the same clusters would meet them each time.
  TRAPO_HD WorkItem item(int index) const {
    const int in_group = group * splits, which = index / in_group;
    const int left = units - which * group, members = left < group ? left : group, inside = index - which * in_group;
    const int split = inside / members;
    const int64_t shift = int64_t{which} * column_tiles % splits;
    const auto first_tile = [&](int64_t of) { return static_cast<int>((column_tiles * of + shift) / splits); };
    return {(which * group + inside % members) * cluster_blocks, split, first_tile(split), first_tile(split + 1)};
  }

 private:
  static TRAPO_HD int common_divisor(int a, int b) {
    while (b != 0) {
      const int rest = a % b;
      a = b, b = rest;
    }
    return a;
  }
};

}  // namespace trapo

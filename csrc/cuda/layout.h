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
constexpr int kRowGroup = 11;  // row tiles that work on one part of the vocabulary at a time, so that both operands stay in L2

// wgmma m64n256: register `i` of thread `thread` (0-127) of a warpgroup lies in this row (0-63) and column (0-255) of its tile.
TRAPO_HD int accumulator_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + (i / 2 % 2) * 8; }
TRAPO_HD int accumulator_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// The operand descriptor of a K-major tile at `address` of shared memory whose rows are 128 bytes, swizzled by 128 bytes: start
// address, 1024 bytes between groups of 8 rows, layout 1 (128-byte swizzle), all in units of 16 bytes.
TRAPO_HD uint64_t operand_descriptor(uint32_t address) {
  const uint64_t start = (address & 0x3FFFF) >> 4;
  return start | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// A piece of work: one tile of rows against a run of vocabulary tiles.
struct WorkItem {
  int row_tile, split;
  int first_column_tile, last_column_tile;  // half open
};

// How the [row tiles × column tiles] of a problem are shared out. 32-bit numbers: tiles are counted, not elements.
struct Schedule {
  int row_tiles, column_tiles, group, splits;

  TRAPO_HD Schedule(int64_t rows, int64_t vocab_size, int processors)
      : row_tiles(static_cast<int>((rows + kTileRows - 1) / kTileRows)),
        column_tiles(static_cast<int>((vocab_size + kTileColumns - 1) / kTileColumns)) {
    group = row_tiles < kRowGroup ? row_tiles : kRowGroup;
    const int wanted = processors / group;
    splits = wanted < 1 ? 1 : wanted < column_tiles ? wanted : column_tiles;
  }

  TRAPO_HD int items() const { return row_tiles * splits; }

  // Groups of row tiles follow each other; within a group the row tiles of one split are neighbours. The last group may be smaller.
  TRAPO_HD WorkItem item(int index) const {
    const int in_group = group * splits, which = index / in_group;
    const int left = row_tiles - which * group, members = left < group ? left : group, inside = index - which * in_group;
    const int split = inside / members;
    return {which * group + inside % members, split, column_tiles * split / splits, column_tiles * (split + 1) / splits};
  }
};

}  // namespace trapo

// The arithmetic of csrc/cuda that a host can call by itself, for test_native_cuda.py: a library of its own, compiled in a moment.

#include "csrc/cuda/layout.h"
#include "csrc/cuda/softmax.h"

namespace trapo {

extern "C" {

void accumulator_places(int* rows, int* columns) {
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < kAccumulators; ++i) {
      rows[thread * kAccumulators + i] = accumulator_row(thread, i);
      columns[thread * kAccumulators + i] = accumulator_column(thread, i);
    }
  }
}

// How often each tile of [row tiles, column tiles] is worked on, tiles of rows beyond the last one left out; how many tiles each cluster
// that runs at a time works on; out: blocks of a cluster, splits, items.
void count_tiles(int64_t rows, int64_t vocab_size, int multiprocessors, int* counts, int* by_cluster, int* out) {
  const Schedule schedule(rows, vocab_size, multiprocessors);
  for (int index = 0; index < schedule.items(); ++index) {
    const WorkItem item = schedule.item(index);
    by_cluster[index % schedule.resident_clusters] += item.last_column_tile - item.first_column_tile;
    for (int rank = 0; rank < schedule.cluster_blocks; ++rank) {
      const int row_tile = item.first_row_tile + rank;
      if (int64_t{row_tile} * kTileRows >= rows) continue;
      for (int tile = item.first_column_tile; tile < item.last_column_tile; ++tile) ++counts[row_tile * schedule.column_tiles + tile];
    }
  }
  out[0] = schedule.cluster_blocks, out[1] = schedule.splits, out[2] = schedule.items();
}

// Statistics and gradient of a row in `parts` interleaved partial sums, combined in order.
void row(const float* logits, int vocab_size, int target, float softcap, float temperature, int parts, float c, float e, float* statistics,
         float* gradient) {
  const Transform t(softcap, temperature);
  RunningSoftmax total = empty_softmax();
  for (int part = 0; part < parts; ++part) {
    RunningSoftmax s = empty_softmax();
    for (int v = part; v < vocab_size; v += parts) {
      const float y = t.capped(logits[v]);
      if (v == target) continue;
      if (y * t.scale > s.max) raise_max(s, y * t.scale);
      add_logit(s, y, t.scale);
    }
    total = part == 0 ? s : combine(total, s);
  }
  const RowStatistics s = finish(total, t.capped(logits[target]), t.scale);
  statistics[0] = s.logprob, statistics[1] = s.entropy, statistics[2] = s.row_max + s.log_sum;
  const RowGradient g(s, t, c, e);
  for (int v = 0; v < vocab_size; ++v) {
    const float y = t.capped(logits[v]);
    gradient[v] = (v == target ? gradient_at_target(s, t, c, e) : g.elsewhere(y)) * t.slope(y);
  }
}
}

}  // namespace trapo

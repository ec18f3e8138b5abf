// One row of logits at a time, two sweeps. Included once per instruction set, after simd.h.
//
//   sweep 1   row ─▶ blocks of 16 KiB, which stay in L1 between their two visits ─▶ max, Σexp, Σexp·z ─▶ logp, H
//   sweep 2   row ─▶ c (1[y] - p) - e p (log p + H) ─▶ the same memory; a row of 152k logits comes from L2
//
// Work: about 12 FLOP and 2 exp per logit for both sweeps, and one tanh more with a softcap.
// Reads / writes: a logit is read from DRAM once and its gradient written once.
// Saved: the gradient, in the logits' place; after sweep 1 that holds the logits as `transform_block` leaves them.
// On chip: a block in L1, sums in registers; no temporary is larger than a block.
// Edges: a ragged end is a masked vector; a target outside the vocabulary makes the row NaN; offsets are int64.
// Order: blocks ascend, lanes are summed in order, and a row is never split between threads: bitwise repeatable.

namespace trapo {
namespace TRAPO_SET {

// A block of raw logits, in place, becomes what z is `unit` times: tanh((x + bias) / softcap), whose square the gradient needs
// unrounded, or (x + bias) / temperature where there is no softcap.
TRAPO_INLINE Vec transformed(Vec x, Vec bias, const RowTransform& t) {
  x = x + bias;
  return t.softcap != 0.0f ? tanh(x / t.softcap) : x / t.temperature;
}

void transform_block(float* x, const float* bias, int64_t count, const RowTransform& t) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(x + i, transformed(load(x + i), bias ? load(bias + i) : Vec{}, t));
  const int64_t rest = count - i;
  if (rest == 0) return;
  const Vec tail_bias = bias ? load_part(bias + i, rest, 0.0f) : Vec{};
  store_part(x + i, transformed(load_part(x + i, rest, 0.0f), tail_bias, t), rest);
}

// The largest number of a block; a NaN anywhere may or may not show here, but always does in the sums.
float block_max(const float* z, int64_t count) {
  Vec most0 = splat(kFloor), most1 = most0, most2 = most0, most3 = most0;
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
    most0 = larger(most0, load(z + i));
    most1 = larger(most1, load(z + i + kWidth));
    most2 = larger(most2, load(z + i + 2 * kWidth));
    most3 = larger(most3, load(z + i + 3 * kWidth));
  }
  for (; i + kWidth <= count; i += kWidth) most0 = larger(most0, load(z + i));
  if (i < count) most0 = larger(most0, load_part(z + i, count - i, kFloor));
  return largest_lane(larger(larger(most0, most1), larger(most2, most3)));
}

// z - row_max of numbers that z is `unit` times.
TRAPO_INLINE Vec centred(Vec held, float unit, float row_max) { return larger(held * unit - row_max, splat(kFloor)); }

// Adds Σ exp(z - row_max) and Σ exp(z - row_max) · (z - row_max) of a block.
void block_sums(const float* held, int64_t count, float unit, float row_max, double* sum, double* moment) {
  Vec sum0 = {}, sum1 = {}, moment0 = {}, moment1 = {};
  int64_t i = 0;
  for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
    const Vec z0 = centred(load(held + i), unit, row_max), z1 = centred(load(held + i + kWidth), unit, row_max);
    const Vec e0 = exp(z0), e1 = exp(z1);
    sum0 += e0;
    sum1 += e1;
    moment0 += e0 * z0;
    moment1 += e1 * z1;
  }
  for (; i < count; i += kWidth) {
    const Vec z0 = centred(i + kWidth <= count ? load(held + i) : load_part(held + i, count - i, -INFINITY), unit, row_max);
    const Vec e0 = exp(z0);
    sum0 += e0;
    moment0 += e0 * z0;
  }
  *sum += sum_of_lanes(sum0 + sum1);
  *moment += sum_of_lanes(moment0 + moment1);
}

// The running sums of a row over all columns but the target's, and what it held in the target's place.
struct RunningRow {
  float row_max = kFloor, target_held = NAN;  // NaN of a target outside the vocabulary
  double others = 0.0, moment = 0.0;

  // Takes in a block that is transformed; `target` counts from its first column. -inf is left in the target's place.
  void add(float* held, int64_t count, int64_t target, float unit) {
    const float most = block_max(held, count) * unit;
    if (target >= 0 && target < count) {
      target_held = held[target];
      held[target] = -INFINITY;
    }
    if (most > row_max) {
      const double shift = static_cast<double>(row_max) - most, scale = std::exp(shift);
      moment = others == 0.0 ? 0.0 : scale * (moment + shift * others);
      others *= scale;
      row_max = most;
    }
    block_sums(held, count, unit, row_max, &others, &moment);
  }
};

// Statistics of a row, NaN where the target lies outside the vocabulary; afterwards it holds what `transform_block` makes of raw
// logits, and -inf in the target's place.
Row sweep_statistics(const Part* parts, int64_t num_parts, const float* bias, int64_t target, const RowTransform& t) {
  const bool plain = bias == nullptr && t.softcap == 0.0f && t.temperature == 1.0f;
  const float unit = t.unit();
  RunningRow row;
  int64_t column = 0;
  for (const Part* part = parts; part != parts + num_parts; ++part) {
    for (int64_t start = 0; start < part->count; start += kBlock) {
      const int64_t count = part->count - start < kBlock ? part->count - start : kBlock;
      if (!plain) transform_block(part->data + start, bias ? bias + column : nullptr, count, t);
      row.add(part->data + start, count, target < 0 ? target : target - column, unit);  // the difference could leave int64
      column += count;
    }
  }
  return finished_row(row.others, row.moment, row.row_max, row.target_held, unit);
}

// dL/dz = c (1[v = target] - p) - e p (log p + H) over a part of a row as `sweep_statistics` leaves it, then through temperature and
// softcap to the raw logits. `bracket` = c + e (H - log_sum), so that the gradient of a column other than the target's is
// -p (e (z - row_max) + bracket). `grad` may begin where `held` does: a number is written when all that lies there has been read.
template <typename T>
void sweep_gradient(const float* held, T* grad, int64_t count, float row_max, float inverse_total, float e, float bracket,
                    const RowTransform& t) {
  const Vec scale = splat(-inverse_total / t.temperature);
  const float unit = t.unit();
  for (int64_t i = 0; i < count; i += kWidth) {
    const int64_t rest = count - i;
    const Vec own = rest >= kWidth ? load(held + i) : load_part(held + i, rest, 0.0f);
    const Vec below = centred(own, unit, row_max);
    Vec out = exp(below) * scale * (e * below + bracket);
    if (t.softcap != 0.0f) out *= 1.0f - own * own;
    out = without_subnormals(out);
    if (rest >= kWidth) {
      store(grad + i, out);
    } else {
      store_part(grad + i, out, rest);
    }
  }
}

constexpr RowSweeps kSweeps = {transform_block, sweep_statistics, sweep_gradient<float>, sweep_gradient<BFloat16>};

}  // namespace TRAPO_SET
}  // namespace trapo

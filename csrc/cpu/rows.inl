// One row of logits at a time, two sweeps. Included once per instruction set, after simd.h.
//
//   sweep 1   row ─▶ blocks of 16 KiB, which stay in L1 between their two visits ─▶ max, Σexp, Σexp·z ─▶ logp, H
//   sweep 2   row ─▶ c (1[y] - p) - e p (log p + H) ─▶ the same memory; a row of 152k logits comes from L2
//
// Memory traffic: a logit is read from DRAM once and its gradient written once; no temporary is larger than a block.
// Order: blocks ascend, lanes are summed in order, and a row is never split between threads: bitwise repeatable.

namespace trapo {
namespace TRAPO_SET {

// z of a block of raw logits, in place: z = softcap · tanh((x + bias) / softcap) / temperature.
TRAPO_INLINE Vec transformed(Vec x, Vec bias, const RowTransform& t) {
  x = x + bias;
  if (t.softcap != 0.0f) x = tanh(x / t.softcap) * t.softcap;
  return x / t.temperature;
}

void transform_block(float* x, const float* bias, int64_t count, const RowTransform& t) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(x + i, transformed(load(x + i), bias ? load(bias + i) : Vec{}, t));
  const int64_t rest = count - i;
  if (rest == 0) return;
  const Vec tail_bias = bias ? load_part(bias + i, rest, 0.0f) : Vec{};
  store_part(x + i, transformed(load_part(x + i, rest, 0.0f), tail_bias, t), rest);
}

// The largest value of a block; a NaN anywhere may or may not show here, but always does in the sums.
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

// Adds Σ exp(z - row_max) and Σ exp(z - row_max) · (z - row_max) of a block.
void block_sums(const float* z, int64_t count, float row_max, double* sum, double* moment) {
  Vec sum0 = {}, sum1 = {}, moment0 = {}, moment1 = {};
  int64_t i = 0;
  for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
    const Vec z0 = larger(load(z + i) - row_max, splat(kFloor)), z1 = larger(load(z + i + kWidth) - row_max, splat(kFloor));
    const Vec e0 = exp(z0), e1 = exp(z1);
    sum0 += e0;
    sum1 += e1;
    moment0 += e0 * z0;
    moment1 += e1 * z1;
  }
  for (; i < count; i += kWidth) {
    const Vec logits = i + kWidth <= count ? load(z + i) : load_part(z + i, count - i, -INFINITY);
    const Vec z0 = larger(logits - row_max, splat(kFloor));
    const Vec e0 = exp(z0);
    sum0 += e0;
    moment0 += e0 * z0;
  }
  *sum += sum_of_lanes(sum0 + sum1);
  *moment += sum_of_lanes(moment0 + moment1);
}

// Statistics of a row, NaN where the target lies outside the vocabulary; afterwards it holds z instead of raw logits, and -inf in the
// target's place.
Row sweep_statistics(float* x, const float* bias, int64_t vocab_size, int64_t target, const RowTransform& t) {
  const bool plain = bias == nullptr && t.softcap == 0.0f && t.temperature == 1.0f;
  float row_max = kFloor, target_logit = NAN;  // of a target outside the vocabulary
  double others = 0.0, moment = 0.0;  // over all columns but the target's
  for (int64_t start = 0; start < vocab_size; start += kBlock) {
    const int64_t count = vocab_size - start < kBlock ? vocab_size - start : kBlock;
    float* z = x + start;
    if (!plain) transform_block(z, bias ? bias + start : nullptr, count, t);
    float most = block_max(z, count);
    if (target >= start && target < start + count) {
      target_logit = z[target - start];
      z[target - start] = -INFINITY;
    }
    if (most > row_max) {
      const double shift = static_cast<double>(row_max) - most, scale = std::exp(shift);
      moment = others == 0.0 ? 0.0 : scale * (moment + shift * others);
      others *= scale;
      row_max = most;
    }
    block_sums(z, count, row_max, &others, &moment);
  }
  return finished_row(others, moment, row_max, target_logit);
}

// dL/dz = c (1[v = target] - p) - e p (log p + H) over a row of z, then through temperature and softcap to the raw logits.
// `bracket` = c + e (H - log_sum), so that the gradient of a column other than the target's is -p (e (z - row_max) + bracket).
// `grad` may begin where `z` does: a number is written when all that lies there has been read.
template <typename T>
void sweep_gradient(const float* z, T* grad, int64_t vocab_size, float row_max, float inverse_total, float e, float bracket,
                    const RowTransform& t) {
  const Vec scale = splat(-inverse_total / t.temperature);
  const float to_tanh = t.softcap == 0.0f ? 0.0f : t.temperature / t.softcap;
  for (int64_t i = 0; i < vocab_size; i += kWidth) {
    const int64_t rest = vocab_size - i;
    const Vec raw = rest >= kWidth ? load(z + i) : load_part(z + i, rest, 0.0f);
    const Vec centred = larger(raw - row_max, splat(kFloor));
    Vec out = exp(centred) * scale * (e * centred + bracket);
    if (to_tanh != 0.0f) out *= 1.0f - (raw * to_tanh) * (raw * to_tanh);
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

// The running sums of a softmax and how two of them combine: arithmetic shared by the row kernels and the scoring kernel, and
// compiled for the host as well, where the tests run it.
//
//   x  raw logit     y  after bias and softcap     bits = y / temperature · log2(e), so that p = 2^(bits - ...)
//
// Sums count in bits: from y to an exponential it is one fused multiply-add, rounded relative to the distance from the maximum, and
// one ex2. Statistics and gradients are in nats.

#pragma once

#include <cmath>

#include "../gates.h"

namespace trapo {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.69314718055994531f;

// Over some columns of a row, the target's left out: the largest bits, Σ 2^(bits - max) and Σ 2^(bits - max) (bits - max).
struct RunningSoftmax {
  float max, others, moment;
};

#if defined(__CUDA_ARCH__)
TRAPO_HD float quotient(float a, float b) { return __fdividef(a, b); }  // 2 ulp; 0 for |b| > 2^126
TRAPO_HD float power_of_2(float x) {  // 2 ulp in one instruction; 0 where it would be subnormal
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
TRAPO_HD float difference(float a, float b) { return __fsub_rn(a, b); }  // rounded as it stands, where b is a product too
TRAPO_HD float at_least_floor(float x) {  // NaN stays NaN
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(kFloor));
  return y;
}
#else
TRAPO_HD float quotient(float a, float b) { return fabsf(b) > 0x1p126f ? 0.0f : a / b; }
TRAPO_HD float power_of_2(float x) { return exp2f(x); }
TRAPO_HD float difference(float a, float b) { return a - b; }
TRAPO_HD float at_least_floor(float x) { return x < kFloor ? kFloor : x; }
#endif

TRAPO_HD RunningSoftmax empty_softmax() { return {kFloor, 0.0f, 0.0f}; }

// Bring the sums to a larger maximum.
TRAPO_HD void raise_max(RunningSoftmax& s, float new_max) {
  const float shift = difference(s.max, new_max), scale = power_of_2(shift);
  s.moment = s.others == 0.0f ? 0.0f : scale * (s.moment + shift * s.others);
  s.others *= scale;
  s.max = new_max;
}

// bits - max of a logit y, where bits = y · scale.
TRAPO_HD float centred(float y, float scale, float max) { return at_least_floor(fmaf(y, scale, -max)); }

TRAPO_HD void add_logit(RunningSoftmax& s, float y, float scale) {
  const float below = centred(y, scale, s.max), e = power_of_2(below);
  s.others += e;
  s.moment = fmaf(e, below, s.moment);
}

TRAPO_HD RunningSoftmax combine(RunningSoftmax a, RunningSoftmax b) {
  const float max = a.max < b.max ? b.max : a.max;
  raise_max(a, max);
  raise_max(b, max);
  return {max, a.others + b.others, a.moment + b.moment};
}

struct RowStatistics {
  float logprob, entropy, row_max, log_sum;  // nats; row_max is the maximum up to a rounding, and log_sum belongs to that number
};

// The statistics of a row from its sums without the target and the target's y; a NaN target gives NaN.
TRAPO_HD RowStatistics finish(RunningSoftmax s, float y_target, float scale) {
  if (y_target * scale > s.max) raise_max(s, y_target * scale);
  const float shifted = fmaf(y_target, scale, -s.max), at_target = power_of_2(shifted), total = s.others + at_target;
  const float bits = log2f(total), row_max = s.max * kLn2;
  // p → 1: log1p keeps the digits of `others` that 1 + others has lost. The entropy is that of the others, then the target's.
  const float logprob = shifted < -1.0f ? kLn2 * (shifted - bits) : -log1pf(s.others / at_target);
  const float of_target = at_target == 0.0f ? 0.0f : at_target * logprob;
  return {logprob, (kLn2 * (s.others * bits - s.moment) - of_target) / total, row_max, fmaf(kLn2, bits, fmaf(s.max, kLn2, -row_max))};
}

// tanh from exp; its odd series below 1/4, where 1 - 2/(exp(2x)+1) would lose digits.
TRAPO_HD float tanh_of(float x) {
  const float size = fabsf(x), square = x * x;
  const float far = 1.0f - quotient(2.0f, power_of_2(2.0f * kLog2E * fminf(size, 20.0f)) + 1.0f);
  const float series = -1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315 + square * (62.0f / 2835)));
  const float near = size * (1.0f + square * series);
  return copysignf(size < 0.25f ? near : x != x ? x : far, x);
}

// 1 / x up to the largest number.
TRAPO_HD float reciprocal(float x) { return quotient(0.25f, 0.25f * x); }

// From raw logits to bits: y = softcap · tanh(x / softcap), bits = y · scale; softcap 0 means none. Divisions are done once per row.
struct Transform {
  float softcap, inverse_softcap, inverse_temperature, scale;

  TRAPO_HD Transform(float softcap, float temperature)
      : softcap(softcap), inverse_softcap(softcap == 0.0f ? 0.0f : reciprocal(softcap)),
        inverse_temperature(reciprocal(temperature)), scale(inverse_temperature * kLog2E) {}
  TRAPO_HD float capped(float x) const { return softcap == 0.0f ? x : softcap * tanh_of(x * inverse_softcap); }
  // dy/dx = 1 - tanh² from y, which is what a row keeps: softcap - y is exact where y comes near it, and 0 where it gets there.
  TRAPO_HD float slope(float y) const {
    return softcap == 0.0f ? 1.0f : (softcap - y) * inverse_softcap * ((softcap + y) * inverse_softcap);  // y may be -inf without one
  }
};

// dL/dy of the columns of a row: (c (1[v = target] - p) - e p (log p + H)) / temperature.
struct RowGradient {
  float max, scale;       // bits, and bits per y
  float of_bits, bracket;  // at other columns than the target's: 2^(bits - max) (of_bits (bits - max) + bracket)

  TRAPO_HD RowGradient(const RowStatistics& s, const Transform& t, float c, float e) : max(s.row_max * kLog2E), scale(t.scale) {
    const float log_total = s.log_sum + kLn2 * fmaf(s.row_max, kLog2E, -max);  // of the sum that belongs to the rounded max
    const float factor = -expf(-log_total) * t.inverse_temperature;
    of_bits = factor * e * kLn2;
    bracket = factor * (c + e * (s.entropy - log_total));
  }
  TRAPO_HD float elsewhere(float y) const {
    const float below = centred(y, scale, max);
    return power_of_2(below) * fmaf(of_bits, below, bracket);
  }
};

// The same at the target's column.
TRAPO_HD float gradient_at_target(const RowStatistics& s, const Transform& t, float c, float e) {
  const float p = expf(s.logprob);
  float g = -c * expm1f(s.logprob);  // c (1 - p) without cancellation at p → 1
  if (e != 0.0f && p != 0.0f) g -= p * e * (s.logprob + s.entropy);
  return g * t.inverse_temperature;
}

}  // namespace trapo

// The running sums of a softmax and how two of them combine: arithmetic shared by the row kernels and the scoring kernel, and
// compiled for the host as well, where the tests run it.

#pragma once

#include <cmath>

#include "../gates.h"

namespace trapo {

constexpr float kFloor = -1e30f;  // stands for -inf after the row maximum is subtracted: exp is 0, and 0 · kFloor is 0, not NaN

// Over some columns of a row, the target's left out: the largest z, Σ exp(z - max) and Σ exp(z - max) (z - max).
struct RunningSoftmax {
  float max, others, moment;
};

#if defined(__CUDA_ARCH__)
TRAPO_HD float quotient(float a, float b) { return __fdividef(a, b); }  // 2 ulp, without the slow path for subnormal numbers
TRAPO_HD float exponential(float x) {  // 2 + 1.2 |x| ulp in two instructions instead of eight; 0 where it would be subnormal
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
#else
TRAPO_HD float quotient(float a, float b) { return a / b; }
TRAPO_HD float exponential(float x) { return expf(x); }
#endif

TRAPO_HD RunningSoftmax empty_softmax() { return {kFloor, 0.0f, 0.0f}; }

// Bring the sums to a larger maximum.
TRAPO_HD void raise_max(RunningSoftmax& s, float new_max) {
  const float shift = s.max - new_max, scale = exponential(shift);
  s.moment = s.others == 0.0f ? 0.0f : scale * (s.moment + shift * s.others);
  s.others *= scale;
  s.max = new_max;
}

TRAPO_HD void add_logit(RunningSoftmax& s, float z) {
  const float centred = z - s.max < kFloor ? kFloor : z - s.max;  // NaN stays NaN
  const float e = exponential(centred);
  s.others += e;
  s.moment += e * centred;
}

TRAPO_HD RunningSoftmax combine(RunningSoftmax a, RunningSoftmax b) {
  const float max = a.max < b.max ? b.max : a.max;
  raise_max(a, max);
  raise_max(b, max);
  return {max, a.others + b.others, a.moment + b.moment};
}

struct RowStatistics {
  float logprob, entropy, row_max, log_sum;
};

// The statistics of a row from its sums without the target and the target's z; a NaN target gives NaN.
TRAPO_HD RowStatistics finish(RunningSoftmax s, float z_target) {
  if (z_target > s.max) raise_max(s, z_target);
  const float shifted = z_target - s.max, at_target = expf(shifted), total = s.others + at_target;
  // p → 1: log1p keeps the digits of `others` that 1 + others has lost.
  const float log_sum = shifted == 0.0f ? log1pf(s.others) : logf(total);
  const float moment = s.moment + (at_target == 0.0f ? 0.0f : at_target * shifted);
  return {shifted - log_sum, log_sum - moment / total, s.max, log_sum};
}

// tanh from exp; its odd series below 1/4, where 1 - 2/(exp(2x)+1) would lose digits.
TRAPO_HD float tanh_of(float x) {
  const float size = fabsf(x), square = x * x;
  const float far = 1.0f - quotient(2.0f, exponential(2.0f * fminf(size, 20.0f)) + 1.0f);
  const float series = -1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315 + square * (62.0f / 2835)));
  const float near = size * (1.0f + square * series);
  return copysignf(size < 0.25f ? near : x != x ? x : far, x);
}

// z = softcap · tanh((x + bias) / softcap) / temperature; softcap 0 means none. Divisions are done once per row.
struct Transform {
  float softcap, inverse_softcap, inverse_temperature, z_to_tanh;

  TRAPO_HD Transform(float softcap, float temperature)
      : softcap(softcap), inverse_softcap(softcap == 0.0f ? 0.0f : quotient(1.0f, softcap)), inverse_temperature(quotient(1.0f, temperature)),
        z_to_tanh(temperature * inverse_softcap) {}
  TRAPO_HD float z(float x) const {
    return (softcap != 0.0f ? softcap * tanh_of(x * inverse_softcap) : x) * inverse_temperature;
  }
  // dz/dx from z itself.
  TRAPO_HD float slope(float z) const {
    const float t = z * z_to_tanh;
    return softcap != 0.0f ? (1.0f - t * t) * inverse_temperature : inverse_temperature;
  }
};

// dL/dz of the columns of a row: c (1[v = target] - p) - e p (log p + H).
struct RowGradient {
  float row_max, inverse_total, e, bracket, at_target;

  TRAPO_HD RowGradient(const RowStatistics& s, float c, float grad_entropy)
      : row_max(s.row_max), inverse_total(expf(-s.log_sum)), e(grad_entropy), bracket(c + grad_entropy * (s.entropy - s.log_sum)) {
    const float p = expf(s.logprob);
    at_target = -c * expm1f(s.logprob);  // c (1 - p) without cancellation at p → 1
    if (e != 0.0f && p != 0.0f) at_target -= p * e * (s.logprob + s.entropy);
  }
  TRAPO_HD float elsewhere(float z) const {
    const float centred = z - row_max < kFloor ? kFloor : z - row_max;
    return -exponential(centred) * inverse_total * (e * centred + bracket);
  }
};

}  // namespace trapo

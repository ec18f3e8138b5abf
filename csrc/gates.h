// dL/dlogp of a token: the slopes G of trapo_kernels/gates.py by their codes, for host and device code alike.

#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define TRAPO_HD __host__ __device__ __forceinline__
#else
#define TRAPO_HD inline
#endif

namespace trapo {

constexpr int64_t kIgnoredTarget = -100;
constexpr float kFloor = -1e30f;  // stands for -inf after the row maximum is subtracted: exp is 0, and 0 · kFloor is 0, not NaN
constexpr int kLastGate = 9, kLastKl = 4;  // the codes of `slope` and of the KL terms in `coefficient`; 0 is none
constexpr int kNumScalars = 8;  // three of each gate, two of the KL

enum Role : uint8_t { kIgnored = 0, kRollout = 1, kExpert = 2 };

// The codes and scalars of an objective's gates and KL term; what they mean is said in `slope` and `coefficient`.
struct Gates {
  int expert, rollout, kl;
  float e[3], r[3], kl_low, kl_high;
};

TRAPO_HD float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// x within [low, high]; NaN stays NaN, which fminf and fmaxf would swallow.
TRAPO_HD float clamped(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// G(d) of a gate, d = logp - anchor; 0 for code 0, a role without a term.
TRAPO_HD float slope(int gate, float d, float advantage, const float* s) {
  const float ratio = expf(d);
  switch (gate) {
    case 1:  // One
      return 1.0f;
    case 2:  // Ratio
      return ratio;
    case 3: {  // Clip: floor, ceiling, dual
      const bool outside = advantage < 0.0f ? ratio < s[0] || ratio > s[2] : ratio > s[1];
      return outside ? 0.0f : ratio;
    }
    case 4:  // Truncate: low, high, scale
      return s[2] * clamped(ratio, s[0], s[1]);
    case 5:  // Band: low, high
      return ratio < s[0] || ratio > s[1] ? 0.0f : ratio;
    case 6:  // Shape: log γ
      return sigmoid(d - s[0]) * sigmoid(s[0] - d);  // 1 - σ would lose its digits
    case 7:  // Power: exponent
      return s[0] * expf(s[0] * d);
    case 8:  // Phi
      return -ratio * expm1f(d);
    case 9: {  // Sapo: τ for advantage ≥ 0, τ below
      const float capped = d > 20.0f ? 20.0f : d;  // beyond it 4σ(1-σ) is exactly 0 in fp32, and only r could overflow
      const float excess = (advantage < 0.0f ? s[1] : s[0]) * expm1f(capped);
      return 4.0f * sigmoid(excess) * sigmoid(-excess) * expf(capped);
    }
    default:
      return 0.0f;
  }
}

// c = dL/dlogp = -signal · G(d) + kl_weight · K(logp - ref). The anchor is +inf where it is the policy itself (d = 0).
TRAPO_HD float coefficient(const Gates& gates, float logprob, uint8_t role, float anchor, float signal, float advantage,
                           float kl_weight, float ref_logprob) {
  const float d = anchor == INFINITY ? 0.0f : logprob - anchor;
  const float g = role == kExpert ? slope(gates.expert, d, advantage, gates.e) : slope(gates.rollout, d, advantage, gates.r);
  float c = signal == 0.0f ? 0.0f : -signal * g;  // 0 however large the ratio is
  if (gates.kl == 0 || role != kRollout || kl_weight == 0.0f) return c;
  const float d_ref = logprob - ref_logprob;
  const float held = clamped(d_ref, gates.kl_low, gates.kl_high);
  const bool inside = held == d_ref;  // beyond the bounds the estimate is flat, and of k3_corrected only r has a slope
  float k = 0.0f;
  switch (gates.kl) {
    case 1:  // k1
      k = inside ? 1.0f : 0.0f;
      break;
    case 2:  // k2
      k = inside ? d_ref : 0.0f;
      break;
    case 3:  // k3
      k = inside ? -expm1f(-held) : 0.0f;
      break;
    default:  // k3_corrected
      k = inside ? expf(d) * d_ref : expf(d) * (expm1f(-held) + held);
  }
  return c + kl_weight * k;
}

}  // namespace trapo

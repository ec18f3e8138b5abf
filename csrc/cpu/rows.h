// What the sweeps of csrc/cpu/rows.inl take and give, and the choice among the instruction sets they are compiled for.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "../gates.h"

namespace trapo {

constexpr int64_t kBlock = 4096;  // logits; 16 KiB, half of a usual L1 cache

// A stretch of a row; the columns of a row may lie in several.
struct Part {
  float* data;
  int64_t count;
};

struct RowTransform {
  float softcap;  // 0: none
  float temperature;

  // z over what a row holds once it is transformed (see `transformed` in rows.inl).
  float unit() const { return softcap == 0.0f ? 1.0f : softcap / temperature; }
};

// The statistics of a row, nats, and what its gradient needs besides; `target_held` is what the row held in the target's place.
struct Row {
  double logprob, entropy, log_sum;
  float row_max, target_held, inverse_total;
};

// `others` and `moment` are Σexp(z - row_max) and Σexp(z - row_max)·(z - row_max) over all columns but the target's.
inline Row finished_row(double others, double moment, float row_max, float target_held, float unit) {
  const double shifted = static_cast<double>(target_held) * unit - row_max;
  const double at_target = std::exp(shifted), total = others + at_target;
  // p → 1: log1p keeps the digits of `others` that 1 + others has lost.
  // A total of 0 is of logits so far below 0 that nothing is known of them.
  const double of_total = total == 0.0 ? std::numeric_limits<double>::quiet_NaN() : std::log(total);
  const double logprob = shifted < -1.0 ? shifted - of_total : -std::log1p(others / at_target);
  const double log_sum = shifted < -1.0 ? std::log(total) : shifted - logprob;
  const double moment_total = moment + (at_target == 0.0 ? 0.0 : at_target * shifted);
  return {logprob, log_sum - moment_total / total, log_sum, row_max, target_held, static_cast<float>(1.0 / total)};
}

// The bits of a bf16 number. They may lie where a float did (a chunk of logits becomes its own gradient): written as whole vectors of
// a type that may alias, or by memcpy.
typedef uint16_t BFloat16;

struct RowSweeps {
  void (*transform)(float* x, const float* bias, int64_t count, const RowTransform& t);
  Row (*statistics)(const Part* parts, int64_t num_parts, const float* bias, int64_t target, const RowTransform& t);
  void (*gradient)(const float* held, float* grad, int64_t count, float row_max, float inverse_total, float e, float bracket,
                   const RowTransform& t);
  void (*gradient_bf16)(const float* held, BFloat16* grad, int64_t count, float row_max, float inverse_total, float e,
                        float bracket, const RowTransform& t);
};

// The sweeps for the widest instruction set that this processor has, or for the one chosen by `use_instruction_set`.
const RowSweeps& row_sweeps();
const char* instruction_set();
// False where this processor, or this build, does not have the set.
bool use_instruction_set(const char* name);

}  // namespace trapo

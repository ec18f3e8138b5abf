// How the threads of a warp combine their running sums.

#pragma once

#include "softmax.h"

namespace trapo {

// The sums of every kLanes neighbouring lanes, in each of them: all are brought to the largest maximum, then added in pairs. Neither
// minds which of two comes first, so all lanes get the same bits.
template <int kLanes>
__device__ __forceinline__ RunningSoftmax combine_lanes(RunningSoftmax s) {
  float max = s.max;
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, offset));
  raise_max(s, max);
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
    s.others += __shfl_xor_sync(~0u, s.others, offset);
    s.moment += __shfl_xor_sync(~0u, s.moment, offset);
  }
  return s;
}

}  // namespace trapo

// How the threads of a warp combine their running sums.

#pragma once

#include "softmax.h"

namespace trapo {

// The sums of every kLanes neighbouring lanes, in each of them: `combine` does not mind which of the two comes first, so all get the
// same bits.
template <int kLanes>
__device__ __forceinline__ RunningSoftmax combine_lanes(RunningSoftmax s) {
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
    s = combine(s, {__shfl_xor_sync(~0u, s.max, offset), __shfl_xor_sync(~0u, s.others, offset), __shfl_xor_sync(~0u, s.moment, offset)});
  }
  return s;
}

}  // namespace trapo

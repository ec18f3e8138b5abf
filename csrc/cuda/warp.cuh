// How the threads of a warp combine their running sums: in one order, so that every one of them gets the same bits.

#pragma once

#include "softmax.h"

namespace trapo {

// The sums that lane `from` holds.
__device__ __forceinline__ RunningSoftmax of_lane(const RunningSoftmax& s, int from) {
  return {__shfl_sync(~0u, s.max, from), __shfl_sync(~0u, s.others, from), __shfl_sync(~0u, s.moment, from)};
}

// The sums of every kLanes neighbouring lanes, in each of them.
template <int kLanes>
__device__ __forceinline__ RunningSoftmax combine_lanes(RunningSoftmax s) {
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
    const RunningSoftmax other = {__shfl_xor_sync(~0u, s.max, offset), __shfl_xor_sync(~0u, s.others, offset),
                                  __shfl_xor_sync(~0u, s.moment, offset)};
    s = threadIdx.x & offset ? combine(other, s) : combine(s, other);  // the lower lane's sums come first on both sides
  }
  return s;
}

}  // namespace trapo

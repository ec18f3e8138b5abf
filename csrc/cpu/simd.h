// Vectors of TRAPO_WIDTH floats in the compiler's own vector types, and exp and tanh on them: one source for every instruction
// set. Included once per set, inside the namespace TRAPO_SET and under its target options; therefore without an include guard.

namespace trapo {
namespace TRAPO_SET {

typedef float Vec __attribute__((vector_size(TRAPO_WIDTH * 4)));
typedef int32_t IntVec __attribute__((vector_size(TRAPO_WIDTH * 4)));
typedef uint32_t Bits __attribute__((vector_size(TRAPO_WIDTH * 4)));
typedef uint16_t Halves __attribute__((vector_size(TRAPO_WIDTH * 2)));
typedef uint16_t HalvesInMemory __attribute__((vector_size(TRAPO_WIDTH * 2), aligned(2), may_alias));
typedef float VecInMemory __attribute__((vector_size(TRAPO_WIDTH * 4), aligned(4), may_alias));

constexpr int64_t kWidth = TRAPO_WIDTH;

TRAPO_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecInMemory*>(p); }
TRAPO_INLINE void store(float* p, Vec x) { *reinterpret_cast<VecInMemory*>(p) = x; }
TRAPO_INLINE Vec splat(float x) { return x - Vec{}; }

// x, and exactly 0 in place of subnormal numbers, on which a GEMM would spend many times the time.
TRAPO_INLINE Vec without_subnormals(Vec x) {
  const Vec size = x < 0.0f ? -x : x;
  return size < std::numeric_limits<float>::min() ? splat(0.0f) : x;
}

// To bf16, to nearest, ties to even; NaN stays NaN.
TRAPO_INLINE void store(BFloat16* p, Vec x) {
  const Bits bits = (Bits)x, odd = (bits >> 16) & 1u;
  const Bits rounded = (bits + (0x7fffu + odd)) >> 16;
  const Halves halves = __builtin_convertvector(x == x ? rounded : (bits | 0x400000u) >> 16, Halves);
  *reinterpret_cast<HalvesInMemory*>(p) = halves;
}

// The first `count` < kWidth floats at p, and `rest` in the other lanes.
TRAPO_INLINE Vec load_part(const float* p, int64_t count, float rest) {
  float lanes[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) lanes[i] = rest;
  std::memcpy(lanes, p, count * sizeof(float));
  return load(lanes);
}

template <typename T>
TRAPO_INLINE void store_part(T* p, Vec x, int64_t count) {
  T lanes[kWidth];
  store(lanes, x);
  std::memcpy(p, lanes, count * sizeof(T));
}

// The larger of x and y; NaN in x is kept.
TRAPO_INLINE Vec larger(Vec x, Vec y) { return x < y ? y : x; }

TRAPO_INLINE float largest_lane(Vec x) {
  float most = x[0];
  for (int64_t i = 1; i < kWidth; ++i) most = most < x[i] ? x[i] : most;
  return most;
}

TRAPO_INLINE double sum_of_lanes(Vec x) {
  double sum = 0.0;
  for (int64_t i = 0; i < kWidth; ++i) sum += x[i];
  return sum;
}

// exp(x) for x ≤ 88, about 1 ulp; exactly 0 below -87.3, where the result would be subnormal. NaN stays NaN.
TRAPO_INLINE Vec exp(Vec x) {
  const Vec floor = splat(-87.336544f);
  const Vec kept = larger(x, floor);
  const Vec shifted = kept * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: the nearest integer ends up in the low bits
  const Vec n = shifted - 12582912.0f;
  const Vec r = (kept - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const IntVec power = ((IntVec)shifted + 127) << 23;
  return x < floor ? splat(0.0f) : p * (Vec)power;
}

// tanh(x), about 2 ulp.
TRAPO_INLINE Vec tanh(Vec x) {
  const Vec size = x < 0.0f ? -x : x;
  const Vec square = x * x;
  Vec p = -5.70498872745e-3f * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vec near = x + x * square * p;
  const Vec far = 1.0f - 2.0f / (exp(size > 44.0f ? splat(88.0f) : 2.0f * size) + 1.0f);
  return size < 0.625f ? near : (x < 0.0f ? -far : far);
}

}  // namespace TRAPO_SET
}  // namespace trapo

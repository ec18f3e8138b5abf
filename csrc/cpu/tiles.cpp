// A GEMM with fp32 sums in tiles of registers. Operands are packed in cells of 32 bits: a pair of bf16, neighbours along k, which
// VDPBF16PS multiplies and adds to a float; or one float.
//
//   b, packed:  16 lines a strip, cell by cell     ┌ 3 strips ┐
//                                                  │ 48 wide  │ L2
//   a, packed:  16 lines a strip                   └──────────┘
//     ┌ 8 of a strip ┐ L1 ──── broadcast ───────▶  24 sums in registers, 8 × 48 of out
//
// Work: 2 M N K FLOP.
// Reads / writes: a task is a block of out, up to 256 rows and as many columns as keep its lines of b at 384 KiB; for every 512 cells of
//     k it packs both operands' lines (4 bytes written per cell, which is multiplied by 48 to 768 others), and every tile passes over
//     its piece of out once.
// Saved: nothing but out.
// On chip: as drawn, and 0.9 MiB of packed operands a thread.
// Order: k ascends within a sum, and so do the pieces of 512 cells; out has the same bits with any number of threads.
// Edges: lines, columns and k beyond the edge are zeros in the packed operands and are not stored.
//
// AMD EPYC (Zen 4), 2 cores, 256 rows, D = 896, V = 32768, GFLOP/s: logits 367, dHidden 349, dWeight 334 in bf16; oneDNN, which rounds
// its result to bf16: 406, 396, 281.

#include "tiles.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#if defined(__x86_64__) && (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 10))
#define TRAPO_TILES
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 about its own header (GCC bug 105593)
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

namespace trapo {

#if defined(TRAPO_TILES)
namespace {

#define TRAPO_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#define TRAPO_INLINE static inline __attribute__((always_inline)) TRAPO_TARGET

constexpr int64_t kStrip = 16;      // lines, one vector of cells
constexpr int64_t kTileRows = 8;    // and 3 strips: 24 sums, 3 vectors of b, 1 broadcast of a
constexpr int64_t kTileStrips = 3;
constexpr int64_t kDepth = 512;  // cells
constexpr int64_t kBlockRows = 256, kBlockBytes = 384 * 1024;
constexpr int64_t kTasksPerThread = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t unit) { return ceil_div(a, unit) * unit; }

TRAPO_INLINE __mmask16 first(int64_t count) { return static_cast<__mmask16>(count >= kStrip ? 0xffff : (1u << count) - 1); }

// 16 × 16 numbers of 32 bits: within lanes of 128 bits, then the lanes.
TRAPO_INLINE void transpose(__m512i* x) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  }
  constexpr int kEven = 0x88, kOdd = 0xdd;
  for (int i = 0; i < 4; ++i) {
    const __m512i upper_even = _mm512_shuffle_i32x4(x[i], x[i + 4], kEven), upper_odd = _mm512_shuffle_i32x4(x[i], x[i + 4], kOdd);
    const __m512i lower_even = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], kEven);
    const __m512i lower_odd = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], kOdd);
    y[i] = _mm512_shuffle_i32x4(upper_even, lower_even, kEven);
    y[i + 4] = _mm512_shuffle_i32x4(upper_odd, lower_odd, kEven);
    y[i + 8] = _mm512_shuffle_i32x4(upper_even, lower_even, kOdd);
    y[i + 12] = _mm512_shuffle_i32x4(upper_odd, lower_odd, kOdd);
  }
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

template <class T>
constexpr int64_t kPerCell = sizeof(uint32_t) / sizeof(T);

// 16 cells of a line, of its first `count` numbers.
TRAPO_INLINE __m512i load_cells(const uint16_t* x, int64_t count) {
  return _mm512_maskz_loadu_epi16(count >= 32 ? 0xffffffffu : (1u << count) - 1, x);
}

TRAPO_INLINE __m512i load_cells(const float* x, int64_t count) { return _mm512_maskz_loadu_epi32(first(count), x); }

// One cell of each of the lines from x on: of bf16 the number there and, if there is one, the next along k.
TRAPO_INLINE __m512i cell_of_lines(const uint16_t* x, int64_t leading, __mmask16 lines, bool whole) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lines, x));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(whole ? lines : 0, whole ? x + leading : x));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

TRAPO_INLINE __m512i cell_of_lines(const float* x, int64_t, __mmask16 lines, bool) { return _mm512_maskz_loadu_epi32(lines, x); }

template <class T>
TRAPO_INLINE __m512 multiply_add(__m512i left, __m512i right, __m512 sum) {
  if constexpr (sizeof(T) == 2) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  } else {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum);
  }
}

// One strip, `count` lines from x on: packed[cell · 16 + line].
template <class T>
TRAPO_TARGET void pack_strip_along_k(const T* x, int64_t leading, int64_t count, int64_t depth, uint32_t* packed) {
  for (int64_t k = 0; k < depth; k += 16 * kPerCell<T>) {
    const int64_t left = depth - k;
    __m512i cells[16];
    for (int i = 0; i < 16; ++i) cells[i] = i < count ? load_cells(x + i * leading + k, left) : _mm512_setzero_si512();
    transpose(cells);
    const int64_t kept = std::min<int64_t>(16, ceil_div(left, kPerCell<T>));
    for (int64_t i = 0; i < kept; ++i) _mm512_storeu_si512(packed + (k / kPerCell<T> + i) * kStrip, cells[i]);
  }
}

template <class T>
TRAPO_TARGET void pack_strip_across_k(const T* x, int64_t leading, int64_t count, int64_t depth, uint32_t* packed) {
  const __mmask16 lines = first(count);
  for (int64_t k = 0; k < depth; k += kPerCell<T>, packed += kStrip) {
    _mm512_storeu_si512(packed, cell_of_lines(x + k * leading, leading, lines, k + 1 < depth));
  }
}

// Strips of 16 lines, one after the other.
template <class T>
void pack(const Lines<T>& x, int64_t line, int64_t count, int64_t k, int64_t depth, uint32_t* packed) {
  for (int64_t i = 0; i < count; i += kStrip, packed += ceil_div(depth, kPerCell<T>) * kStrip) {
    const int64_t lines = std::min(kStrip, count - i);
    if (x.along_k) {
      pack_strip_along_k(x.data + (line + i) * x.leading + k, x.leading, lines, depth, packed);
    } else {
      pack_strip_across_k(x.data + k * x.leading + line + i, x.leading, lines, depth, packed);
    }
  }
}

// out [rows ≤ 8, columns ≤ 16 · strips] = beta · out + a · bᵀ of packed lines.
template <class T, int strips>
TRAPO_TARGET void tile(const uint32_t* a, const uint32_t* b, int64_t cells, float* out, int64_t leading, int64_t rows, int64_t columns,
                       float beta) {
  __m512 sum[kTileRows][strips];
  for (auto& row : sum) {
    for (__m512& x : row) x = _mm512_setzero_ps();
  }
  for (int64_t cell = 0; cell < cells; ++cell) {
    __m512i right[strips];
    for (int j = 0; j < strips; ++j) right[j] = _mm512_loadu_si512(b + (j * cells + cell) * kStrip);
    for (int i = 0; i < kTileRows; ++i) {
      const __m512i left = _mm512_set1_epi32(static_cast<int>(a[cell * kStrip + i]));
      for (int j = 0; j < strips; ++j) sum[i][j] = multiply_add<T>(left, right[j], sum[i][j]);
    }
  }
  for (int i = 0; i < kTileRows && i < rows; ++i) {
    for (int j = 0; j < strips; ++j) {
      const __mmask16 mask = first(columns - j * kStrip);
      float* to = out + i * leading + j * kStrip;
      const __m512 old = beta == 0.0f ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, to);
      _mm512_mask_storeu_ps(to, mask, _mm512_fmadd_ps(_mm512_set1_ps(beta), old, sum[i][j]));
    }
  }
}

// A block of out [rows, columns] from the packed lines of its rows and columns.
template <class T>
void block(const uint32_t* a, const uint32_t* b, int64_t cells, float* out, int64_t leading, int64_t rows, int64_t columns, float beta) {
  for (int64_t j = 0; j < columns; j += kTileStrips * kStrip) {
    const int64_t strips = std::min(kTileStrips, ceil_div(columns - j, kStrip));
    auto* of = strips == 3 ? &tile<T, 3> : strips == 2 ? &tile<T, 2> : &tile<T, 1>;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const uint32_t* left = a + i / kStrip * kStrip * cells + i % kStrip;
      of(left, b + j * cells, cells, out + i * leading + j, leading, rows - i, columns - j, beta);
    }
  }
}

// How a length is cut: into pieces of `size`, a multiple of a unit, the last one shorter.
struct Cut {
  int64_t size, count;

  Cut(int64_t total, int64_t pieces, int64_t unit) {
    size = std::max(unit, round_up(ceil_div(total, pieces), unit));
    count = std::max<int64_t>(1, ceil_div(total, size));
  }
};

// Columns in blocks whose lines of b fit into L2 and, with few of them, in as many as the threads share evenly.
Cut cut_columns(int64_t columns, int64_t row_blocks, int64_t cells) {
  const int64_t unit = kTileStrips * kStrip, most = std::max<int64_t>(unit, kBlockBytes / (sizeof(uint32_t) * cells) / unit * unit);
  const int64_t threads = torch::stable::get_num_threads();
  int64_t pieces = std::max<int64_t>(1, ceil_div(columns, most));
  while (pieces * row_blocks % threads != 0 && pieces * row_blocks < kTasksPerThread * threads && pieces * unit < columns) ++pieces;
  return {columns, pieces, kStrip};
}

}  // namespace

bool has_tiles() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16");
}

template <class T>
void tiles_gemm(const Lines<T>& a, const Lines<T>& b, float* out, int64_t leading, int64_t rows, int64_t columns, int64_t depth,
                float beta) {
  const Cut in_depth(depth, std::max<int64_t>(1, ceil_div(depth, kDepth * kPerCell<T>)), kStrip * kPerCell<T>);
  const Cut in_rows(rows, std::max<int64_t>(1, ceil_div(rows, kBlockRows)), kStrip);
  const int64_t most_cells = in_depth.size / kPerCell<T>;
  const Cut in_columns = cut_columns(columns, in_rows.count, most_cells);
  torch::stable::parallel_for(0, in_rows.count * in_columns.count, 1, [&](int64_t begin, int64_t end) {
    const auto a_packed = std::make_unique_for_overwrite<uint32_t[]>(in_rows.size * most_cells);
    const auto b_packed = std::make_unique_for_overwrite<uint32_t[]>(in_columns.size * most_cells);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task % in_rows.count * in_rows.size, column = task / in_rows.count * in_columns.size;
      const int64_t tall = std::min(in_rows.size, rows - row), wide = std::min(in_columns.size, columns - column);
      for (int64_t piece = 0; piece < in_depth.count; ++piece) {
        const int64_t k = piece * in_depth.size, deep = std::min(in_depth.size, depth - k);
        pack(a, row, tall, k, deep, a_packed.get());
        pack(b, column, wide, k, deep, b_packed.get());
        block<T>(a_packed.get(), b_packed.get(), ceil_div(deep, kPerCell<T>), out + row * leading + column, leading, tall, wide,
                 piece == 0 ? beta : 1.0f);
      }
    }
  });
}

#else

bool has_tiles() { return false; }

// Never called: gemm refuses where there are none.
template <class T>
void tiles_gemm(const Lines<T>&, const Lines<T>&, float*, int64_t, int64_t, int64_t, int64_t, float) {}

#endif

template void tiles_gemm(const Lines<uint16_t>&, const Lines<uint16_t>&, float*, int64_t, int64_t, int64_t, int64_t, float);
template void tiles_gemm(const Lines<float>&, const Lines<float>&, float*, int64_t, int64_t, int64_t, int64_t, float);

}  // namespace trapo

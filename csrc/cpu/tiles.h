// The products of csrc/cpu/gemm.h on a processor with AVX512_BF16 (VDPBF16PS): AMD since Zen 4, Intel's Cooper Lake.

#pragma once

#include <cstdint>

namespace trapo {

// A matrix of bf16 (uint16_t) or float as its lines, which are multiplied along k: element (line, k) at data[line · leading + k], or,
// not `along_k`, at data[k · leading + line].
template <class T>
struct Lines {
  const T* data;
  int64_t leading;
  bool along_k;
};

bool has_tiles();

// out [M, N] fp32, its rows `leading` apart, = beta · out + a · bᵀ for the lines a [M] and b [N] of length `depth`; with beta 0 `out`
// is not read. Every sum runs along k in the same order, however many threads, rows or columns there are.
template <class T>
void tiles_gemm(const Lines<T>& a, const Lines<T>& b, float* out, int64_t leading, int64_t rows, int64_t columns, int64_t depth,
                float beta);

}  // namespace trapo

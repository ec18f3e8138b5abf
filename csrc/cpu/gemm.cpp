// The bf16 GEMM of the MKL inside libtorch_cpu, or that of bf16_tiles.h.

#include "gemm.h"

#include <algorithm>
#include <climits>
#include <cstdint>
#include <utility>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#define TRAPO_MKL
#endif

#include "../checks.h"
#include "bf16_tiles.h"

#if defined(TRAPO_MKL)
// Weak: null with a torch built on another BLAS. MKL's integers are of 32 bits there; a value that fits reads the same from 64.
extern "C" void cblas_gemm_bf16bf16f32(int layout, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
                                       const void* a, int64_t lda, const void* b, int64_t ldb, float beta, float* c, int64_t ldc)
    __attribute__((weak));
#endif

namespace trapo {
namespace {

enum Cblas { kRowMajor = 101, kNoTranspose = 111, kTranspose = 112 };

struct Matrix {
  int64_t rows, columns, leading;  // distance of rows, or of columns where transposed
  bool transposed;

  Matrix flipped() const { return {columns, rows, leading, !transposed}; }
  Cblas order() const { return transposed ? kTranspose : kNoTranspose; }
};

Matrix check_matrix(const char* name, const Tensor& x, ScalarType dtype) {
  const char* op = "bf16_gemm";
  STD_TORCH_CHECK(x.dim() == 2, op, ": ", name, " must have two dimensions, got ", shape_of(x), ". Pass a matrix.");
  check_dtype(op, name, x, dtype);
  const int64_t rows = x.size(0), columns = x.size(1);
  const auto runs = [](int64_t length, int64_t stride, int64_t count, int64_t distance) {
    return (stride == 1 || length == 1) && (distance >= length || count == 1);
  };
  const bool in_rows = runs(columns, x.stride(1), rows, x.stride(0)), in_columns = runs(rows, x.stride(0), columns, x.stride(1));
  STD_TORCH_CHECK(in_rows || in_columns, op, ": ", name, " must have unit stride in a row or in a column, got strides ", x.stride(0),
                  " and ", x.stride(1), ". Pass ", name, ".contiguous().");
  const int64_t length = in_rows ? columns : rows, distance = in_rows ? x.stride(0) : x.stride(1);
  const int64_t leading = std::max<int64_t>({distance, length, 1});
  STD_TORCH_CHECK(rows <= INT_MAX && columns <= INT_MAX && leading <= INT_MAX, op, ": sizes and strides of ", name,
                  " must be below 2^31, got ", shape_of(x), " with strides ", x.stride(0), " and ", x.stride(1), ". Pass parts of it.");
  return {rows, columns, leading, !in_rows};
}

bool has_matrix_units() {
#if defined(TRAPO_MKL)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kOsXsave = 1u << 27, kTileState = 3u << 17;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsXsave)) return false;
  unsigned enabled, upper;
  __asm__("xgetbv" : "=a"(enabled), "=d"(upper) : "c"(0));
  if ((enabled & kTileState) != kTileState) return false;  // the system does not keep the tiles of a thread
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTile);
#else
  return false;
#endif
}

// Whether MKL's GEMM is there and drives matrix units; without them it is as slow as in fp32.
bool uses_mkl() {
#if defined(TRAPO_MKL)
  static const bool uses = &cblas_gemm_bf16bf16f32 != nullptr && has_matrix_units();
  return uses;
#else
  return false;
#endif
}

Bf16Lines lines_of(const void* data, const Matrix& x, bool along_k) {
  return {static_cast<const uint16_t*>(data), x.leading, along_k};
}

}  // namespace

std::string bf16_units() { return uses_mkl() ? "AMX" : has_bf16_tiles() ? "AVX512_BF16" : ""; }

void bf16_gemm(Tensor a_tensor, Tensor b_tensor, Tensor out_tensor, double beta) {
  const char* op = "bf16_gemm";
  STD_TORCH_CHECK(uses_mkl() || has_bf16_tiles(), op,
                  ": this needs a processor with AVX512_BF16, or one with AMX and a torch with MKL. Compute in float32 instead.");
  Matrix a = check_matrix("a", a_tensor, ScalarType::BFloat16), b = check_matrix("b", b_tensor, ScalarType::BFloat16);
  Matrix out = check_matrix("out", out_tensor, ScalarType::Float);
  STD_TORCH_CHECK(a.columns == b.rows && out.rows == a.rows && out.columns == b.columns, op,
                  ": out [M, N] must be a [M, K] times b [K, N], got ", shape_of(out_tensor), ", ", shape_of(a_tensor), " and ", shape_of(b_tensor), ". Transpose or cut them to fit.");
  if (out.rows == 0 || out.columns == 0) return;
  const void *left = a_tensor.const_data_ptr(), *right = b_tensor.const_data_ptr();
  if (out.transposed) {  // outᵀ = bᵀ · aᵀ, which lies in rows
    const Matrix first = b.flipped(), second = a.flipped();
    std::swap(left, right);
    a = first, b = second, out = out.flipped();
  }
  float* to = static_cast<float*>(out_tensor.mutable_data_ptr());
#if defined(TRAPO_MKL)
  if (uses_mkl()) {
    cblas_gemm_bf16bf16f32(kRowMajor, a.order(), b.order(), out.rows, out.columns, a.columns, 1.0f, left, a.leading, right, b.leading,
                           static_cast<float>(beta), to, out.leading);
    return;
  }
#endif
  bf16_tiles_gemm(lines_of(left, a, !a.transposed), lines_of(right, b, b.transposed), to, out.leading, out.rows, out.columns, a.columns,
                  static_cast<float>(beta));
}

}  // namespace trapo

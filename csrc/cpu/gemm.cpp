// The GEMM of tiles.h, or the bf16 one of the MKL inside libtorch_cpu.

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
#include "tiles.h"

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
  const char* op = "gemm";
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

template <class T>
void multiply_in_tiles(const void* left, const Matrix& a, const void* right, const Matrix& b, float beta, float* to, const Matrix& out) {
  const Lines<T> rows = {static_cast<const T*>(left), a.leading, !a.transposed};
  const Lines<T> columns = {static_cast<const T*>(right), b.leading, b.transposed};
  tiles_gemm(rows, columns, to, out.leading, out.rows, out.columns, a.columns, beta);
}

}  // namespace

std::string bf16_units() { return uses_mkl() ? "AMX" : has_tiles() ? "AVX512_BF16" : ""; }

void gemm(Tensor a_tensor, Tensor b_tensor, Tensor out_tensor, double beta) {
  const char* op = "gemm";
  const bool narrow = a_tensor.scalar_type() == ScalarType::BFloat16, in_mkl = narrow && uses_mkl();
  STD_TORCH_CHECK(in_mkl || has_tiles(), op, ": this needs a processor with AVX512_BF16 or, in bf16, one with AMX and a torch with MKL. ",
                  narrow ? "Compute in float32 instead." : "Call torch.mm instead.");
  const ScalarType dtype = narrow ? ScalarType::BFloat16 : ScalarType::Float;
  Matrix a = check_matrix("a", a_tensor, dtype), b = check_matrix("b", b_tensor, dtype);
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
  if (in_mkl) {
    cblas_gemm_bf16bf16f32(kRowMajor, a.order(), b.order(), out.rows, out.columns, a.columns, 1.0f, left, a.leading, right, b.leading,
                           static_cast<float>(beta), to, out.leading);
    return;
  }
#endif
  const auto in_tiles = narrow ? multiply_in_tiles<uint16_t> : multiply_in_tiles<float>;
  in_tiles(left, a, right, b, static_cast<float>(beta), to, out);
}

}  // namespace trapo

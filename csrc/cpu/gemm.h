// A GEMM of bf16 operands with fp32 sums and an fp32 result: what torch.mm offers on a GPU (out_dtype) and not on a CPU.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>

namespace trapo {

// What multiplies bf16 here: "AMX", by the GEMM of the MKL in this torch; "AVX512_BF16", by bf16_tiles.h; "" where nothing does.
std::string bf16_units();

// out = beta · out + a · b for a [M, K], b [K, N] in bf16 and out [M, N] in fp32; with beta 0 `out` is not read. Each has unit stride
// in a row or in a column.
void bf16_gemm(torch::stable::Tensor a, torch::stable::Tensor b, torch::stable::Tensor out, double beta);

}  // namespace trapo

// A GEMM with fp32 sums and an fp32 result. Of bf16 operands torch.mm offers it on a GPU (out_dtype) and not on a CPU; of fp32 ones it
// is there for processors that the GEMMs of torch do not know well.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>

namespace trapo {

// What multiplies bf16 here: "AMX", by the GEMM of the MKL in this torch; "AVX512_BF16", by tiles.h; "" where nothing does.
std::string bf16_units();

// out = beta · out + a · b for a [M, K], b [K, N], both bf16 or both fp32, and out [M, N] in fp32; with beta 0 `out` is not read. Each
// has unit stride in a row or in a column. fp32 needs what tiles.h does.
void gemm(torch::stable::Tensor a, torch::stable::Tensor b, torch::stable::Tensor out, double beta);

}  // namespace trapo

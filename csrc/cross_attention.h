// Masked cross-attention: what its launchers take.
//
//     s = scale q k^T over the keys of a row's interval        out = softmax(s) v
//
// Equations: xattn_kernels/reference.py.
#pragma once

#include <cuda_runtime_api.h>

#include "launch.h"
#include "types.cuh"

namespace xattn {

// [B, H, N, width] with a contiguous last dimension.
struct HeadTensor {
  void* data;
  int64_t strides[3];  // of B, H and N, in elements
};

// int32 [B, Nq], or null.
struct RowBounds {
  const int32_t* data;
  int64_t strides[2];
};

struct CrossAttentionShape {
  int32_t B, Hq, Hkv, Nq, Nk, D, Dv;
  DType dtype;  // float16 or bfloat16
  float scale;
};

// Rows of 16-byte chunks: D, Dv and all strides are multiples of 8, and data of 16 bytes.
struct CrossAttentionForwardParams {
  HeadTensor out;
  float* lse;  // [B, Hq, Nq], natural logarithm
  HeadTensor q, k, v;
  RowBounds start, stop;  // both or neither
  CrossAttentionShape shape;
};

cudaError_t CrossAttentionForward(const CrossAttentionForwardParams& params, Queue& queue);

}  // namespace xattn

// The interface of masked cross-attention: its params and its launchers.
//
//     s = softcap(scale q k^T) + bias    over the keys of a row's interval that the mask allows
//     p = softmax(s)          out = dropout(p) v          lse = log(sum(exp(s)))
//
// The equations are in xattn_kernels/reference.py. Head h of q reads the keys of head
// h / (Hq / Hkv).
//
// Pointers are to device memory that the caller owns. A null pointer stands for an input that a
// call does not have, or for a result that it does not want. Strides are in elements; an input that
// is broadcast along a dimension has stride 0 there. Results overlap nothing and are written
// completely. No launcher allocates or waits: each pushes its launches to the queue. docs/cpp.md
// says what is checked, and in which order to call these functions.
#pragma once

#include <cuda_runtime_api.h>

#include "launch.h"
#include "types.cuh"

namespace xattn {

// [B, H, N, width] with a contiguous last dimension, of the call's dtype.
struct HeadTensor {
  void* data;
  int64_t strides[3];  // of B, H and N
};

// int32 [B, Nq], or null.
struct RowBounds {
  const int32_t* data;
  int64_t strides[2];  // of B and Nq
};

// [B, Hq, Nq, Nk], or null.
struct PairTensor {
  const void* data;
  int64_t strides[4];
  DType dtype;  // of a bias; a mask has no dtype, as its elements are bytes or bits
};

// The largest number of packed rows of a key head, Nq * Hq / Hkv, and of keys. Kernels count them
// in int32, and their counters go past the end by one tile for each split.
constexpr int64_t kMostRows = (int64_t{1} << 31) - (1 << 17);

struct CrossAttentionShape {
  int32_t B, Hq, Hkv, Nq, Nk, D, Dv;  // all >= 1, D and Dv <= 256, Hq a multiple of Hkv
  DType dtype;                        // of every HeadTensor
};

struct CrossAttentionCall {
  HeadTensor q, k, v;
  // A row sees the keys start <= j < stop that are in [0, Nk). A call has both bounds or neither.
  RowBounds start, stop;
  PairTensor mask;  // bytes, of which 0 forbids a key, or bits
  PairTensor bias;
  Numbers scales;        // [Hq], or one number; if not null, it takes the place of `scale`
  int64_t scale_stride;  // from one head's scale to the next one's; 0 if there is one number
  const int64_t* seed;   // one number, or null if there is no dropout
  uint64_t threshold;    // dropout_p * 2^32, rounded
  float scale;
  float softcap;     // 0 stands for no softcap
  float keep_scale;  // 1 / (1 - dropout_p), which is 1 without dropout
  CrossAttentionShape shape;
  // The mask has the words [B, Hq, Nq, ceil(Nk / 32)] of topk_attention.h, with a contiguous last
  // dimension.
  bool mask_is_bits;
  // Launchers set this if the rows of q, k, v and dout begin at multiples of 16 bytes.
  bool aligned;
};

struct CrossAttentionForwardParams {
  HeadTensor out;
  float* lse;      // [B, Hq, Nq], contiguous, as are the next three, which may be null
  float* lse_low;  // (lse - float32(lse)) * log2(e), for the backward of a bias
  float *entropy, *max_probability;  // A call has both or neither.
  float* parts;                      // workspace of CrossAttentionForwardParts(params) floats
  CrossAttentionCall call;
  int32_t n_splits;  // the number of blocks, >= 1, that share the keys of a tile of rows
};

// A gradient that the caller does not want is null; dk and dv are wanted together. out, dout and
// lse are never null.
struct CrossAttentionBackwardParams {
  HeadTensor dq, dk, dv;
  float* dscale;  // [dq_splits, B, Hq, Nq], <q, dq> / scale per row, which the caller sums
  float* dbias;   // [dbias_splits, *bias_sizes], which the caller sums over the splits
  HeadTensor out, dout;
  const float *lse, *lse_low;    // as the forward wrote them
  const float *dlse, *dentropy;  // [B, Hq, Nq], or null for 0
  const float* entropy;          // as the forward wrote it; it may be null if dentropy is
  float* parts;  // workspace of CrossAttentionBackwardParts(params) floats, aligned to 16 bytes
  CrossAttentionCall call;
  int32_t dq_splits, dkdv_splits, dbias_splits;
  int32_t bias_sizes[4];  // the sizes of the bias, each 1 or that of [B, Hq, Nq, Nk]
};

// The number of blocks that should share each loop, so that all multiprocessors of a device have
// work. The second function sets the three numbers of the backward, and reads bias_sizes if there
// is a bias. Results are right for every number >= 1.
int32_t CrossAttentionForwardSplits(const CrossAttentionCall& call, int32_t multiprocessors);
void CrossAttentionBackwardSplits(CrossAttentionBackwardParams& params, int32_t multiprocessors);

// The number of floats that `parts` needs, which depends on the splits and, in the backward, on the
// gradients that are wanted.
int64_t CrossAttentionForwardParts(const CrossAttentionForwardParams& params);
int64_t CrossAttentionBackwardParts(const CrossAttentionBackwardParams& params);

// Both return cudaErrorInvalidValue before they push anything if a size or a number of splits is
// not valid, and else the first error of the queue.
cudaError_t CrossAttentionForward(const CrossAttentionForwardParams& params, Queue& queue);
cudaError_t CrossAttentionBackward(const CrossAttentionBackwardParams& params, Queue& queue);

}  // namespace xattn

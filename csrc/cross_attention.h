// Masked cross-attention: what its launchers take.
//
//     s = softcap(scale q k^T) + bias over the keys of a row's interval that the mask allows
//     p = softmax(s)          out = dropout(p) v          lse = log(sum(exp(s)))
//
// Equations: xattn_kernels/reference.py. Head h of q reads the keys of head h / (Hq / Hkv). What a
// launcher may not find is null. Nothing here allocates or waits: launches go to the queue, and
// memory is the caller's.
#pragma once

#include <cuda_runtime_api.h>

#include "launch.h"
#include "types.cuh"

namespace xattn {

// [B, H, N, width] with a contiguous last dimension, of the call's dtype.
struct HeadTensor {
  void* data;
  int64_t strides[3];  // of B, H and N, in elements
};

// int32 [B, Nq], or null.
struct RowBounds {
  const int32_t* data;
  int64_t strides[2];
};

// [B, Hq, Nq, Nk], or null; a stride is 0 where the tensor is broadcast.
struct PairTensor {
  const void* data;
  int64_t strides[4];
  DType dtype;  // of a bias; a mask has bytes
};

struct CrossAttentionShape {
  int32_t B, Hq, Hkv, Nq, Nk, D, Dv;  // D and Dv from 1 to 256
  DType dtype;
};

struct CrossAttentionCall {
  HeadTensor q, k, v;
  RowBounds start, stop;  // both or neither; keys start <= j < stop, clamped to [0, Nk]
  PairTensor mask;        // bytes, 0 forbids; or bits
  PairTensor bias;
  Numbers scales;        // of each head, or one, in place of `scale`
  int64_t scale_stride;  // in elements, 0 for one
  const int64_t* seed;   // one number, of dropout
  uint64_t threshold;    // dropout_p 2^32, rounded
  float scale;
  float softcap;     // 0 for none
  float keep_scale;  // 1 / (1 - dropout_p)
  CrossAttentionShape shape;
  bool mask_is_bits;  // [B, Hq, Nq, ceil(Nk / 32)] words, of topk_attention.h
  bool aligned;       // set by launchers: rows of q, k, v and dout begin at multiples of 16 bytes
};

struct CrossAttentionForwardParams {
  HeadTensor out;
  float* lse;  // [B, Hq, Nq], as the three below, which may be null
  float* lse_low;
  float *entropy, *max_probability;
  float* parts;  // CrossAttentionForwardParts(params) floats
  CrossAttentionCall call;
  int32_t n_splits;  // blocks that share the keys of a tile of rows, from 1
};

// Results and gradients are null where nobody asks for them; dk and dv come together.
struct CrossAttentionBackwardParams {
  HeadTensor dq, dk, dv;
  float* dscale;  // [dq_splits, B, Hq, Nq], <q, dq> / scale of each row
  float* dbias;   // [dbias_splits, *bias_sizes], to be summed over splits
  HeadTensor out, dout;
  const float *lse, *lse_low;    // as the forward wrote them
  const float *dlse, *dentropy;  // [B, Hq, Nq], or null for 0
  const float* entropy;          // needed with dentropy
  float* parts;                  // CrossAttentionBackwardParts(params) floats
  CrossAttentionCall call;
  int32_t dq_splits, dkdv_splits, dbias_splits;
  int32_t bias_sizes[4];  // of dbias, each 1 or that of [B, Hq, Nq, Nk]
};

// How many blocks should share each loop, so that `multiprocessors` of a device have work.
int32_t CrossAttentionForwardSplits(const CrossAttentionCall& call, int32_t multiprocessors);
void CrossAttentionBackwardSplits(CrossAttentionBackwardParams& params, int32_t multiprocessors);

int64_t CrossAttentionForwardParts(const CrossAttentionForwardParams& params);
int64_t CrossAttentionBackwardParts(const CrossAttentionBackwardParams& params);

cudaError_t CrossAttentionForward(const CrossAttentionForwardParams& params, Queue& queue);
cudaError_t CrossAttentionBackward(const CrossAttentionBackwardParams& params, Queue& queue);

}  // namespace xattn

// Masked cross-attention: what its launchers take.
//
//     s = softcap(scale q k^T) + bias over the keys of a row's interval that the mask allows
//     p = softmax(s)          out = dropout(p) v          lse = log(sum(exp(s)))
//
// Equations: xattn_kernels/reference.py. Head h of q reads the keys of head h / (Hq / Hkv).
//
// Pointers are of device memory that the caller owns, and null for what a call has not or does not
// want; strides are in elements, 0 where an input is broadcast. Results overlap nothing and are
// written completely. Nothing here allocates or waits: launches go to the queue. docs/cpp.md has
// what is checked and the order of calls.
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
  DType dtype;  // of a bias; a mask has bytes
};

// Of a key head's queries, Nq * Hq / Hkv, and of Nk: counted in int32, beyond the last by a tile
// for each split.
constexpr int64_t kMostRows = (int64_t{1} << 31) - (1 << 17);

struct CrossAttentionShape {
  int32_t B, Hq, Hkv, Nq, Nk, D, Dv;  // from 1 on, D and Dv to 256; Hq a multiple of Hkv
  DType dtype;                        // of every HeadTensor
};

struct CrossAttentionCall {
  HeadTensor q, k, v;
  RowBounds start, stop;  // both or neither; keys start <= j < stop, clamped to [0, Nk]
  PairTensor mask;        // bytes, 0 forbids; or bits
  PairTensor bias;
  Numbers scales;        // of each q head, or one, in place of `scale`
  int64_t scale_stride;  // 0 for one
  const int64_t* seed;   // one number, or null without dropout
  uint64_t threshold;    // dropout_p 2^32, rounded
  float scale;
  float softcap;     // 0 for none
  float keep_scale;  // 1 / (1 - dropout_p), so 1 without dropout
  CrossAttentionShape shape;
  bool mask_is_bits;  // words [B, Hq, Nq, ceil(Nk / 32)] of topk_attention.h, the last contiguous
  bool aligned;       // set by launchers: rows of q, k, v and dout begin at multiples of 16 bytes
};

struct CrossAttentionForwardParams {
  HeadTensor out;
  float* lse;      // [B, Hq, Nq], contiguous as the three below, which may be null
  float* lse_low;  // what float32 cannot hold of lse, times log2(e): for the backward of a bias
  float *entropy, *max_probability;  // both or neither
  float* parts;                      // CrossAttentionForwardParts(params) floats
  CrossAttentionCall call;
  int32_t n_splits;  // blocks that share the keys of a tile of rows, from 1
};

// Gradients are null where nobody asks for them; dk and dv come together. out, dout and lse are
// always needed.
struct CrossAttentionBackwardParams {
  HeadTensor dq, dk, dv;
  float* dscale;  // [dq_splits, B, Hq, Nq], <q, dq> / scale of each row: to be summed
  float* dbias;   // [dbias_splits, *bias_sizes], to be summed over splits
  HeadTensor out, dout;
  const float *lse, *lse_low;    // as the forward wrote them
  const float *dlse, *dentropy;  // [B, Hq, Nq], or null for 0
  const float* entropy;          // as the forward wrote it; needed with dentropy
  float* parts;                  // CrossAttentionBackwardParts(params) floats, from 16 bytes on
  CrossAttentionCall call;
  int32_t dq_splits, dkdv_splits, dbias_splits;
  int32_t bias_sizes[4];  // with a bias: its own, each 1 or that of [B, Hq, Nq, Nk]
};

// How many blocks should share each loop, so that `multiprocessors` of a device have work. Of the
// backward it sets the three numbers, for a bias by bias_sizes. Any numbers from 1 on are right.
int32_t CrossAttentionForwardSplits(const CrossAttentionCall& call, int32_t multiprocessors);
void CrossAttentionBackwardSplits(CrossAttentionBackwardParams& params, int32_t multiprocessors);

// How many floats `parts` needs, of these splits and, backward, of the gradients that are wanted.
int64_t CrossAttentionForwardParts(const CrossAttentionForwardParams& params);
int64_t CrossAttentionBackwardParts(const CrossAttentionBackwardParams& params);

// cudaErrorInvalidValue, before anything is pushed, for a shape or splits that are none; else the
// first error of the queue.
cudaError_t CrossAttentionForward(const CrossAttentionForwardParams& params, Queue& queue);
cudaError_t CrossAttentionBackward(const CrossAttentionBackwardParams& params, Queue& queue);

}  // namespace xattn

// Top-k attention: the choice of keys. What is chosen is attended to by the launchers of
// cross_attention.h, with the choice as their mask.
//
// A row chooses its top_k highest scores among the allowed keys, all of them where there are fewer;
// of equal scores that of the lower key, and NaN before any number.
#pragma once

#include "cross_attention.h"

namespace xattn {

struct TopKSelectionParams {
  uint32_t* bits;           // [B, Hq, Nq, ceil(Nk / 32)]: bit j % 32 of word j / 32 is key j's
  CrossAttentionCall call;  // q, k and what scores need; v is not read, but Dv is a width
  int32_t top_k;            // from 1
};

// One form of a choice, of at most top_k keys in a row, from the other.
struct TopKIndicesParams {
  int32_t* indices;  // [rows, top_k], ascending, then -1
  uint32_t* bits;    // [rows, ceil(Nk / 32)]
  int64_t rows;
  int32_t Nk, top_k;
  bool to_bits;  // or else to indices
};

// Errors as those of CrossAttentionForward.
cudaError_t TopKSelection(const TopKSelectionParams& params, Queue& queue);
cudaError_t TopKIndices(const TopKIndicesParams& params, Queue& queue);

}  // namespace xattn

// The interface of the choice of keys in top-k attention. The launchers of cross_attention.h then
// attend to the chosen keys, with the choice as their mask.
//
// A row chooses the top_k allowed keys with the highest scores, or all allowed keys if there are
// fewer. Of equal scores it takes those of the lower keys. NaN counts as higher than every number.
#pragma once

#include "cross_attention.h"

namespace xattn {

struct TopKSelectionParams {
  uint32_t* bits;           // [B, Hq, Nq, ceil(Nk / 32)]; key j has bit j % 32 of word j / 32
  CrossAttentionCall call;  // v is not read, but Dv must be a valid width.
  int32_t top_k;            // >= 1
};

// A choice of at most top_k keys per row in two forms, of which one is computed from the other.
struct TopKIndicesParams {
  int32_t* indices;  // [rows, top_k], ascending and filled up with -1
  uint32_t* bits;    // [rows, ceil(Nk / 32)]
  int64_t rows;
  int32_t Nk, top_k;
  bool to_bits;  // Bits are computed from indices if true, and else indices from bits.
};

// Errors are those of CrossAttentionForward.
cudaError_t TopKSelection(const TopKSelectionParams& params, Queue& queue);
cudaError_t TopKIndices(const TopKIndicesParams& params, Queue& queue);

}  // namespace xattn

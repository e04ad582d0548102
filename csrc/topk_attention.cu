// Launchers of the choice of keys in top-k attention.
#include "attention_launch.h"
#include "topk_attention.cuh"

namespace xattn {

cudaError_t TopKSelection(const TopKSelectionParams& given, Queue& queue) {
  TopKSelectionParams params = given;
  const CrossAttentionShape& s = params.call.shape;
  if (!IsValid(params.call) || params.top_k < 1) return cudaErrorInvalidValue;
  params.call.aligned = QAndKAreAligned(params.call);
  return WithKernel(s, [&](auto kernel) {
    using T = typename decltype(kernel)::Element;
    constexpr int kWidth = decltype(kernel)::kWidth;
    using Block = SelectionBlock<T, kWidth>;
    const Grid grid(CeilDiv(int64_t{s.Nq} * Group(s), Block::kRows) * s.Hkv * s.B);
    return Launch<topk_selection_kernel<T, kWidth>>(queue, grid, Block::kThreads, Block::kBytes,
                                                    params);
  });
}

cudaError_t TopKIndices(const TopKIndicesParams& params, Queue& queue) {
  if (params.rows < 1 || params.Nk < 1 || params.top_k < 1) return cudaErrorInvalidValue;
  return Launch<topk_indices_kernel>(queue, CeilDiv(params.rows, kIndexWarps),
                                     kIndexWarps * kWarpSize, 0, params);
}

}  // namespace xattn

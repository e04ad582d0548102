// Launchers of masked cross-attention, forward.
#include "attention_launch.h"
#include "cross_attention.cuh"

namespace xattn {

int32_t CrossAttentionForwardSplits(const CrossAttentionCall& call, int32_t multiprocessors) {
  const CrossAttentionShape& s = call.shape;
  if (!IsValid(call)) return 1;
  return WithKernel(s, [&](auto kernel) {
    using Block = AttentionBlock<typename decltype(kernel)::Element, decltype(kernel)::kWidth>;
    const int64_t blocks = CeilDiv(int64_t{s.Nq} * Group(s), Block::kRows) * s.Hkv * s.B;
    return Splits(blocks, CeilDiv(s.Nk, Block::kKeys), multiprocessors);
  });
}

int64_t CrossAttentionForwardParts(const CrossAttentionForwardParams& params) {
  const CrossAttentionShape& s = params.call.shape;
  if (!IsValid(params.call) || params.n_splits < 2) return 0;
  return int64_t{params.n_splits} * s.B * s.Hq * s.Nq * (s.Dv + 4);
}

cudaError_t CrossAttentionForward(const CrossAttentionForwardParams& given, Queue& queue) {
  CrossAttentionForwardParams params = given;
  const CrossAttentionShape& s = params.call.shape;
  if (!IsValid(params.call) || params.n_splits < 1 ||
      !AreBoth(params.entropy, params.max_probability))
    return cudaErrorInvalidValue;
  params.call.aligned = IsAligned(params.call);
  const bool plain = IsPlain(params.call) && params.entropy == nullptr;
  return WithKernel(s, [&](auto kernel) {
    using T = typename decltype(kernel)::Element;
    constexpr int kWidth = decltype(kernel)::kWidth;
    using Block = AttentionBlock<T, kWidth>;
    const int64_t tiles = CeilDiv(int64_t{s.Nq} * Group(s), Block::kRows);
    const Grid grid(tiles * s.Hkv * s.B * params.n_splits);
    constexpr size_t kShared =
        Tile<T, Block::kRows, kWidth>::kBytes + ForwardKeys<T, kWidth>::kBytes;
    const cudaError_t error = WithPlain<T>(params.call, plain, [&](auto is_plain) {
      return Launch<cross_attention_forward_kernel<T, kWidth, is_plain>>(
          queue, grid, Block::kThreads, kShared, params);
    });
    if (error != cudaSuccess || params.n_splits == 1) return error;
    const Grid rows(CeilDiv(int64_t{s.B} * s.Hq * s.Nq, kMergeWarps));
    return Launch<merge_kernel<T>>(queue, rows, kMergeWarps * kWarpSize, 0, params);
  });
}

}  // namespace xattn

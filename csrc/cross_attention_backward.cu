// Launchers of masked cross-attention, backward.
#include "attention_launch.h"
#include "bias_gradient.cuh"
#include "cross_attention_backward.cuh"

namespace xattn {
namespace {

bool IsValid(const CrossAttentionBackwardParams& p) {
  const bool bias_fits = p.call.bias.data == nullptr
                             ? p.dbias == nullptr
                             : *std::min_element(p.bias_sizes, p.bias_sizes + 4) > 0;
  return IsValid(p.call) && bias_fits && AreBoth(p.dk.data, p.dv.data) &&
         (p.dentropy == nullptr || p.entropy != nullptr) &&
         std::min({p.dq_splits, p.dkdv_splits, p.dbias_splits}) > 0;
}

int64_t RowTiles(const CrossAttentionShape& s, int rows) {
  return CeilDiv(int64_t{s.Nq} * Group(s), rows);
}

// The places of the parts in `parts`, and how many floats they are together.
int64_t Layout(const CrossAttentionBackwardParams& p, BackwardParts& parts) {
  const CrossAttentionShape& s = p.call.shape;
  const int64_t rows = int64_t{s.B} * s.Hq * s.Nq, keys = int64_t{s.B} * s.Hkv * s.Nk;
  const int64_t bounds = WithKernel(s, [&](auto kernel) {
    using Block = AttentionBlock<typename decltype(kernel)::Element, decltype(kernel)::kWidth>;
    return s.B * RowTiles(s, Block::kPassingRows) * 4;
  });
  int64_t at = 0;
  const auto take = [&](int64_t n) {
    float* place = p.parts + at;
    at += n;
    return place;
  };
  // 16 bytes to a bound
  parts.bounds = reinterpret_cast<int4*>(take(p.call.start.data == nullptr ? 0 : bounds));
  parts.lse = take(rows);
  parts.minus_delta = take(rows);
  const bool dq = p.dq.data != nullptr && p.dq_splits > 1, dkdv = p.dkdv_splits > 1;
  parts.dq = take(dq ? p.dq_splits * rows * s.D : 0);
  parts.dk = take(dkdv && p.dk.data != nullptr ? p.dkdv_splits * keys * s.D : 0);
  parts.dv = take(dkdv && p.dk.data != nullptr ? p.dkdv_splits * keys * s.Dv : 0);
  return at;
}

template <class T, int WIDTH>
struct Backward {
  using Block = AttentionBlock<T, WIDTH>;
  const BackwardCall& call;
  Queue& queue;
  const CrossAttentionBackwardParams& p = call.p;
  const CrossAttentionShape& s = call.p.call.shape;
  bool plain;

  // Two tiles of rows that stay, and the pairs of tiles that pass by.
  template <int ROWS>
  static constexpr size_t Shared(int stages) {
    return 2 * Tile<T, Block::kRows, WIDTH>::kBytes + 2 * stages * Tile<T, ROWS, WIDTH>::kBytes;
  }

  cudaError_t Run() const {
    cudaError_t error = WithPlain<T>(p.call, plain, [&](auto is_plain) {
      const Grid grid(CeilDiv(int64_t{s.B} * s.Hq * s.Nq, kTermWarps));
      return Launch<row_terms_kernel<T, is_plain>>(queue, grid, kTermWarps * kWarpSize, 0, call);
    });
    if (error == cudaSuccess && (p.dq.data != nullptr || p.dscale != nullptr)) error = Dq();
    if (error == cudaSuccess && p.dk.data != nullptr) error = DkDv();
    if (error == cudaSuccess && p.dbias != nullptr) error = DBias();
    return error;
  }

  cudaError_t Dq() const {
    const Grid grid(RowTiles(s, Block::kRows) * s.Hkv * s.B * p.dq_splits);
    const cudaError_t error = WithPlain<T>(p.call, plain, [&](auto is_plain) {
      return Launch<dq_kernel<T, WIDTH, is_plain>>(queue, grid, Block::kThreads,
                                                   Shared<Block::kKeys>(Block::kStages), call);
    });
    if (error != cudaSuccess || p.dq.data == nullptr) return error;
    return Sum(p.dq, call.parts.dq, s.Hq, s.Nq, s.D, p.dq_splits);
  }

  cudaError_t DkDv() const {
    constexpr int kRows = Block::kPassingRows;
    if (p.call.start.data != nullptr) {
      const Grid grid(CeilDiv(s.B * RowTiles(s, kRows), kTermWarps));
      const cudaError_t error =
          Launch<tile_bounds_kernel<kRows>>(queue, grid, kTermWarps * kWarpSize, 0, call);
      if (error != cudaSuccess) return error;
    }
    cudaError_t error = WithPlain<T>(p.call, plain, [&](auto is_plain) {
      if constexpr (WIDTH <= 128) {
        return LaunchDkDv<is_plain, true, true>();
      } else {
        const cudaError_t first = LaunchDkDv<is_plain, true, false>();
        return first == cudaSuccess ? LaunchDkDv<is_plain, false, true>() : first;
      }
    });
    if (error == cudaSuccess) error = Sum(p.dk, call.parts.dk, s.Hkv, s.Nk, s.D, p.dkdv_splits);
    if (error == cudaSuccess) error = Sum(p.dv, call.parts.dv, s.Hkv, s.Nk, s.Dv, p.dkdv_splits);
    return error;
  }

  template <bool PLAIN, bool DK, bool DV>
  cudaError_t LaunchDkDv() const {
    constexpr int kRows = Block::kPassingRows, kStages = Block::kStages;
    constexpr size_t kShared = Shared<kRows>(kStages) + PassingTerms<kRows, kStages>::kBytes;
    const Grid grid(CeilDiv(s.Nk, Block::kRows) * s.Hkv * s.B * p.dkdv_splits);
    return Launch<dkdv_kernel<T, WIDTH, PLAIN, DK, DV>>(queue, grid, Block::kThreads, kShared,
                                                        call);
  }

  cudaError_t DBias() const {
    const Grid grid(BiasWalk<T, WIDTH>(p).own * p.dbias_splits);
    return Launch<dbias_kernel<T, WIDTH>>(queue, grid, Block::kThreads, Shared<Block::kKeys>(1),
                                          call);
  }

  cudaError_t Sum(const HeadTensor& to, const float* parts, int H, int N, int width,
                  int n_splits) const {
    if (n_splits == 1) return cudaSuccess;
    const int64_t n = int64_t{s.B} * H * N * width;
    const SumCall sum{to, parts, n, H, N, width, n_splits};
    return Launch<sum_splits_kernel<T>>(queue, CeilDiv(n, kSumThreads), kSumThreads, 0, sum);
  }
};

}  // namespace

void CrossAttentionBackwardSplits(CrossAttentionBackwardParams& p, int32_t multiprocessors) {
  const CrossAttentionShape& s = p.call.shape;
  p.dq_splits = p.dkdv_splits = p.dbias_splits = 1;
  if (!IsValid(p)) return;
  WithKernel(s, [&](auto kernel) {
    using T = typename decltype(kernel)::Element;
    constexpr int kWidth = decltype(kernel)::kWidth;
    using Block = AttentionBlock<T, kWidth>;
    const int64_t heads = int64_t{s.B} * s.Hkv, key_tiles = CeilDiv(s.Nk, Block::kKeys);
    p.dq_splits = Splits(RowTiles(s, Block::kRows) * heads, key_tiles, multiprocessors);
    p.dkdv_splits = Splits(CeilDiv(s.Nk, Block::kRows) * heads, RowTiles(s, Block::kPassingRows),
                           multiprocessors);
    if (p.call.bias.data == nullptr) return 0;
    const BiasWalk<T, kWidth> walk(p);
    p.dbias_splits = Splits(walk.own, walk.terms(), multiprocessors);
    return 0;
  });
}

int64_t CrossAttentionBackwardParts(const CrossAttentionBackwardParams& params) {
  BackwardParts parts;
  return IsValid(params) ? Layout(params, parts) : 0;
}

cudaError_t CrossAttentionBackward(const CrossAttentionBackwardParams& params, Queue& queue) {
  BackwardCall call{params, {}};
  CrossAttentionBackwardParams& p = call.p;
  const CrossAttentionShape& s = p.call.shape;
  if (!IsValid(p)) return cudaErrorInvalidValue;
  Layout(p, call.parts);
  p.call.aligned = IsAligned(p.call) && IsAligned(p.dout, s.B, s.Hq, s.Nq, s.dtype);
  const bool plain = IsPlain(p.call) && p.dentropy == nullptr;
  return WithKernel(s, [&](auto kernel) {
    using Kernel = decltype(kernel);
    return Backward<typename Kernel::Element, Kernel::kWidth>{call, queue, call.p, s, plain}.Run();
  });
}

}  // namespace xattn

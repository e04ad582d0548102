// Launchers of masked cross-attention, backward.
#include "attention_launch.h"
#include "bias_gradient.cuh"
#include "cross_attention_backward.cuh"

namespace xattn {
namespace {

bool IsValid(const CrossAttentionBackwardParams& params) {
  const bool bias_fits = params.call.bias.data == nullptr
                             ? params.dbias == nullptr
                             : *std::min_element(params.bias_sizes, params.bias_sizes + 4) > 0;
  return IsValid(params.call) && bias_fits && AreBoth(params.dk.data, params.dv.data) &&
         (params.dentropy == nullptr || params.entropy != nullptr) &&
         std::min({params.dq_splits, params.dkdv_splits, params.dbias_splits}) > 0;
}

int64_t RowTiles(const CrossAttentionShape& s, int rows) {
  return CeilDiv(int64_t{s.Nq} * Group(s), rows);
}

// Sets the pointers of `parts` to their places in params.parts, and returns how many floats they
// take together.
int64_t Layout(const CrossAttentionBackwardParams& params, BackwardParts& parts) {
  const CrossAttentionShape& s = params.call.shape;
  const int64_t rows = int64_t{s.B} * s.Hq * s.Nq, keys = int64_t{s.B} * s.Hkv * s.Nk;
  const int64_t bounds = WithKernel(s, [&](auto kernel) {
    using Block = AttentionBlock<typename decltype(kernel)::Element, decltype(kernel)::kWidth>;
    return s.B * RowTiles(s, Block::kPassingRows) * 4;
  });
  int64_t n_floats = 0;
  const auto take = [&](int64_t n) {
    float* part = params.parts + n_floats;
    n_floats += n;
    return part;
  };
  // A bound takes the place of four floats. Bounds come first, as they must be aligned to 16 bytes.
  parts.bounds = reinterpret_cast<int4*>(take(params.call.start.data == nullptr ? 0 : bounds));
  parts.lse = take(rows);
  parts.minus_delta = take(rows);
  const bool dq = params.dq.data != nullptr && params.dq_splits > 1, dkdv = params.dkdv_splits > 1;
  parts.dq = take(dq ? params.dq_splits * rows * s.D : 0);
  parts.dk = take(dkdv && params.dk.data != nullptr ? params.dkdv_splits * keys * s.D : 0);
  parts.dv = take(dkdv && params.dk.data != nullptr ? params.dkdv_splits * keys * s.Dv : 0);
  return n_floats;
}

template <class T, int WIDTH>
struct Backward {
  using Block = AttentionBlock<T, WIDTH>;
  const BackwardCall& call;
  Queue& queue;
  const CrossAttentionBackwardParams& params = call.params;
  const CrossAttentionShape& s = call.params.call.shape;
  bool plain;

  // The bytes of two tiles of staying rows, and of the pairs of passing tiles.
  template <int ROWS>
  static constexpr size_t Shared(int stages) {
    return 2 * Tile<T, Block::kRows, WIDTH>::kBytes + 2 * stages * Tile<T, ROWS, WIDTH>::kBytes;
  }

  cudaError_t Run() const {
    cudaError_t error = WithPlain<T>(params.call, plain, [&](auto is_plain) {
      const Grid grid(CeilDiv(int64_t{s.B} * s.Hq * s.Nq, kTermWarps));
      return Launch<row_terms_kernel<T, is_plain>>(queue, grid, kTermWarps * kWarpSize, 0, call);
    });
    if (error == cudaSuccess && (params.dq.data != nullptr || params.dscale != nullptr))
      error = Dq();
    if (error == cudaSuccess && params.dk.data != nullptr) error = DkDv();
    if (error == cudaSuccess && params.dbias != nullptr) error = DBias();
    return error;
  }

  cudaError_t Dq() const {
    const Grid grid(RowTiles(s, Block::kRows) * s.Hkv * s.B * params.dq_splits);
    const cudaError_t error = WithPlain<T>(params.call, plain, [&](auto is_plain) {
      return Launch<dq_kernel<T, WIDTH, is_plain>>(queue, grid, Block::kThreads,
                                                   Shared<Block::kKeys>(Block::kStages), call);
    });
    if (error != cudaSuccess || params.dq.data == nullptr) return error;
    return Sum(params.dq, call.parts.dq, s.Hq, s.Nq, s.D, params.dq_splits);
  }

  cudaError_t DkDv() const {
    constexpr int kRows = Block::kPassingRows;
    if (params.call.start.data != nullptr) {
      const Grid grid(CeilDiv(s.B * RowTiles(s, kRows), kTermWarps));
      const cudaError_t error =
          Launch<tile_bounds_kernel<kRows>>(queue, grid, kTermWarps * kWarpSize, 0, call);
      if (error != cudaSuccess) return error;
    }
    cudaError_t error = WithPlain<T>(params.call, plain, [&](auto is_plain) {
      if constexpr (WIDTH <= 128) {
        return LaunchDkDv<is_plain, true, true>();
      } else {
        const cudaError_t first = LaunchDkDv<is_plain, true, false>();
        return first == cudaSuccess ? LaunchDkDv<is_plain, false, true>() : first;
      }
    });
    if (error == cudaSuccess)
      error = Sum(params.dk, call.parts.dk, s.Hkv, s.Nk, s.D, params.dkdv_splits);
    if (error == cudaSuccess)
      error = Sum(params.dv, call.parts.dv, s.Hkv, s.Nk, s.Dv, params.dkdv_splits);
    return error;
  }

  template <bool PLAIN, bool DK, bool DV>
  cudaError_t LaunchDkDv() const {
    constexpr int kRows = Block::kPassingRows, kStages = Block::kStages;
    constexpr size_t kShared = Shared<kRows>(kStages) + PassingTerms<kRows, kStages>::kBytes;
    const Grid grid(CeilDiv(s.Nk, Block::kRows) * s.Hkv * s.B * params.dkdv_splits);
    return Launch<dkdv_kernel<T, WIDTH, PLAIN, DK, DV>>(queue, grid, Block::kThreads, kShared,
                                                        call);
  }

  cudaError_t DBias() const {
    const Grid grid(BiasWalk<T, WIDTH>(params).n_tiles * params.dbias_splits);
    return Launch<dbias_kernel<T, WIDTH>>(queue, grid, Block::kThreads, Shared<Block::kKeys>(1),
                                          call);
  }

  cudaError_t Sum(const HeadTensor& out, const float* parts, int H, int N, int width,
                  int n_splits) const {
    if (n_splits == 1) return cudaSuccess;
    SumCall sum{};
    sum.out = out, sum.parts = parts, sum.n = int64_t{s.B} * H * N * width;
    sum.H = H, sum.N = N, sum.width = width, sum.n_splits = n_splits;
    return Launch<sum_splits_kernel<T>>(queue, CeilDiv(sum.n, kSumThreads), kSumThreads, 0, sum);
  }
};

}  // namespace

void CrossAttentionBackwardSplits(CrossAttentionBackwardParams& params, int32_t multiprocessors) {
  const CrossAttentionShape& s = params.call.shape;
  params.dq_splits = params.dkdv_splits = params.dbias_splits = 1;
  if (!IsValid(params)) return;
  WithKernel(s, [&](auto kernel) {
    using T = typename decltype(kernel)::Element;
    constexpr int kWidth = decltype(kernel)::kWidth;
    using Block = AttentionBlock<T, kWidth>;
    const int64_t heads = int64_t{s.B} * s.Hkv, key_tiles = CeilDiv(s.Nk, Block::kKeys);
    params.dq_splits = Splits(RowTiles(s, Block::kRows) * heads, key_tiles, multiprocessors);
    params.dkdv_splits = Splits(CeilDiv(s.Nk, Block::kRows) * heads,
                                RowTiles(s, Block::kPassingRows), multiprocessors);
    if (params.call.bias.data == nullptr) return 0;
    const BiasWalk<T, kWidth> walk(params);
    params.dbias_splits = Splits(walk.n_tiles, walk.terms(), multiprocessors);
    return 0;
  });
}

int64_t CrossAttentionBackwardParts(const CrossAttentionBackwardParams& params) {
  BackwardParts parts;
  return IsValid(params) ? Layout(params, parts) : 0;
}

cudaError_t CrossAttentionBackward(const CrossAttentionBackwardParams& given, Queue& queue) {
  BackwardCall call{given, {}};
  CrossAttentionBackwardParams& params = call.params;
  const CrossAttentionShape& s = params.call.shape;
  if (!IsValid(params)) return cudaErrorInvalidValue;
  Layout(params, call.parts);
  params.call.aligned = IsAligned(params.call) && IsAligned(params.dout, s.B, s.Hq, s.Nq, s.dtype);
  const bool plain = IsPlain(params.call) && params.dentropy == nullptr;
  return WithKernel(s, [&](auto kernel) {
    using Kernel = decltype(kernel);
    return Backward<typename Kernel::Element, Kernel::kWidth>{call, queue, call.params, s, plain}
        .Run();
  });
}

}  // namespace xattn

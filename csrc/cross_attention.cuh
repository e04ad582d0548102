// Kernels of masked cross-attention, forward.
//
// A block has rows of one key head: queries and the heads that share their keys, packed. It walks
// the tiles of keys between the rows' smallest start and largest stop, two tiles in flight. PLAIN:
// a score is a product and one positive scale; it is masked only in tiles that an interval cuts,
// and the scale is part of the exponential's multiply-add.
#pragma once

#include "attention_scores.cuh"

namespace xattn {

template <class T, int WIDTH>
using ForwardKeys =
    PassingTiles<T, AttentionBlock<T, WIDTH>::kKeys, WIDTH, 2, AttentionBlock<T, WIDTH>::kThreads>;

// Where a block's results go: those of the call, or, of several splits, float32 parts.
struct ForwardRow {
  const CrossAttentionForwardParams& p;
  int64_t at;  // in [n_splits, B, Hq, Nq]

  __device__ __forceinline__ ForwardRow(const CrossAttentionForwardParams& params, int b, int split,
                                        const PackedRow& row)
      : p(params), at(split * Rows() + RowNumber(params.call.shape, b, row)) {}

  __device__ __forceinline__ int64_t Rows() const {
    const CrossAttentionShape& s = p.call.shape;
    return int64_t{s.B} * s.Hq * s.Nq;
  }
  // `parts` has out [n_splits, rows, Dv] and then, each [n_splits, rows], lse and the rest.
  __device__ __forceinline__ float* OutPart() const { return p.parts + at * p.call.shape.Dv; }
  __device__ __forceinline__ float* Part(int n) const {
    return p.parts + (p.call.shape.Dv + n) * p.n_splits * Rows() + at;
  }

  __device__ __forceinline__ void Store(float lse, float lse_low, float entropy,
                                        float max_probability) const {
    const bool parts = p.n_splits > 1;
    *(parts ? Part(0) : p.lse + at) = lse;
    if (p.lse_low != nullptr) *(parts ? Part(1) : p.lse_low + at) = lse_low;
    if (p.entropy == nullptr) return;
    *(parts ? Part(2) : p.entropy + at) = entropy;
    *(parts ? Part(3) : p.max_probability + at) = max_probability;
  }
};

// What a lane has of two rows.
template <class T, int WIDTH, bool PLAIN>
struct ForwardState {
  SoftmaxState<!PLAIN> softmax[2];
  float acc[WIDTH / 8][4] = {};
  float a[2] = {};  // sum of e^(s - m) (s - m), of the entropy

  // Scores s [16, 8 N] of keys j0 on become exponentials, which are added to the sums.
  template <int N>
  __device__ __forceinline__ void Add(float (&s)[N][4], float factor, bool statistics) {
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) largest[i / 2] = fmaxf(largest[i / 2], s[n][i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // the four lanes of a row
      largest[r] = fmaxf(largest[r], __shfl_xor_sync(kAllLanes, largest[r], 1));
      largest[r] = fmaxf(largest[r], __shfl_xor_sync(kAllLanes, largest[r], 2));
      const float before = softmax[r].m;
      const float alpha = softmax[r].Raise(PLAIN ? largest[r] * factor : largest[r]);
      // alpha = 0 forgets what came before, though before - m may have overflowed
      if (statistics)
        a[r] = alpha == 0.f ? 0.f : alpha * a[r] + softmax[r].l * (before - softmax[r].m);
#pragma unroll
      for (int n = 0; n < WIDTH / 8; ++n) acc[n][2 * r] *= alpha, acc[n][2 * r + 1] *= alpha;
    }
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float shift = softmax[i / 2].Shift(), t = s[n][i] - shift;
        s[n][i] = PLAIN ? ptx::Exp2(fmaf(s[n][i], factor, -shift)) : softmax[i / 2].Exp(t);
        if (statistics && s[n][i] > 0.f) a[i / 2] += s[n][i] * t;
        sum[i / 2] += s[n][i];
      }
    softmax[0].l += sum[0], softmax[1].l += sum[1];  // of this lane's columns
  }

  template <int HALF>
  __device__ __forceinline__ void Finish(const CrossAttentionForwardParams& p, const Place& place,
                                         const PackedRow& row) {
    SoftmaxState<!PLAIN>& state = softmax[HALF];
#pragma unroll
    for (int lane = 1; lane <= 2; lane *= 2) {
      state.l += __shfl_xor_sync(kAllLanes, state.l, lane);
      a[HALF] += __shfl_xor_sync(kAllLanes, a[HALF], lane);
    }
    if (!row.there) return;
    const ForwardRow to(p, place.b, place.split, row);
    const float inverse = state.Inverse();
    if (threadIdx.x % 4 == 0)
      to.Store(state.Lse(), state.LseLow(), state.LogL() - a[HALF] * inverse, inverse);
    const int Dv = p.call.shape.Dv;
    const float factor = inverse * p.call.keep_scale;
    if (state.l == 0.f) {
      // 0 * v, of keys that other rows see, may be NaN
#pragma unroll
      for (int n = 0; n < WIDTH / 8; ++n) acc[n][2 * HALF] = acc[n][2 * HALF + 1] = 0.f;
    }
    if (p.n_splits > 1)
      StoreRow<float, HALF>(to.OutPart(), acc, factor, Dv);
    else
      StoreRow<T, HALF>(RowOf<T>(p.out, place.b, row.h, row.i), acc, factor, Dv);
  }
};

template <class T, int WIDTH, bool PLAIN>
__global__ void __launch_bounds__(AttentionBlock<T, WIDTH>::kThreads, 1)
    cross_attention_forward_kernel(const __grid_constant__ CrossAttentionForwardParams p) {
  using Block = AttentionBlock<T, WIDTH>;
  using QTile = Tile<T, Block::kRows, WIDTH>;
  constexpr int kKeys = Block::kKeys;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ KeyRange scratch[Block::kThreads / kWarpSize];
  const CrossAttentionCall& c = p.call;
  const CrossAttentionShape& shape = c.shape;
  const int n_rows = shape.Nq * (shape.Hq / shape.Hkv);
  const Place place((n_rows + Block::kRows - 1) / Block::kRows, shape);
  const uint32_t base = ptx::SharedAddress(shared);
  const QTile q_tile{base};
  StayingRows own(c, place, Block::kRows, scratch);
  own.template Copy<Block::kThreads>(q_tile, c.q, shape.D, c);
  KeyRange& range = own.range;
  SplitRange(range.begin, range.end, place.split, p.n_splits, kKeys);
  const ForwardKeys<T, WIDTH> tiles{base + QTile::kBytes};
  const auto copy_keys = [&](int k0, int stage) {
    tiles.CopyKeysAndValues(c, own.b, own.hkv, stage, k0, range.end);
  };
  if (range.begin < range.end) copy_keys(range.begin, 0);
  ptx::CommitCopies();

  const ScoreRow score_rows[2] = {{c, own.b, own.rows[0], own.keys[0]},
                                  {c, own.b, own.rows[1], own.keys[1]}};
  const int lane = StayingRows::Lane();
  const bool statistics = !PLAIN && p.entropy != nullptr;
  ForwardState<T, WIDTH, PLAIN> state;
  int stage = 0;
  for (int k0 = range.begin; k0 < range.end; k0 += kKeys, stage ^= 1) {
    if (k0 + kKeys < range.end) copy_keys(k0 + kKeys, stage ^ 1);
    ptx::CommitCopies();
    ptx::WaitForCopies<1>();
    __syncthreads();
    // [16, kKeys] of a warp
    float s[kKeys / 8][4] = {};
    MultiplyTransposed(s, q_tile, own.row0, tiles.First(stage), shape.D);
    if (!PLAIN || range.Cuts(k0, kKeys)) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = k0 + n * 8 + lane % 4 * 2 + i % 2;
          float tanh;
          if constexpr (PLAIN)
            s[n][i] = own.keys[i / 2].Has(j) ? s[n][i] : -INFINITY;
          else
            s[n][i] = score_rows[i / 2].Score(c, j, s[n][i], tanh);
        }
    }
    state.Add(s, c.scale * kLog2E, statistics);
    if (!PLAIN && c.seed != nullptr) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (!score_rows[i / 2].Keeps(c, k0 + n * 8 + lane % 4 * 2 + i % 2)) s[n][i] = 0.f;
    }
    MultiplyInto(state.acc, s, tiles.Second(stage), shape.Dv);
    __syncthreads();
  }
  ptx::WaitForCopies<0>();
  state.template Finish<0>(p, place, own.rows[0]);
  state.template Finish<1>(p, place, own.rows[1]);
}

constexpr int kMergeWarps = 4;

// Merges the splits of a row, one warp for each: out = sum_c w_c out_c with w_c = exp(lse_c - lse),
// entropy = sum_c w_c (entropy_c - log w_c).
template <class T>
__global__ void __launch_bounds__(kMergeWarps* kWarpSize)
    merge_kernel(const __grid_constant__ CrossAttentionForwardParams p) {
  const CrossAttentionShape& s = p.call.shape;
  const int64_t n_rows = int64_t{s.B} * s.Hq * s.Nq;
  const int64_t r = int64_t{blockIdx.x} * kMergeWarps + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (r >= n_rows) return;
  PackedRow row(s, 0, 0);
  row.i = r % s.Nq, row.h = r / s.Nq % s.Hq, row.there = true;
  const int b = r / s.Nq / s.Hq;
  const auto lse_low = [&](const ForwardRow& part) {
    return p.lse_low == nullptr ? 0.f : *part.Part(1);
  };
  SoftmaxState<true> state;
  for (int n = 0; n < p.n_splits; ++n) {
    const ForwardRow part(p, b, n, row);
    state.Merge(*part.Part(0), lse_low(part));
  }
  const auto log_share = [&](const ForwardRow& part) {
    return state.LogShare(*part.Part(0), lse_low(part));
  };

  float entropy = 0.f, max_probability = 0.f;
  for (int n = 0; p.entropy != nullptr && n < p.n_splits; ++n) {
    const ForwardRow part(p, b, n, row);
    const float log_w = log_share(part), w = expf(log_w);
    entropy += w * (*part.Part(2) - (w > 0.f ? log_w : 0.f));
    const float own = w * *part.Part(3);
    max_probability = own > max_probability || own != own ? own : max_probability;
  }
  if (lane == 0) {
    p.lse[r] = state.Lse();
    if (p.lse_low != nullptr) p.lse_low[r] = state.LseLow();
    if (p.entropy != nullptr) p.entropy[r] = entropy, p.max_probability[r] = max_probability;
  }
  T* out = RowOf<T>(p.out, b, row.h, row.i);
  for (int column = lane; column < s.Dv; column += kWarpSize) {
    float sum = 0.f;
    for (int n = 0; n < p.n_splits; ++n) {
      const ForwardRow part(p, b, n, row);
      sum += expf(log_share(part)) * part.OutPart()[column];
    }
    out[column] = FromFloat<T>(sum);
  }
}

}  // namespace xattn

// Kernels of masked cross-attention, forward.
//
// A block keeps packed rows of one key head, and iterates over the tiles of keys between the
// smallest start and the largest stop of these rows, with two tiles in flight. In PLAIN kernels a
// score is <q, k> times one positive scale: they apply the mask only in tiles that an interval
// cuts, and the scale is part of the multiply-add of the exponential.
#pragma once

#include "attention_scores.cuh"

namespace xattn {

template <class T, int WIDTH>
using ForwardKeys =
    PassingTiles<T, AttentionBlock<T, WIDTH>::kKeys, WIDTH, 2, AttentionBlock<T, WIDTH>::kThreads>;

// The place of a row's results: in the outputs of the call, or in float32 `parts` if there are
// several splits.
struct ForwardRow {
  const CrossAttentionForwardParams& params;
  int64_t index;  // of the row in [n_splits, B, Hq, Nq]

  __device__ __forceinline__ ForwardRow(const CrossAttentionForwardParams& params, int b, int split,
                                        const PackedRow& row)
      : params(params), index(split * Rows() + RowNumber(params.call.shape, b, row)) {}

  __device__ __forceinline__ int64_t Rows() const {
    const CrossAttentionShape& s = params.call.shape;
    return int64_t{s.B} * s.Hq * s.Nq;
  }
  // `parts` holds out [n_splits, rows, Dv], then lse, lse_low, entropy and max_probability, each of
  // shape [n_splits, rows].
  __device__ __forceinline__ float* OutPart() const {
    return params.parts + index * params.call.shape.Dv;
  }
  __device__ __forceinline__ float* Part(int n) const {
    return params.parts + (params.call.shape.Dv + n) * params.n_splits * Rows() + index;
  }

  __device__ __forceinline__ void Store(float lse, float lse_low, float entropy,
                                        float max_probability) const {
    const bool parts = params.n_splits > 1;
    *(parts ? Part(0) : params.lse + index) = lse;
    if (params.lse_low != nullptr) *(parts ? Part(1) : params.lse_low + index) = lse_low;
    if (params.entropy == nullptr) return;
    *(parts ? Part(2) : params.entropy + index) = entropy;
    *(parts ? Part(3) : params.max_probability + index) = max_probability;
  }
};

// What a lane accumulates for its two rows.
template <class T, int WIDTH, bool PLAIN>
struct ForwardState {
  SoftmaxState<!PLAIN> softmax[2];
  float acc[WIDTH / 8][4] = {};
  float a[2] = {};  // sum of e^(s - m) (s - m), from which the entropy is computed

  // Takes the scores s [16, 8 N] of a tile, replaces them by exponentials, and adds these to the
  // sums.
  template <int N>
  __device__ __forceinline__ void Add(float (&s)[N][4], float factor, bool statistics) {
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) largest[i / 2] = fmaxf(largest[i / 2], s[n][i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Four lanes share a row.
      largest[r] = fmaxf(largest[r], __shfl_xor_sync(kAllLanes, largest[r], 1));
      largest[r] = fmaxf(largest[r], __shfl_xor_sync(kAllLanes, largest[r], 2));
      const float before = softmax[r].m;
      const float alpha = softmax[r].Raise(PLAIN ? largest[r] * factor : largest[r]);
      // With alpha = 0 the earlier sum is dropped, because before - m may have overflowed.
      if (statistics)
        a[r] = alpha == 0.f ? 0.f : alpha * a[r] + softmax[r].l * (before - softmax[r].m);
#pragma unroll
      for (int n = 0; n < WIDTH / 8; ++n) acc[n][2 * r] *= alpha, acc[n][2 * r + 1] *= alpha;
    }
    auto& p = s;  // What follows replaces the scores by exponentials.
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float shift = softmax[i / 2].Shift(), t = s[n][i] - shift;
        p[n][i] = PLAIN ? ptx::Exp2(fmaf(s[n][i], factor, -shift)) : softmax[i / 2].Exp(t);
        if (statistics && p[n][i] > 0.f) a[i / 2] += p[n][i] * t;
        sum[i / 2] += p[n][i];
      }
    // l holds the sum over this lane's columns until Finish.
    softmax[0].l += sum[0], softmax[1].l += sum[1];
  }

  template <int HALF>
  __device__ __forceinline__ void Finish(const CrossAttentionForwardParams& params,
                                         const Place& place, const PackedRow& row) {
    SoftmaxState<!PLAIN>& state = softmax[HALF];
#pragma unroll
    for (int lane = 1; lane <= 2; lane *= 2) {
      state.l += __shfl_xor_sync(kAllLanes, state.l, lane);
      a[HALF] += __shfl_xor_sync(kAllLanes, a[HALF], lane);
    }
    if (!row.exists) return;
    const ForwardRow result(params, place.b, place.split, row);
    const float inverse = state.Inverse();
    if (threadIdx.x % 4 == 0)
      result.Store(state.Lse(), state.LseLow(), state.LogL() - a[HALF] * inverse, inverse);
    const int Dv = params.call.shape.Dv;
    const float factor = inverse * params.call.keep_scale;
    if (state.l == 0.f) {
      // acc may be NaN: it has 0 * v for keys that only other rows of the tile see.
#pragma unroll
      for (int n = 0; n < WIDTH / 8; ++n) acc[n][2 * HALF] = acc[n][2 * HALF + 1] = 0.f;
    }
    if (params.n_splits > 1)
      StoreRow<float, HALF>(result.OutPart(), acc, factor, Dv);
    else
      StoreRow<T, HALF>(RowOf<T>(params.out, place.b, row.h, row.i), acc, factor, Dv);
  }
};

template <class T, int WIDTH, bool PLAIN>
__global__ void __launch_bounds__(AttentionBlock<T, WIDTH>::kThreads, 1)
    cross_attention_forward_kernel(const __grid_constant__ CrossAttentionForwardParams params) {
  using Block = AttentionBlock<T, WIDTH>;
  using QTile = Tile<T, Block::kRows, WIDTH>;
  constexpr int kKeys = Block::kKeys;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ KeyRange scratch[Block::kThreads / kWarpSize];
  const CrossAttentionCall& c = params.call;
  const CrossAttentionShape& shape = c.shape;
  const int n_rows = shape.Nq * (shape.Hq / shape.Hkv);
  const Place place((n_rows + Block::kRows - 1) / Block::kRows, shape);
  const uint32_t base = ptx::SharedAddress(shared);
  const QTile q_tile{base};
  StayingRows staying(c, place, Block::kRows, scratch);
  staying.template Copy<Block::kThreads>(q_tile, c.q, shape.D, c);
  KeyRange& range = staying.range;
  SplitRange(range.begin, range.end, place.split, params.n_splits, kKeys);
  const ForwardKeys<T, WIDTH> tiles{base + QTile::kBytes};
  const auto copy_keys = [&](int k0, int stage) {
    tiles.CopyKeysAndValues(c, staying.b, staying.hkv, stage, k0, range.end);
  };
  if (range.begin < range.end) copy_keys(range.begin, 0);
  ptx::CommitCopies();

  const ScoreRow score_rows[2] = {{c, staying.b, staying.rows[0], staying.keys[0]},
                                  {c, staying.b, staying.rows[1], staying.keys[1]}};
  const int lane = StayingRows::Lane();
  const bool statistics = !PLAIN && params.entropy != nullptr;
  ForwardState<T, WIDTH, PLAIN> state;
  int stage = 0;
  for (int k0 = range.begin; k0 < range.end; k0 += kKeys, stage ^= 1) {
    if (k0 + kKeys < range.end) copy_keys(k0 + kKeys, stage ^ 1);
    ptx::CommitCopies();
    ptx::WaitForCopies<1>();
    __syncthreads();
    // [16, kKeys] per warp
    float s[kKeys / 8][4] = {};
    MultiplyTransposed(s, q_tile, staying.row0, tiles.First(stage), shape.D);
    if (!PLAIN || range.Cuts(k0, kKeys)) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = k0 + n * 8 + lane % 4 * 2 + i % 2;
          float tanh;
          if constexpr (PLAIN)
            s[n][i] = staying.keys[i / 2].Has(j) ? s[n][i] : -INFINITY;
          else
            s[n][i] = score_rows[i / 2].Score(c, j, s[n][i], tanh);
        }
    }
    state.Add(s, c.scale * kLog2E, statistics);
    auto& p = s;  // Add has replaced the scores by exponentials.
    if (!PLAIN && c.seed != nullptr) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (!score_rows[i / 2].Keeps(c, k0 + n * 8 + lane % 4 * 2 + i % 2)) p[n][i] = 0.f;
    }
    MultiplyInto(state.acc, p, tiles.Second(stage), shape.Dv);
    __syncthreads();
  }
  ptx::WaitForCopies<0>();
  state.template Finish<0>(params, place, staying.rows[0]);
  state.template Finish<1>(params, place, staying.rows[1]);
}

constexpr int kMergeWarps = 4;

// Merges the splits of the rows, with one warp for each row: out = sum_c w_c out_c with
// w_c = exp(lse_c - lse), and entropy = sum_c w_c (entropy_c - log w_c).
template <class T>
__global__ void __launch_bounds__(kMergeWarps* kWarpSize)
    merge_kernel(const __grid_constant__ CrossAttentionForwardParams params) {
  const CrossAttentionShape& s = params.call.shape;
  const int64_t n_rows = int64_t{s.B} * s.Hq * s.Nq;
  const int64_t r = int64_t{blockIdx.x} * kMergeWarps + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (r >= n_rows) return;
  PackedRow row(s, 0, 0);
  row.i = r % s.Nq, row.h = r / s.Nq % s.Hq, row.exists = true;
  const int b = r / s.Nq / s.Hq;
  const auto lse_low = [&](const ForwardRow& part) {
    return params.lse_low == nullptr ? 0.f : *part.Part(1);
  };
  SoftmaxState<true> state;
  for (int n = 0; n < params.n_splits; ++n) {
    const ForwardRow part(params, b, n, row);
    state.Merge(*part.Part(0), lse_low(part));
  }
  const auto log_share = [&](const ForwardRow& part) {
    return state.LogShare(*part.Part(0), lse_low(part));
  };

  float entropy = 0.f, max_probability = 0.f;
  for (int n = 0; params.entropy != nullptr && n < params.n_splits; ++n) {
    const ForwardRow part(params, b, n, row);
    const float log_w = log_share(part), w = expf(log_w);
    entropy += w * (*part.Part(2) - (w > 0.f ? log_w : 0.f));
    const float largest = w * *part.Part(3);
    // A NaN is kept.
    max_probability = largest > max_probability || largest != largest ? largest : max_probability;
  }
  if (lane == 0) {
    params.lse[r] = state.Lse();
    if (params.lse_low != nullptr) params.lse_low[r] = state.LseLow();
    if (params.entropy != nullptr)
      params.entropy[r] = entropy, params.max_probability[r] = max_probability;
  }
  T* out = RowOf<T>(params.out, b, row.h, row.i);
  for (int column = lane; column < s.Dv; column += kWarpSize) {
    float sum = 0.f;
    for (int n = 0; n < params.n_splits; ++n) {
      const ForwardRow part(params, b, n, row);
      sum += expf(log_share(part)) * part.OutPart()[column];
    }
    out[column] = FromFloat<T>(sum);
  }
}

}  // namespace xattn

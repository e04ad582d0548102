// Kernels of masked cross-attention, backward: terms of rows, dq, and dk with dv.
//
// The dq kernel keeps rows and iterates over their keys, as the forward does. The dkdv kernel keeps
// keys and iterates over the tiles of rows that see them. It computes the products transposed, so
// that a row of its fragments is a key and a column is a row of the scores. No sum uses atomics.
// cross_attention.cuh explains PLAIN.
#pragma once

#include <type_traits>

#include "attention_scores.cuh"

namespace xattn {

// What the kernels pass to each other. The memory is that of `params.parts`.
struct BackwardParts {
  float *lse, *minus_delta;  // [B, Hq, Nq]
  int4* bounds;  // [B, n_tiles], the smallest and largest start and smallest and largest stop
  float *dq, *dk, *dv;  // [n_splits, B, H, N, width], used if there are several splits
};

struct BackwardCall {
  CrossAttentionBackwardParams params;
  BackwardParts parts;
};

constexpr int kTermWarps = 8;

// Computes, with one warp for each row, minus_delta = -(<out, dout> - dlse + dentropy * entropy),
// which eq. ds adds to dp, and lse in the unit of the scores, with +inf in place of -inf.
template <class T, bool PLAIN>
__global__ void __launch_bounds__(kTermWarps* kWarpSize)
    row_terms_kernel(const __grid_constant__ BackwardCall call) {
  const CrossAttentionBackwardParams& params = call.params;
  const CrossAttentionShape& s = params.call.shape;
  const int64_t r = int64_t{blockIdx.x} * kTermWarps + threadIdx.x / kWarpSize;
  if (r >= int64_t{s.B} * s.Hq * s.Nq) return;
  const int i = r % s.Nq, h = r / s.Nq % s.Hq, b = r / s.Nq / s.Hq;
  const T *out = RowOf<const T>(params.out, b, h, i), *dout = RowOf<const T>(params.dout, b, h, i);
  float delta = 0.f;
  for (int column = threadIdx.x % kWarpSize; column < s.Dv; column += kWarpSize)
    delta += ToFloat(out[column]) * ToFloat(dout[column]);
  delta = WarpSum(delta);
  if (threadIdx.x % kWarpSize != 0) return;
  if (params.dlse != nullptr) delta -= params.dlse[r];
  if (params.dentropy != nullptr) delta += params.dentropy[r] * params.entropy[r];
  const bool empty = params.lse[r] == -INFINITY;
  // A NaN in dout, dlse or dentropy of a row without keys must not reach its dq.
  call.parts.minus_delta[r] = empty ? 0.f : -delta;
  call.parts.lse[r] = empty ? INFINITY : params.lse[r] * (PLAIN ? kLog2E : 1.f);
}

// Computes, with one warp for each tile of ROWS packed rows, the bounds of their intervals. A row
// that does not exist starts at Nk and stops at 0, so that its tile is masked for every key.
template <int ROWS>
__global__ void __launch_bounds__(kTermWarps* kWarpSize)
    tile_bounds_kernel(const __grid_constant__ BackwardCall call) {
  const CrossAttentionCall& c = call.params.call;
  const int n_tiles = (c.shape.Nq * (c.shape.Hq / c.shape.Hkv) + ROWS - 1) / ROWS;
  const int64_t n = int64_t{blockIdx.x} * kTermWarps + threadIdx.x / kWarpSize;
  if (n >= int64_t{c.shape.B} * n_tiles) return;
  const int tile = n % n_tiles, b = n / n_tiles;
  KeyRange range(c.shape.Nk);
  for (int row = threadIdx.x % kWarpSize; row < ROWS; row += kWarpSize)
    range.Add(KeysOf(c, b, PackedRow(c.shape, tile * ROWS + row, 0)));
  range.AddLanes();
  if (threadIdx.x % kWarpSize == 0)
    call.parts.bounds[n] = {range.begin, range.full_begin, range.full_end, range.end};
}

__device__ __forceinline__ RowTerms LoadTerms(const BackwardCall& call, int b,
                                              const PackedRow& row) {
  RowTerms terms{INFINITY, 0.f, 0.f, 0.f};
  if (!row.exists) return terms;
  const CrossAttentionBackwardParams& params = call.params;
  const int64_t r = RowNumber(params.call.shape, b, row);
  terms.lse = call.parts.lse[r], terms.minus_delta = call.parts.minus_delta[r];
  if (params.lse_low != nullptr) terms.lse_low = params.lse_low[r];
  if (params.dentropy != nullptr) terms.dentropy = params.dentropy[r];
  return terms;
}

// Writes a row of dq, and of dscale the sum over the keys of this block.
template <class T, int HALF, int N>
__device__ __forceinline__ void StoreDq(const BackwardCall& call, const Place& place,
                                        const PackedRow& row, const RowTerms& terms, float scale,
                                        float (&acc)[N][4]) {
  const CrossAttentionBackwardParams& params = call.params;
  const CrossAttentionShape& s = params.call.shape;
  const int b = place.b;
  const int64_t part_row = (int64_t{place.split} * s.B * s.Hq * s.Nq) + RowNumber(s, b, row);
  const T* q = RowOf<const T>(params.call.q, b, row.h, row.i);
  float q_dq = 0.f;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float& x = acc[n][2 * HALF + i];
      // A row without keys has dq = 0, even if acc holds NaN.
      if (terms.lse == INFINITY) x = 0.f;
      const int column = n * 8 + threadIdx.x % 4 * 2 + i;
      if (params.dscale != nullptr && row.exists && column < s.D) q_dq += x * ToFloat(q[column]);
    }
  if (params.dscale != nullptr) {
    q_dq += __shfl_xor_sync(kAllLanes, q_dq, 1);
    q_dq += __shfl_xor_sync(kAllLanes, q_dq, 2);
    if (row.exists && threadIdx.x % 4 == 0) params.dscale[part_row] = q_dq;
  }
  if (!row.exists || params.dq.data == nullptr) return;
  if (params.dq_splits > 1)
    StoreRow<float, HALF>(call.parts.dq + part_row * s.D, acc, scale, s.D);
  else
    StoreRow<T, HALF>(RowOf<T>(params.dq, b, row.h, row.i), acc, scale, s.D);
}

template <class T, int WIDTH, bool PLAIN>
__global__ void __launch_bounds__(AttentionBlock<T, WIDTH>::kThreads, 1)
    dq_kernel(const __grid_constant__ BackwardCall call) {
  using Block = AttentionBlock<T, WIDTH>;
  using RowsTile = Tile<T, Block::kRows, WIDTH>;
  constexpr int kKeys = Block::kKeys;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ KeyRange scratch[Block::kThreads / kWarpSize];
  const CrossAttentionBackwardParams& params = call.params;
  const CrossAttentionCall& c = params.call;
  const CrossAttentionShape& shape = c.shape;
  const int n_rows = shape.Nq * (shape.Hq / shape.Hkv);
  const Place place((n_rows + Block::kRows - 1) / Block::kRows, shape);
  const uint32_t base = ptx::SharedAddress(shared);
  const RowsTile q_tile{base}, dout_tile{base + RowsTile::kBytes};
  StayingRows staying(c, place, Block::kRows, scratch);
  staying.template Copy<Block::kThreads>(q_tile, c.q, shape.D, c);
  staying.template Copy<Block::kThreads>(dout_tile, params.dout, shape.Dv, c);
  KeyRange& range = staying.range;
  SplitRange(range.begin, range.end, place.split, params.dq_splits, kKeys);
  const PassingTiles<T, kKeys, WIDTH, Block::kStages, Block::kThreads> tiles{base +
                                                                             2 * RowsTile::kBytes};
  const auto copy_keys = [&](int k0, int stage) {
    tiles.CopyKeysAndValues(c, staying.b, staying.hkv, stage, k0, range.end);
  };

  const int lane = StayingRows::Lane();
  const RowTerms terms[2] = {LoadTerms(call, staying.b, staying.rows[0]),
                             LoadTerms(call, staying.b, staying.rows[1])};
  const ScoreRow score_rows[2] = {{c, staying.b, staying.rows[0], staying.keys[0]},
                                  {c, staying.b, staying.rows[1], staying.keys[1]}};
  // [16, WIDTH] per warp
  float acc[WIDTH / 8][4] = {};
  constexpr int kStages = Block::kStages;
  int stage = 0;
  if (kStages == 2 && range.begin < range.end) copy_keys(range.begin, 0);
  ptx::CommitCopies();
  for (int k0 = range.begin; k0 < range.end; k0 += kKeys, stage ^= kStages - 1) {
    if (kStages == 1)
      copy_keys(k0, 0);
    else if (k0 + kKeys < range.end)
      copy_keys(k0 + kKeys, stage ^ 1);
    ptx::CommitCopies();
    ptx::WaitForCopies<kStages - 1>();
    __syncthreads();
    // [16, kKeys] per warp
    float s[kKeys / 8][4] = {}, dp[kKeys / 8][4] = {};
    MultiplyTransposed(s, q_tile, staying.row0, tiles.First(stage), shape.D);
    MultiplyTransposed(dp, dout_tile, staying.row0, tiles.Second(stage), shape.Dv);
    auto& ds = s;  // ds replaces the score of each pair, to save registers.
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = k0 + n * 8 + lane % 4 * 2 + i % 2;
        const RowTerms& row = terms[i / 2];
        if constexpr (PLAIN) {
          const float p = ptx::Exp2(fmaf(s[n][i], c.scale * kLog2E, -row.lse));
          ds[n][i] = p * (dp[n][i] + row.minus_delta);
        } else {
          const ScoreRow& score_row = score_rows[i / 2];
          float tanh;
          const float score = score_row.Score(c, j, s[n][i], tanh);
          ds[n][i] = PairGradient(c, row, score_row.Sees(c, j, score), score, tanh, dp[n][i],
                                  score_row.Keeps(c, j))
                         .ds;
        }
      }
    if (PLAIN && range.Cuts(k0, kKeys)) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (!staying.keys[i / 2].Has(k0 + n * 8 + lane % 4 * 2 + i % 2)) ds[n][i] = 0.f;
    }
    MultiplyInto(acc, ds, tiles.First(stage), shape.D);
    __syncthreads();
  }
  ptx::WaitForCopies<0>();
  StoreDq<T, 0>(call, place, staying.rows[0], terms[0], score_rows[0].scale, acc);
  StoreDq<T, 1>(call, place, staying.rows[1], terms[1], score_rows[1].scale, acc);
}

// The terms and intervals of passing rows, in shared memory.
template <int ROWS, int STAGES>
struct PassingTerms {
  struct Stage {
    RowTerms terms[ROWS];
    Interval keys[ROWS];
  };
  static constexpr int kBytes = sizeof(Stage) * STAGES;

  Stage* stages;

  // Loads those of the ROWS packed rows from p0 on.
  __device__ __forceinline__ void Load(int stage, const BackwardCall& call, int b, int hkv,
                                       int p0) const {
    for (int n = threadIdx.x; n < ROWS; n += blockDim.x) {
      const PackedRow row(call.params.call.shape, p0 + n, hkv);
      stages[stage].terms[n] = LoadTerms(call, b, row);
      stages[stage].keys[n] = KeysOf(call.params.call, b, row);
    }
  }
};

// Writes the row of key j of a gradient: the result itself, or the sum over this block's split of
// the rows.
template <class T, int HALF, int N>
__device__ __forceinline__ void StoreKeyGradient(const BackwardCall& call, const Place& place,
                                                 int j, const HeadTensor& gradient, float* parts,
                                                 const float (&acc)[N][4], float factor,
                                                 int width) {
  const CrossAttentionShape& s = call.params.call.shape;
  if (j >= s.Nk) return;
  const int64_t part_row = ((int64_t{place.split} * s.B + place.b) * s.Hkv + place.hkv) * s.Nk + j;
  if (call.params.dkdv_splits > 1)
    StoreRow<float, HALF>(parts + part_row * width, acc, factor, width);
  else
    StoreRow<T, HALF>(RowOf<T>(gradient, place.b, place.hkv, j), acc, factor, width);
}

// DK and DV say which gradients the kernel computes. One kernel computes both unless their sums
// need too many registers.
template <class T, int WIDTH, bool PLAIN, bool DK, bool DV>
__global__ void __launch_bounds__(AttentionBlock<T, WIDTH>::kThreads, 1)
    dkdv_kernel(const __grid_constant__ BackwardCall call) {
  using Block = AttentionBlock<T, WIDTH>;
  using KeysTile = Tile<T, Block::kRows, WIDTH>;
  constexpr int kRows = Block::kPassingRows, kStages = Block::kStages;
  using Passing = PassingTiles<T, kRows, WIDTH, kStages, Block::kThreads>;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint32_t words[Block::kThreads / kWarpSize];
  const CrossAttentionBackwardParams& params = call.params;
  const CrossAttentionCall& c = params.call;
  const CrossAttentionShape& shape = c.shape;
  const Place place((shape.Nk + Block::kRows - 1) / Block::kRows, shape);
  const int hkv = place.hkv, b = place.b, k0 = place.tile * Block::kRows;
  const int lane = threadIdx.x % kWarpSize, row0 = threadIdx.x / kWarpSize * 16;

  const uint32_t base = ptx::SharedAddress(shared);
  const KeysTile k_tile{base}, v_tile{base + KeysTile::kBytes};
  const auto copy_keys = [&](const KeysTile& tile, const HeadTensor& t, int width) {
    CopyKeys<Block::kThreads>(tile, RowOf<const T>(t, b, hkv, 0), t.strides[2], width, k0, shape.Nk,
                              c.aligned);
  };
  copy_keys(k_tile, c.k, shape.D);
  if (DK) copy_keys(v_tile, c.v, shape.Dv);

  const int n_tiles = (shape.Nq * (shape.Hq / shape.Hkv) + kRows - 1) / kRows;
  const int4* bounds = c.start.data == nullptr ? nullptr : call.parts.bounds + int64_t{b} * n_tiles;
  int begin = 0, end = n_tiles;
  SplitRange(begin, end, place.split, params.dkdv_splits, 1);
  const int last_key = min(k0 + Block::kRows, shape.Nk);
  MeetingTiles<Block::kThreads> meeting(bounds, begin, end, k0, last_key, words);

  const Passing tiles{base + 2 * KeysTile::kBytes};
  const PassingTerms<kRows, kStages> terms{
      reinterpret_cast<typename PassingTerms<kRows, kStages>::Stage*>(
          shared + 2 * KeysTile::kBytes + Passing::kBytes)};
  const auto copy_rows = [&](int t, int stage) {
    const auto copy = [&](const auto& tile, const HeadTensor& tensor, int width) {
      const auto row_of = [&](int n) -> const T* {
        const PackedRow row(shape, t * kRows + n, hkv);
        return row.exists ? RowOf<const T>(tensor, b, row.h, row.i) : nullptr;
      };
      tile.template Copy<Block::kThreads>(row_of, width, static_cast<const T*>(tensor.data),
                                          c.aligned);
    };
    copy(tiles.First(stage), c.q, shape.D);
    copy(tiles.Second(stage), params.dout, shape.Dv);
    terms.Load(stage, call, b, hkv, t * kRows);
  };

  // A scale that all rows share multiplies the sum. If it multiplied ds, a small scale would make
  // ds too small for 16 bits.
  const bool one_scale = PLAIN || c.scale_stride == 0 || shape.Hq == shape.Hkv;
  const float scale = ScaleOf(c, hkv * (shape.Hq / shape.Hkv));

  // [16, WIDTH] per warp
  float dk[DK ? WIDTH / 8 : 1][4] = {}, dv[DV ? WIDTH / 8 : 1][4] = {};
  int stage = 0, t = meeting.Next();
  if (kStages == 2 && t < end) copy_rows(t, 0);
  ptx::CommitCopies();
  for (; t < end; stage ^= kStages - 1) {
    const int next = meeting.Next();
    if (kStages == 1)
      copy_rows(t, 0);
    else if (next < end)
      copy_rows(next, stage ^ 1);
    ptx::CommitCopies();
    ptx::WaitForCopies<kStages - 1>();
    __syncthreads();
    // [16, kRows] per warp, of its keys and the passing rows
    float s[kRows / 8][4] = {}, dp[kRows / 8][4] = {};
    MultiplyTransposed(s, k_tile, row0, tiles.First(stage), shape.D);
    if (DK) MultiplyTransposed(dp, v_tile, row0, tiles.Second(stage), shape.Dv);
    // p after dropout replaces s, and ds replaces dp, to save registers.
    auto &p = s, &ds = dp;
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = n * 8 + lane % 4 * 2 + e;
        const RowTerms row = terms.stages[stage].terms[column];
        const ScoreRow score_row(c, b, PackedRow(shape, t * kRows + column, hkv),
                                 terms.stages[stage].keys[column]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int j = k0 + row0 + lane / 4 + 8 * half, i = 2 * half + e;
          if constexpr (PLAIN) {
            p[n][i] = ptx::Exp2(fmaf(s[n][i], c.scale * kLog2E, -row.lse));
            ds[n][i] = p[n][i] * (dp[n][i] + row.minus_delta);
          } else {
            float tanh;
            const float score = score_row.Score(c, j, s[n][i], tanh);
            const bool kept = score_row.Keeps(c, j);
            const PairGradient pair(c, row, score_row.Sees(c, j, score), score, tanh, dp[n][i],
                                    kept);
            p[n][i] = kept ? pair.p : 0.f;
            ds[n][i] = one_scale ? pair.ds : pair.ds * score_row.scale;
          }
        }
      }
    bool cut = (t + 1) * kRows > shape.Nq * (shape.Hq / shape.Hkv);
    if (bounds != nullptr) cut |= bounds[t].y > k0 || bounds[t].z < last_key;
    if (PLAIN && cut) {
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Interval keys = terms.stages[stage].keys[n * 8 + lane % 4 * 2 + i % 2];
          if (!keys.Has(k0 + row0 + lane / 4 + i / 2 * 8)) p[n][i] = 0.f, ds[n][i] = 0.f;
        }
    }
    if constexpr (DV) MultiplyInto(dv, p, tiles.Second(stage), shape.Dv);
    if constexpr (DK) MultiplyInto(dk, ds, tiles.First(stage), shape.D);
    __syncthreads();
    t = next;
  }
  ptx::WaitForCopies<0>();
  const auto store = [&](auto half) {
    constexpr int kHalf = decltype(half)::value;
    const int j = k0 + row0 + lane / 4 + 8 * kHalf;
    if constexpr (DK)
      StoreKeyGradient<T, kHalf>(call, place, j, params.dk, call.parts.dk, dk,
                                 one_scale ? scale : 1.f, shape.D);
    if constexpr (DV)
      StoreKeyGradient<T, kHalf>(call, place, j, params.dv, call.parts.dv, dv, c.keep_scale,
                                 shape.Dv);
  };
  store(std::integral_constant<int, 0>{});
  store(std::integral_constant<int, 1>{});
}

struct SumCall {
  HeadTensor out;
  const float* parts;  // [n_splits, B, H, N, width]
  int64_t n;           // the number of elements of `out`
  int32_t H, N, width, n_splits;
};

constexpr int kSumThreads = 256;

// Sums the splits in their order, so that the result does not depend on timing.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_splits_kernel(const __grid_constant__ SumCall call) {
  const int64_t element = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (element >= call.n) return;
  float sum = 0.f;
  for (int n = 0; n < call.n_splits; ++n) sum += call.parts[n * call.n + element];
  const int64_t row = element / call.width;
  const int h = row / call.N % call.H, b = row / call.N / call.H;
  RowOf<T>(call.out, b, h, row % call.N)[element % call.width] = FromFloat<T>(sum);
}

}  // namespace xattn

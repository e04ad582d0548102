// The gradient of a bias, summed over the dimensions in which it is broadcast.
//
// A block computes one tile of dbias and iterates over all tiles of the scores to which this tile
// of the bias was added, except those outside the intervals. So the sum needs no atomics, and ds is
// never written to device memory.
#pragma once

#include "cross_attention_backward.cuh"

namespace xattn {

// The numbers of tiles of the scores, along each dimension, whose gradients are summed into one
// tile of dbias.
template <class T, int WIDTH>
struct BiasWalk {
  static constexpr int kRows = AttentionBlock<T, WIDTH>::kRows;
  static constexpr int kKeys = AttentionBlock<T, WIDTH>::kKeys;
  int n_b, n_h, n_i, n_j;
  int64_t n_tiles;  // of dbias

  __host__ __device__ explicit BiasWalk(const CrossAttentionBackwardParams& params) {
    const CrossAttentionShape& s = params.call.shape;
    const int32_t* size = params.bias_sizes;
    const int i_tiles = (s.Nq + kRows - 1) / kRows, j_tiles = (s.Nk + kKeys - 1) / kKeys;
    n_b = s.B / size[0], n_h = s.Hq / size[1];
    n_i = size[2] == s.Nq ? 1 : i_tiles, n_j = size[3] == s.Nk ? 1 : j_tiles;
    n_tiles = int64_t{size[0]} * size[1] * (i_tiles / n_i) * (j_tiles / n_j);
  }
  __host__ __device__ int64_t terms() const { return int64_t{n_b} * n_h * n_i * n_j; }
};

template <class T, int WIDTH>
__global__ void __launch_bounds__(AttentionBlock<T, WIDTH>::kThreads, 1)
    dbias_kernel(const __grid_constant__ BackwardCall call) {
  using Block = AttentionBlock<T, WIDTH>;
  using RowsTile = Tile<T, Block::kRows, WIDTH>;
  using KeysTile = Tile<T, Block::kKeys, WIDTH>;
  constexpr int kRows = Block::kRows, kKeys = Block::kKeys;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ KeyRange scratch[Block::kThreads / kWarpSize];
  const CrossAttentionBackwardParams& params = call.params;
  const CrossAttentionCall& c = params.call;
  const CrossAttentionShape& shape = c.shape;
  const int32_t* size = params.bias_sizes;
  const int lane = threadIdx.x % kWarpSize, row0 = threadIdx.x / kWarpSize * 16;

  const BiasWalk<T, WIDTH> walk(params);
  const int bias_j_tiles = (size[3] + kKeys - 1) / kKeys,
            bias_i_tiles = (size[2] + kRows - 1) / kRows;
  int64_t n = blockIdx.x;
  const int bias_j = n % bias_j_tiles * kKeys;
  n /= bias_j_tiles;
  const int bias_i = n % bias_i_tiles * kRows;
  n /= bias_i_tiles;
  const int bias_h = n % size[1];
  n /= size[1];
  const int bias_b = n % size[0];
  const int64_t split = n / size[0];
  const int64_t each = (walk.terms() + params.dbias_splits - 1) / params.dbias_splits;
  const int64_t last_term = min(walk.terms(), (split + 1) * each);

  const uint32_t base = ptx::SharedAddress(shared);
  const RowsTile q_tile{base}, dout_tile{base + RowsTile::kBytes};
  const KeysTile k_tile{base + 2 * RowsTile::kBytes}, v_tile{k_tile.base + KeysTile::kBytes};
  // [16, kKeys] per warp
  float acc[kKeys / 8][4] = {};
  for (int64_t term = split * each; term < last_term; ++term) {
    const int j0 = bias_j + static_cast<int>(term % walk.n_j) * kKeys;
    const int i0 = bias_i + static_cast<int>(term / walk.n_j % walk.n_i) * kRows;
    const int h = bias_h + static_cast<int>(term / (int64_t{walk.n_j} * walk.n_i) % walk.n_h);
    const int b = bias_b + static_cast<int>(term / (int64_t{walk.n_j} * walk.n_i * walk.n_h));
    const int hkv = h / (shape.Hq / shape.Hkv);
    const auto row_at = [&](int n) { return PackedRow(i0 + n, h, i0 + n < shape.Nq); };
    const PackedRow rows[2] = {row_at(row0 + lane / 4), row_at(row0 + lane / 4 + 8)};
    const Interval keys[2] = {KeysOf(c, b, rows[0]), KeysOf(c, b, rows[1])};
    KeyRange range(shape.Nk);
    range.Add(keys[0]), range.Add(keys[1]);
    __syncthreads();  // `scratch` and the tiles are still read for the term before.
    range.AddWarps(scratch);
    if (j0 >= range.end || j0 + kKeys <= range.begin) continue;

    const auto copy = [&](const auto& tile, const HeadTensor& t, int width, auto row_of) {
      tile.template Copy<Block::kThreads>(row_of, width, static_cast<const T*>(t.data), c.aligned);
    };
    const auto q_row = [&](const HeadTensor& t) {
      return [&](int n) -> const T* {
        return row_at(n).exists ? RowOf<const T>(t, b, h, i0 + n) : nullptr;
      };
    };
    const auto key_row = [&](const HeadTensor& t) {
      return [&](int n) -> const T* {
        const bool seen = j0 + n >= range.begin && j0 + n < range.end;
        return seen ? RowOf<const T>(t, b, hkv, j0 + n) : nullptr;
      };
    };
    copy(q_tile, c.q, shape.D, q_row(c.q));
    copy(dout_tile, params.dout, shape.Dv, q_row(params.dout));
    copy(k_tile, c.k, shape.D, key_row(c.k));
    copy(v_tile, c.v, shape.Dv, key_row(c.v));
    ptx::CommitCopies();
    ptx::WaitForCopies<0>();
    __syncthreads();
    float s[kKeys / 8][4] = {}, dp[kKeys / 8][4] = {};
    MultiplyTransposed(s, q_tile, row0, k_tile, shape.D);
    MultiplyTransposed(dp, dout_tile, row0, v_tile, shape.Dv);
    const ScoreRow score_rows[2] = {{c, b, rows[0], keys[0]}, {c, b, rows[1], keys[1]}};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = j0 + n * 8 + lane % 4 * 2 + i % 2;
        const ScoreRow& score_row = score_rows[i / 2];
        float tanh;
        const float score = score_row.Score(c, j, s[n][i], tanh);
        // The bias is added after the softcap, so its gradient takes tanh = 0.
        acc[n][i] += PairGradient(c, LoadTerms(call, b, rows[i / 2]), score_row.Sees(c, j, score),
                                  score, 0.f, dp[n][i], score_row.Keeps(c, j))
                         .ds;
      }
  }

  // [kRows, kKeys] of the block; what follows sums it over dimensions in which the bias is
  // broadcast.
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sums[(row0 + lane / 4 + i / 2 * 8) * kKeys + n * 8 + lane % 4 * 2 + i % 2] = acc[n][i];
  __syncthreads();
  const int over_i = size[2] == shape.Nq ? 1 : kRows, over_j = size[3] == shape.Nk ? 1 : kKeys;
  for (int n = threadIdx.x; n < kRows / over_i * (kKeys / over_j); n += Block::kThreads) {
    const int i = n / (kKeys / over_j), j = n % (kKeys / over_j);
    if (bias_i + i >= size[2] || bias_j + j >= size[3]) continue;
    float sum = 0.f;
    for (int ii = 0; ii < over_i; ++ii)
      for (int jj = 0; jj < over_j; ++jj) sum += sums[(i + ii) * kKeys + j + jj];
    const int64_t row = ((split * size[0] + bias_b) * size[1] + bias_h) * size[2] + bias_i + i;
    params.dbias[row * size[3] + bias_j + j] = sum;
  }
}

}  // namespace xattn

// Kernels of the choice of keys in top-k attention.
//
// A block keeps packed rows of one key head and iterates over their keys five times. Each of the
// first four times it finds eight more bits of the lowest chosen score of each row, from histograms
// in shared memory; the fifth time it writes the choice. It computes the products again each time,
// in the same order, so that scores agree in every bit. No score is written to device memory.
#pragma once

#include "attention_scores.cuh"
#include "topk_attention.h"

namespace xattn {

template <class T, int WIDTH>
struct SelectionBlock {
  static constexpr int kRowBytes = WIDTH * sizeof(T);
  static constexpr int kRows = kRowBytes > 256 ? 32 : 64;
  static constexpr int kThreads = kRows / 16 * kWarpSize;
  static constexpr int kKeys = 32;  // the bits of a word
  static constexpr int kStages = kRowBytes > 512 ? 1 : 2;
  using QTile = Tile<T, kRows, WIDTH>;
  using KTile = Tile<T, kKeys, WIDTH>;
  // The extra element makes the histograms of different rows begin in different banks.
  static constexpr int kHistogram = 256 + 1;
  static constexpr int kBytes =
      QTile::kBytes + kStages * KTile::kBytes + kRows * kHistogram * static_cast<int>(sizeof(int));
};

// Maps scores to unsigned numbers of the same order. -inf, which is never chosen, becomes 0.
__device__ __forceinline__ uint32_t Ordered(float s) {
  if (s == -INFINITY) return 0;
  if (s != s) return 0xffffffff;
  const uint32_t bits = __float_as_uint(s + 0.f);  // The sum turns -0 into 0, its equal.
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

// The choice of a row: the keys with scores above `threshold`, and the first `ties` of the keys
// with scores equal to it. Until it is `done`, `threshold` has only the highest bits of the lowest
// chosen score, and `ties` is the number of keys to choose among the scores that begin with these
// bits.
struct Choice {
  uint32_t threshold;
  int ties;
  bool done;
};

// Adds eight bits to the threshold of a choice; `shift` lower bits remain unknown. The histogram
// counts these eight bits over the scores of the row whose higher bits equal the threshold. All
// lanes of a warp must call it.
__device__ __forceinline__ void Refine(Choice& choice, const int* histogram, int shift) {
  const int lane = threadIdx.x % kWarpSize;
  if (choice.done) return;
  // A lane has 8 bins. Lane 0 has the highest ones.
  int in_my_bins = 0;
#pragma unroll
  for (int n = 0; n < 8; ++n) in_my_bins += histogram[255 - lane * 8 - n];
  int above = in_my_bins;
#pragma unroll
  for (int d = 1; d < kWarpSize; d *= 2) {
    const int other = __shfl_up_sync(kAllLanes, above, d);
    if (lane >= d) above += other;
  }
  const uint32_t reached = __ballot_sync(kAllLanes, above >= choice.ties);
  if (reached == 0) {  // The row has fewer candidates than top_k. Only the first call can see this.
    choice = {0, 0, true};
    return;
  }
  const int reached_by = __ffs(reached) - 1;
  above = __shfl_sync(kAllLanes, above - in_my_bins, reached_by);
  int digit = 255 - reached_by * 8, count = histogram[digit];
  while (above + count < choice.ties) above += count, count = histogram[--digit];
  choice.threshold = choice.threshold << 8 | static_cast<uint32_t>(digit);
  choice.ties -= above;
  if (shift == 0) {
    choice.done = true;
  } else if (count == choice.ties) {  // All of them are chosen, whatever their lower bits are.
    choice = {max(choice.threshold << shift, 1u) - 1, 0, true};
  }
}

// The bits of the chosen keys among the 32 of u, for the r-th row of this lane: all keys above the
// threshold, and up to `left` keys equal to it, the lowest first. Subtracts the latter from `left`.
template <int N>
__device__ __forceinline__ uint32_t TakeKeys(const uint32_t (&u)[N][4], int r, uint32_t threshold,
                                             int& left) {
  static_assert(N * 8 == 32, "the keys are those of one word");
  uint32_t above = 0, equal = 0;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t bit = 1u << (n * 8 + threadIdx.x % 4 * 2 + e);
      if (u[n][2 * r + e] > threshold) above |= bit;
      if (u[n][2 * r + e] == threshold) equal |= bit;
    }
#pragma unroll
  for (int d = 1; d <= 2; d *= 2) {
    above |= __shfl_xor_sync(kAllLanes, above, d);
    equal |= __shfl_xor_sync(kAllLanes, equal, d);
  }
  if (left == 0) equal = 0;
  while (__popc(equal) > left) equal &= ~(0x80000000u >> __clz(equal));
  left -= __popc(equal);
  return above | equal;
}

template <class T, int WIDTH>
__global__ void __launch_bounds__(SelectionBlock<T, WIDTH>::kThreads, 1)
    topk_selection_kernel(const __grid_constant__ TopKSelectionParams params) {
  using Block = SelectionBlock<T, WIDTH>;
  constexpr int kKeys = Block::kKeys, kStages = Block::kStages;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ KeyRange scratch[Block::kThreads / kWarpSize];
  __shared__ Choice choices[Block::kRows];
  const CrossAttentionCall& c = params.call;
  const CrossAttentionShape& shape = c.shape;
  const int n_rows = shape.Nq * (shape.Hq / shape.Hkv);
  const Place place((n_rows + Block::kRows - 1) / Block::kRows, shape);
  const uint32_t base = ptx::SharedAddress(shared);
  const typename Block::QTile q_tile{base};
  const StayingRows staying(c, place, Block::kRows, scratch);
  staying.template Copy<Block::kThreads>(q_tile, c.q, shape.D, c);
  const int lane = StayingRows::Lane(), row0 = staying.row0;
  const PackedRow(&rows)[2] = staying.rows;
  const ScoreRow score_rows[2] = {{c, staying.b, rows[0], staying.keys[0]},
                                  {c, staying.b, rows[1], staying.keys[1]}};
  const int begin = staying.range.begin / kKeys * kKeys, end = staying.range.end;

  const auto k_tile = [&](int stage) {
    return typename Block::KTile{base + Block::QTile::kBytes + stage * Block::KTile::kBytes};
  };
  const auto copy_keys = [&](int k0, int stage) {
    CopyKeys<Block::kThreads>(k_tile(stage), RowOf<const T>(c.k, staying.b, staying.hkv, 0),
                              c.k.strides[2], shape.D, k0, end, c.aligned);
  };
  // Calls visit(k0, u) for every tile of keys; u [16, kKeys] per warp has the ordered scores of the
  // keys from k0 on.
  const auto walk = [&](auto visit) {
    int stage = 0;
    if (kStages == 2 && begin < end) copy_keys(begin, 0);
    ptx::CommitCopies();
    for (int k0 = begin; k0 < end; k0 += kKeys, stage ^= kStages - 1) {
      if (kStages == 1)
        copy_keys(k0, 0);
      else if (k0 + kKeys < end)
        copy_keys(k0 + kKeys, stage ^ 1);
      ptx::CommitCopies();
      ptx::WaitForCopies<kStages - 1>();
      __syncthreads();
      float s[kKeys / 8][4] = {};
      MultiplyTransposed(s, q_tile, row0, k_tile(stage), shape.D);
      uint32_t u[kKeys / 8][4];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = k0 + n * 8 + lane % 4 * 2 + i % 2;
          float tanh;
          u[n][i] = Ordered(score_rows[i / 2].Score(c, j, s[n][i], tanh));
        }
      visit(k0, u);
      __syncthreads();
    }
    ptx::WaitForCopies<0>();
  };

  // A warp shares the histograms and choices of its rows with no other warp.
  int* const histograms =
      reinterpret_cast<int*>(shared + Block::QTile::kBytes + kStages * Block::KTile::kBytes) +
      row0 * Block::kHistogram;
  if (lane < 16) choices[row0 + lane] = {0, params.top_k, false};
  bool all_done = false;
  for (int shift = 24; shift >= 0 && !all_done; shift -= 8) {
    for (int n = lane; n < 16 * Block::kHistogram; n += kWarpSize) histograms[n] = 0;
    __syncwarp();
    const Choice known[2] = {choices[row0 + lane / 4], choices[row0 + lane / 4 + 8]};
    walk([&](int, const uint32_t (&u)[kKeys / 8][4]) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Choice& choice = known[i / 2];
          // There are two shifts because a shift by 32 is undefined.
          const bool agrees = u[n][i] >> 8 >> shift == choice.threshold;
          if (u[n][i] != 0 && agrees && !choice.done) {
            const int row = lane / 4 + i / 2 * 8;
            atomicAdd(&histograms[row * Block::kHistogram + (u[n][i] >> shift & 255)], 1);
          }
        }
    });
    __syncwarp();
    all_done = true;
    for (int n = 0; n < 16; ++n) {
      Choice choice = choices[row0 + n];
      __syncwarp();
      Refine(choice, histograms + n * Block::kHistogram, shift);
      if (lane == 0) choices[row0 + n] = choice;
      all_done &= choice.done;
    }
    all_done = __syncthreads_and(all_done);
  }

  const Choice choice[2] = {choices[row0 + lane / 4], choices[row0 + lane / 4 + 8]};
  const int words = (shape.Nk + 31) / 32;
  uint32_t* row_bits[2];
  for (int r = 0; r < 2; ++r) {
    row_bits[r] = params.bits + RowNumber(shape, staying.b, rows[r]) * words;
    for (int w = lane % 4; rows[r].exists && w < words; w += 4)
      if (w < begin / 32 || w * 32 >= end) row_bits[r][w] = 0;
  }
  int left[2] = {choice[0].ties, choice[1].ties};
  walk([&](int k0, const uint32_t (&u)[kKeys / 8][4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t word = TakeKeys(u, r, choice[r].threshold, left[r]);
      if (lane % 4 == 0 && rows[r].exists) row_bits[r][k0 / 32] = word;
    }
  });
}

constexpr int kIndexWarps = 8;

// Converts bits to indices or indices to bits, with one warp for each row.
__global__ void __launch_bounds__(kIndexWarps* kWarpSize)
    topk_indices_kernel(const __grid_constant__ TopKIndicesParams params) {
  const int64_t row = int64_t{blockIdx.x} * kIndexWarps + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize, words = (params.Nk + 31) / 32;
  if (row >= params.rows) return;
  uint32_t* bits = params.bits + row * words;
  int32_t* indices = params.indices + row * params.top_k;
  if (params.to_bits) {
    for (int w = lane; w < words; w += kWarpSize) bits[w] = 0;
    __syncwarp();
    for (int n = lane; n < params.top_k; n += kWarpSize)
      if (const int j = indices[n]; j >= 0) atomicOr(&bits[j / 32], 1u << j % 32);
    return;
  }
  int n_written = 0;
  for (int w = 0; w < words; ++w) {
    const uint32_t word = bits[w], lane_bit = 1u << lane;
    if (word & lane_bit) indices[n_written + __popc(word & (lane_bit - 1))] = w * 32 + lane;
    n_written += __popc(word);
  }
  for (int n = n_written + lane; n < params.top_k; n += kWarpSize) indices[n] = -1;
}

}  // namespace xattn

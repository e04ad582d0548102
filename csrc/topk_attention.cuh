// Kernels of the choice of keys.
//
// A block has rows of one key head and walks their keys five times: four times to find eight bits
// of each row's lowest chosen score, from histograms in shared memory, and once to write the
// choice. Products are computed again each time, in the same order, so that scores agree in every
// bit; none of them reaches device memory.
#pragma once

#include "attention_scores.cuh"
#include "topk_attention.h"

namespace xattn {

template <class T, int WIDTH>
struct SelectionBlock {
  static constexpr int kRowBytes = WIDTH * sizeof(T);
  static constexpr int kRows = kRowBytes > 256 ? 32 : 64;
  static constexpr int kThreads = kRows / 16 * kWarpSize;
  static constexpr int kKeys = 32;  // of a word
  static constexpr int kStages = kRowBytes > 512 ? 1 : 2;
  using QTile = Tile<T, kRows, WIDTH>;
  using KTile = Tile<T, kKeys, WIDTH>;
  static constexpr int kHistogram = 256 + 1;  // rows begin in different banks
  static constexpr int kBytes =
      QTile::kBytes + kStages * KTile::kBytes + kRows * kHistogram * static_cast<int>(sizeof(int));
};

// Unsigned numbers in the order of scores; 0 for -inf, which is no candidate.
__device__ __forceinline__ uint32_t Ordered(float s) {
  if (s == -INFINITY) return 0;
  if (s != s) return 0xffffffff;
  const uint32_t bits = __float_as_uint(s + 0.f);  // -0 is 0
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

// What is known of a row's choice: the keys above `threshold`, and the first `ties` of those at it.
// Before it is `done`, `threshold` is the highest bits of the lowest chosen score, and `ties` how
// many are to be chosen of those that have them.
struct Choice {
  uint32_t threshold;
  int ties;
  bool done;
};

// Takes the next eight bits of a choice, the `shift` lower ones being unknown, from the counts of
// those bits among the row's scores that agree in all higher ones. A warp calls it.
__device__ __forceinline__ void Refine(Choice& choice, const int* histogram, int shift) {
  const int lane = threadIdx.x % kWarpSize;
  if (choice.done) return;
  // a lane has 8 bins, the first one the highest
  int own = 0;
#pragma unroll
  for (int n = 0; n < 8; ++n) own += histogram[255 - lane * 8 - n];
  int above = own;
#pragma unroll
  for (int d = 1; d < kWarpSize; d *= 2) {
    const int other = __shfl_up_sync(kAllLanes, above, d);
    if (lane >= d) above += other;
  }
  const uint32_t reached = __ballot_sync(kAllLanes, above >= choice.ties);
  if (reached == 0) {  // fewer candidates than top_k, which only the first bits can say
    choice = {0, 0, true};
    return;
  }
  const int from = __ffs(reached) - 1;
  above = __shfl_sync(kAllLanes, above - own, from);
  int digit = 255 - from * 8, count = histogram[digit];
  while (above + count < choice.ties) above += count, count = histogram[--digit];
  choice.threshold = choice.threshold << 8 | static_cast<uint32_t>(digit);
  choice.ties -= above;
  if (shift == 0) {
    choice.done = true;
  } else if (count == choice.ties) {  // all that agree, whatever their lower bits
    choice = {max(choice.threshold << shift, 1u) - 1, 0, true};
  }
}

// Bits of the 32 keys of u, those of half r of a warp's rows, that are above the threshold, and of
// those at it the lowest, as many as are left to take.
template <int N>
__device__ __forceinline__ uint32_t TakeKeys(const uint32_t (&u)[N][4], int r, uint32_t threshold,
                                             int& left) {
  static_assert(N * 8 == 32, "a word");
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
    topk_selection_kernel(const __grid_constant__ TopKSelectionParams p) {
  using Block = SelectionBlock<T, WIDTH>;
  constexpr int kKeys = Block::kKeys, kStages = Block::kStages;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ KeyRange scratch[Block::kThreads / kWarpSize];
  __shared__ Choice choices[Block::kRows];
  const CrossAttentionCall& c = p.call;
  const CrossAttentionShape& shape = c.shape;
  const int n_rows = shape.Nq * (shape.Hq / shape.Hkv);
  const Place place((n_rows + Block::kRows - 1) / Block::kRows, shape);
  const uint32_t base = ptx::SharedAddress(shared);
  const typename Block::QTile q_tile{base};
  const StayingRows own(c, place, Block::kRows, scratch);
  own.template Copy<Block::kThreads>(q_tile, c.q, shape.D, c);
  const int lane = StayingRows::Lane(), row0 = own.row0;
  const PackedRow(&rows)[2] = own.rows;
  const ScoreRow score_rows[2] = {{c, own.b, rows[0], own.keys[0]},
                                  {c, own.b, rows[1], own.keys[1]}};
  const int begin = own.range.begin / kKeys * kKeys, end = own.range.end;

  const auto k_tile = [&](int stage) {
    return typename Block::KTile{base + Block::QTile::kBytes + stage * Block::KTile::kBytes};
  };
  const auto copy_keys = [&](int k0, int stage) {
    CopyKeys<Block::kThreads>(k_tile(stage), RowOf<const T>(c.k, own.b, own.hkv, 0), c.k.strides[2],
                              shape.D, k0, end, c.aligned);
  };
  // visit(k0, u): u [16, kKeys] of a warp, the ordered scores of keys k0 on
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

  // A warp has the histograms and choices of its rows to itself.
  int* const histograms =
      reinterpret_cast<int*>(shared + Block::QTile::kBytes + kStages * Block::KTile::kBytes) +
      row0 * Block::kHistogram;
  if (lane < 16) choices[row0 + lane] = {0, p.top_k, false};
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
          const Choice& of = known[i / 2];
          // in two steps, as a shift by 32 has no meaning
          const bool agrees = u[n][i] >> 8 >> shift == of.threshold;
          if (u[n][i] != 0 && agrees && !of.done) {
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
  uint32_t* to[2];
  for (int r = 0; r < 2; ++r) {
    to[r] = p.bits + RowNumber(shape, own.b, rows[r]) * words;
    for (int w = lane % 4; rows[r].there && w < words; w += 4)
      if (w < begin / 32 || w * 32 >= end) to[r][w] = 0;
  }
  int left[2] = {choice[0].ties, choice[1].ties};
  walk([&](int k0, const uint32_t (&u)[kKeys / 8][4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t word = TakeKeys(u, r, choice[r].threshold, left[r]);
      if (lane % 4 == 0 && rows[r].there) to[r][k0 / 32] = word;
    }
  });
}

constexpr int kIndexWarps = 8;

// A warp for each row.
__global__ void __launch_bounds__(kIndexWarps* kWarpSize)
    topk_indices_kernel(const __grid_constant__ TopKIndicesParams p) {
  const int64_t row = int64_t{blockIdx.x} * kIndexWarps + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize, words = (p.Nk + 31) / 32;
  if (row >= p.rows) return;
  uint32_t* bits = p.bits + row * words;
  int32_t* indices = p.indices + row * p.top_k;
  if (p.to_bits) {
    for (int w = lane; w < words; w += kWarpSize) bits[w] = 0;
    __syncwarp();
    for (int n = lane; n < p.top_k; n += kWarpSize)
      if (const int j = indices[n]; j >= 0) atomicOr(&bits[j / 32], 1u << j % 32);
    return;
  }
  int at = 0;
  for (int w = 0; w < words; ++w) {
    const uint32_t word = bits[w], own = 1u << lane;
    if (word & own) indices[at + __popc(word & (own - 1))] = w * 32 + lane;
    at += __popc(word);
  }
  for (int n = at + lane; n < p.top_k; n += kWarpSize) indices[n] = -1;
}

}  // namespace xattn

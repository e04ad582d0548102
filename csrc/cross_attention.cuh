// Kernels of masked cross-attention.
//
// A block has kBlockQ rows of one key head: queries and the heads that share their keys, packed.
// It walks the tiles of keys between the rows' smallest start and largest stop, two tiles in
// flight, and masks only in tiles that an interval cuts. A warp has 16 rows and all of their
// probabilities in registers.
#pragma once

#include "cross_attention.h"
#include "softmax.cuh"
#include "tile.cuh"
#include "warp.cuh"

namespace xattn {

constexpr int kBlockQ = 64, kBlockK = 64;
constexpr int kAttentionWarps = kBlockQ / 16;
constexpr int kAttentionThreads = kAttentionWarps * kWarpSize;

// The packed row p of a key head: query i of head h.
struct PackedRow {
  int i, h;
  bool there;

  __device__ __forceinline__ PackedRow(const CrossAttentionShape& s, int p, int hkv) {
    const int group = s.Hq / s.Hkv;
    i = p / group;
    h = hkv * group + p % group;
    there = i < s.Nq;
  }
};

struct Interval {
  int first, last;  // keys first <= j < last
};

// A row's keys, none where there is no row.
__device__ __forceinline__ Interval KeysOf(const CrossAttentionForwardParams& p, int b,
                                           const PackedRow& row) {
  if (!row.there) return {p.shape.Nk, 0};
  Interval keys{0, p.shape.Nk};
  if (p.start.data != nullptr) {
    keys.first = max(p.start.data[b * p.start.strides[0] + row.i * p.start.strides[1]], 0);
    keys.last = min(p.stop.data[b * p.stop.strides[0] + row.i * p.stop.strides[1]], keys.last);
  }
  if (keys.first >= keys.last) keys = {p.shape.Nk, 0};
  return keys;
}

// Of the rows of a block: the keys that any of them sees, and those that all of them see.
struct KeyRange {
  int begin, end, full_begin, full_end;

  // Every thread gives two rows; `scratch` has four places for each warp.
  __device__ __forceinline__ KeyRange(const Interval (&rows)[2], const bool (&there)[2], int n_keys,
                                      int* scratch)
      : begin(n_keys), end(0), full_begin(0), full_end(n_keys) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      begin = min(begin, rows[n].first);
      end = max(end, rows[n].last);
      if (there[n]) {
        full_begin = max(full_begin, rows[n].first);
        full_end = min(full_end, rows[n].last);
      }
    }
    begin = __reduce_min_sync(kAllLanes, begin), end = __reduce_max_sync(kAllLanes, end);
    full_begin = __reduce_max_sync(kAllLanes, full_begin);
    full_end = __reduce_min_sync(kAllLanes, full_end);
    const int warp = threadIdx.x / kWarpSize;
    if (threadIdx.x % kWarpSize == 0) {
      int* own = scratch + warp * 4;
      own[0] = begin, own[1] = end, own[2] = full_begin, own[3] = full_end;
    }
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      const int* other = scratch + w * 4;
      begin = min(begin, other[0]), end = max(end, other[1]);
      full_begin = max(full_begin, other[2]), full_end = min(full_end, other[3]);
    }
    begin = begin / kBlockK * kBlockK;
  }
};

template <class T>
__device__ __forceinline__ uint32_t Pack(float low, float high) {
  Vector<T, 2> pair{{FromFloat<T>(low), FromFloat<T>(high)}};
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <class T, int WIDTH, int WIDTH_V>
__global__ void __launch_bounds__(kAttentionThreads)
    cross_attention_forward_kernel(const __grid_constant__ CrossAttentionForwardParams p) {
  using QTile = Tile<T, kBlockQ, WIDTH>;
  using KTile = Tile<T, kBlockK, WIDTH>;
  using VTile = Tile<T, kBlockK, WIDTH_V>;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ int scratch[kAttentionWarps * 4];
  const CrossAttentionShape& shape = p.shape;
  const int hkv = blockIdx.y, b = blockIdx.z, p0 = blockIdx.x * kBlockQ;
  const int lane = threadIdx.x % kWarpSize, row0 = threadIdx.x / kWarpSize * 16;

  const uint32_t base = ptx::SharedAddress(shared);
  const QTile q_tile{base};
  const T* q = static_cast<const T*>(p.q.data) + b * p.q.strides[0];
  const auto q_row = [&](int n) -> const T* {
    const PackedRow row(shape, p0 + n, hkv);
    return row.there ? q + row.h * p.q.strides[1] + row.i * p.q.strides[2] : nullptr;
  };
  q_tile.template Copy<kAttentionThreads>(q_row, shape.D, q);

  const PackedRow rows[2] = {{shape, p0 + row0 + lane / 4, hkv},
                             {shape, p0 + row0 + lane / 4 + 8, hkv}};
  const Interval keys[2] = {KeysOf(p, b, rows[0]), KeysOf(p, b, rows[1])};
  const bool there[2] = {rows[0].there, rows[1].there};
  const KeyRange range(keys, there, shape.Nk, scratch);

  const T* k = static_cast<const T*>(p.k.data) + b * p.k.strides[0] + hkv * p.k.strides[1];
  const T* v = static_cast<const T*>(p.v.data) + b * p.v.strides[0] + hkv * p.v.strides[1];
  const auto k_tile = [&](int stage) {
    return KTile{base + QTile::kBytes + stage * (KTile::kBytes + VTile::kBytes)};
  };
  const auto v_tile = [&](int stage) { return VTile{k_tile(stage).base + KTile::kBytes}; };
  // Keys that no row sees are zeros, whatever lies there.
  const auto copy_keys = [&](int k0, int stage) {
    const auto row_of = [&](const T* t, const HeadTensor& of, int n) -> const T* {
      return k0 + n < range.end ? t + (k0 + n) * of.strides[2] : nullptr;
    };
    k_tile(stage).template Copy<kAttentionThreads>([&](int n) { return row_of(k, p.k, n); },
                                                   shape.D, k);
    v_tile(stage).template Copy<kAttentionThreads>([&](int n) { return row_of(v, p.v, n); },
                                                   shape.Dv, v);
  };
  if (range.begin < range.end) copy_keys(range.begin, 0);
  ptx::CommitCopies();

  SoftmaxState state[2];
  // [16, WIDTH_V] of a warp
  float acc[WIDTH_V / 8][4] = {};
  const float scale = shape.scale * 1.4426950408889634f;
  int stage = 0;
  for (int k0 = range.begin; k0 < range.end; k0 += kBlockK, stage ^= 1) {
    if (k0 + kBlockK < range.end) copy_keys(k0 + kBlockK, stage ^ 1);
    ptx::CommitCopies();
    ptx::WaitForCopies<1>();
    __syncthreads();
    // [16, kBlockK] of a warp
    float s[kBlockK / 8][4] = {};
#pragma unroll
    for (int step = 0; step < WIDTH / 16; ++step) {
      uint32_t a[4];
      q_tile.LoadA(a, row0, step);
#pragma unroll
      for (int n = 0; n < kBlockK / 16; ++n) {
        uint32_t both[2][2];
        k_tile(stage).LoadB(both, n * 16, step);
        ptx::Mma<T>(s[2 * n], a, both[0]);
        ptx::Mma<T>(s[2 * n + 1], a, both[1]);
      }
    }
    const bool cut = k0 < range.full_begin || k0 + kBlockK > range.full_end;
    float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < kBlockK / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] *= scale;
        const int j = k0 + n * 8 + lane % 4 * 2 + i % 2;
        if (cut && (j < keys[i / 2].first || j >= keys[i / 2].last)) s[n][i] = -INFINITY;
        largest[i / 2] = fmaxf(largest[i / 2], s[n][i]);
      }
    float sum[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // the four lanes of a row
      largest[r] = fmaxf(largest[r], __shfl_xor_sync(kAllLanes, largest[r], 1));
      largest[r] = fmaxf(largest[r], __shfl_xor_sync(kAllLanes, largest[r], 2));
      const float alpha = state[r].Raise(largest[r]);
#pragma unroll
      for (int n = 0; n < WIDTH_V / 8; ++n) acc[n][2 * r] *= alpha, acc[n][2 * r + 1] *= alpha;
    }
#pragma unroll
    for (int n = 0; n < kBlockK / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = ptx::Exp2(s[n][i] - state[i / 2].Shift());
        sum[i / 2] += s[n][i];
      }
    state[0].l += sum[0], state[1].l += sum[1];  // of this lane's columns
#pragma unroll
    for (int step = 0; step < kBlockK / 16; ++step) {
      const uint32_t a[4] = {Pack<T>(s[2 * step][0], s[2 * step][1]),
                             Pack<T>(s[2 * step][2], s[2 * step][3]),
                             Pack<T>(s[2 * step + 1][0], s[2 * step + 1][1]),
                             Pack<T>(s[2 * step + 1][2], s[2 * step + 1][3])};
#pragma unroll
      for (int n = 0; n < WIDTH_V / 16; ++n) {
        uint32_t both[2][2];
        v_tile(stage).LoadBTransposed(both, step * 16, n);
        ptx::Mma<T>(acc[2 * n], a, both[0]);
        ptx::Mma<T>(acc[2 * n + 1], a, both[1]);
      }
    }
    __syncthreads();
  }
  ptx::WaitForCopies<0>();

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float& l = state[r].l;
    l += __shfl_xor_sync(kAllLanes, l, 1);
    l += __shfl_xor_sync(kAllLanes, l, 2);
    if (!there[r]) continue;
    const float inverse = state[r].Inverse();
    if (lane % 4 == 0)
      p.lse[(int64_t{b} * shape.Hq + rows[r].h) * shape.Nq + rows[r].i] = state[r].Lse();
    T* out = static_cast<T*>(p.out.data) + b * p.out.strides[0] + rows[r].h * p.out.strides[1] +
             rows[r].i * p.out.strides[2];
#pragma unroll
    for (int n = 0; n < WIDTH_V / 8; ++n) {
      const int column = n * 8 + lane % 4 * 2;
      if (column < shape.Dv)
        *reinterpret_cast<uint32_t*>(out + column) =
            Pack<T>(acc[n][2 * r] * inverse, acc[n][2 * r + 1] * inverse);
    }
  }
}

}  // namespace xattn

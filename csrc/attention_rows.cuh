// What attention kernels walk: packed rows, their key intervals, and tiles of keys or rows.
#pragma once

#include "cross_attention.h"
#include "tile.cuh"
#include "warp.cuh"

namespace xattn {

// How a kernel for rows of WIDTH elements is cut. Each warp has 16 of the rows that stay, and the
// tiles that pass by are shared by all. Sized for 99 KiB of shared memory, which all have.
template <class T, int WIDTH>
struct AttentionBlock {
  static constexpr int kRowBytes = WIDTH * sizeof(T);
  static constexpr int kRows = kRowBytes > 512 ? 32 : 64;
  static constexpr int kThreads = kRows / 16 * kWarpSize;
  // of keys that pass by the forward's rows and those of dq, and of rows that pass by keys
  static constexpr int kKeys = kRowBytes > 512 ? 16 : kRowBytes > 256 || sizeof(T) == 4 ? 32 : 64;
  static constexpr int kPassingRows = kRowBytes > 512 ? 16 : kRowBytes > 128 ? 32 : 64;
  // tiles in flight of the backward; the forward has two
  static constexpr int kStages = kRowBytes > 256 ? 1 : 2;
};

// A block's place in a 1-d grid, which has no limit of 65,535.
struct Place {
  int tile, hkv, b, split;

  __device__ __forceinline__ Place(int n_tiles, const CrossAttentionShape& s) {
    unsigned n = blockIdx.x;
    tile = n % n_tiles, n /= n_tiles;
    hkv = n % s.Hkv, n /= s.Hkv;
    b = n % s.B, split = n / s.B;
  }
};

// The part of [begin, end) that is this split's, in whole tiles.
__device__ __forceinline__ void SplitRange(int& begin, int& end, int split, int n_splits,
                                           int tile) {
  const int tiles = (max(end - begin, 0) + tile - 1) / tile;
  const int each = (tiles + n_splits - 1) / n_splits * tile;
  begin = begin + split * each;
  end = min(end, begin + each);
}

// The packed row p of a key head: query i of head h.
struct PackedRow {
  int i, h;
  bool there;

  __device__ __forceinline__ PackedRow(int query, int head, bool is_there)
      : i(query), h(head), there(is_there) {}

  __device__ __forceinline__ PackedRow(const CrossAttentionShape& s, int p, int hkv) {
    const int group = s.Hq / s.Hkv;
    i = group == 1 ? p : p / group;
    h = hkv * group + p - i * group;
    there = i < s.Nq;
  }
};

template <class T>
__device__ __forceinline__ T* RowOf(const HeadTensor& t, int b, int h, int n) {
  return static_cast<T*>(t.data) + b * t.strides[0] + h * t.strides[1] + n * t.strides[2];
}

// Of [B, Hq, Nq].
__device__ __forceinline__ int64_t RowNumber(const CrossAttentionShape& s, int b,
                                             const PackedRow& row) {
  return (int64_t{b} * s.Hq + row.h) * s.Nq + row.i;
}

struct Interval {
  int first, last;  // keys first <= j < last

  __device__ __forceinline__ bool Has(int j) const { return j >= first && j < last; }
};

// A row's keys, (Nk, 0) where there is none, or no row.
__device__ __forceinline__ Interval KeysOf(const CrossAttentionCall& c, int b,
                                           const PackedRow& row) {
  Interval keys{0, c.shape.Nk};
  if (row.there && c.start.data != nullptr) {
    keys.first = max(c.start.data[b * c.start.strides[0] + row.i * c.start.strides[1]], 0);
    keys.last = min(c.stop.data[b * c.stop.strides[0] + row.i * c.stop.strides[1]], keys.last);
  }
  if (!row.there || keys.first >= keys.last) return {c.shape.Nk, 0};
  return keys;
}

// Of rows: the keys that any of them sees, and those that all of them see.
struct KeyRange {
  int begin, end, full_begin, full_end;

  KeyRange() = default;
  __device__ __forceinline__ explicit KeyRange(int n_keys)
      : begin(n_keys), end(0), full_begin(0), full_end(n_keys) {}

  __device__ __forceinline__ void Add(const KeyRange& r) {
    begin = min(begin, r.begin), end = max(end, r.end);
    full_begin = max(full_begin, r.full_begin), full_end = min(full_end, r.full_end);
  }

  __device__ __forceinline__ void Add(const Interval& keys) {
    begin = min(begin, keys.first), end = max(end, keys.last);
    full_begin = max(full_begin, keys.first), full_end = min(full_end, keys.last);
  }

  __device__ __forceinline__ void AddLanes() {
    begin = __reduce_min_sync(kAllLanes, begin), end = __reduce_max_sync(kAllLanes, end);
    full_begin = __reduce_max_sync(kAllLanes, full_begin);
    full_end = __reduce_min_sync(kAllLanes, full_end);
  }

  // For all threads of the block; `scratch` has a place for each warp.
  __device__ __forceinline__ void AddWarps(KeyRange* scratch) {
    AddLanes();
    if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = *this;
    __syncthreads();
    for (int w = 0; w < static_cast<int>(blockDim.x) / kWarpSize; ++w) Add(scratch[w]);
  }

  // Whether some row does not see all of the keys from k0 on.
  __device__ __forceinline__ bool Cuts(int k0, int n) const {
    return k0 < full_begin || k0 + n > full_end;
  }
};

// The packed rows of a block whose warps have 16 each, and what a lane knows of its two.
struct StayingRows {
  int hkv, b, p0, row0;
  PackedRow rows[2];
  Interval keys[2];
  KeyRange range;  // of the rows that are there

  // For all threads of the block; `scratch` has a place for each warp.
  __device__ __forceinline__ StayingRows(const CrossAttentionCall& c, const Place& place,
                                         int n_rows, KeyRange* scratch)
      : hkv(place.hkv),
        b(place.b),
        p0(place.tile * n_rows),
        row0(threadIdx.x / kWarpSize * 16),
        rows{PackedRow(c.shape, p0 + row0 + Lane() / 4, hkv),
             PackedRow(c.shape, p0 + row0 + Lane() / 4 + 8, hkv)},
        keys{KeysOf(c, b, rows[0]), KeysOf(c, b, rows[1])},
        range(c.shape.Nk) {
    for (int r = 0; r < 2; ++r)
      if (rows[r].there) range.Add(keys[r]);
    range.AddWarps(scratch);
  }

  static __device__ __forceinline__ int Lane() { return threadIdx.x % kWarpSize; }

  // Begins to copy them from `t`, `width` columns.
  template <int THREADS, class T, int ROWS, int WIDTH>
  __device__ __forceinline__ void Copy(const Tile<T, ROWS, WIDTH>& tile, const HeadTensor& t,
                                       int width, const CrossAttentionCall& c) const {
    const auto row_of = [&](int n) -> const T* {
      const PackedRow row(c.shape, p0 + n, hkv);
      return row.there ? RowOf<const T>(t, b, row.h, row.i) : nullptr;
    };
    tile.template Copy<THREADS>(row_of, width, static_cast<const T*>(t.data), c.aligned);
  }
};

// Keys j0 <= j < last; further rows of the tile are zeros, whatever lies there.
template <int THREADS, class T, int ROWS, int WIDTH>
__device__ __forceinline__ void CopyKeys(const Tile<T, ROWS, WIDTH>& tile, const T* t,
                                         int64_t stride, int width, int j0, int last,
                                         bool aligned) {
  const auto row_of = [&](int n) -> const T* {
    return j0 + n < last ? t + (j0 + n) * stride : nullptr;
  };
  tile.template Copy<THREADS>(row_of, width, t, aligned);
}

// Two tensors whose rows pass by: STAGES pairs of tiles in shared memory.
template <class T, int ROWS, int WIDTH, int STAGES, int THREADS>
struct PassingTiles {
  using One = Tile<T, ROWS, WIDTH>;
  static constexpr int kBytes = 2 * STAGES * One::kBytes;

  uint32_t base;

  __device__ __forceinline__ One First(int stage) const { return {base + stage * 2 * One::kBytes}; }
  __device__ __forceinline__ One Second(int stage) const {
    return {First(stage).base + One::kBytes};
  }

  // Keys j0 <= j < last of k and v.
  __device__ __forceinline__ void CopyKeysAndValues(const CrossAttentionCall& c, int b, int hkv,
                                                    int stage, int j0, int last) const {
    CopyKeys<THREADS>(First(stage), RowOf<const T>(c.k, b, hkv, 0), c.k.strides[2], c.shape.D, j0,
                      last, c.aligned);
    CopyKeys<THREADS>(Second(stage), RowOf<const T>(c.v, b, hkv, 0), c.v.strides[2], c.shape.Dv, j0,
                      last, c.aligned);
  }
};

// The tiles of rows that reach the keys [k0, k1), in ascending order; the same for all THREADS, all
// of which must call it. Without bounds every tile does.
template <int THREADS>
class MeetingTiles {
 public:
  __device__ __forceinline__ MeetingTiles(const int4* bounds, int begin, int end, int k0, int k1,
                                          uint32_t* words)
      : bounds_(bounds),
        words_(words),
        next_(begin),
        end_(end),
        chunk_(begin - THREADS),
        k0_(k0),
        k1_(k1) {}

  // The next one, or a number from `end` on.
  __device__ __forceinline__ int Next() {
    if (bounds_ == nullptr) return next_++;
    while (next_ < end_) {
      if (next_ >= chunk_ + THREADS) Find();
      const int at = next_ - chunk_;
      if (const uint32_t left = words_[at / 32] >> at % 32) {
        next_ += __ffs(left);
        return next_ - 1;
      }
      next_ = chunk_ + (at / 32 + 1) * 32;
    }
    return end_;
  }

 private:
  // One bit for each of THREADS tiles from next_ on: whether some row of it sees one of the keys.
  __device__ __forceinline__ void Find() {
    chunk_ = next_;
    const int t = chunk_ + threadIdx.x;
    const int4 of = t < end_ ? bounds_[t] : int4{0, 0, 0, 0};
    const uint32_t word = __ballot_sync(kAllLanes, t < end_ && of.x < k1_ && of.w > k0_);
    __syncthreads();
    if (threadIdx.x % kWarpSize == 0) words_[threadIdx.x / kWarpSize] = word;
    __syncthreads();
  }

  const int4* bounds_;
  uint32_t* words_;
  int next_, end_, chunk_, k0_, k1_;
};

// Writes what this lane has of a row, as sums of a product lie: columns 8 n + 2 (lane % 4) and the
// next, times `factor`.
template <class T, int HALF, int N>
__device__ __forceinline__ void StoreRow(T* to, const float (&c)[N][4], float factor, int width) {
  const int lane = threadIdx.x % kWarpSize;
  const bool pairs = reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int column = n * 8 + lane % 4 * 2;
    const float x[2] = {c[n][2 * HALF] * factor, c[n][2 * HALF + 1] * factor};
    if (pairs && column + 1 < width) {
      StoreFloats<T, 2>(to + column, x);
    } else {
      if (column < width) to[column] = FromFloat<T>(x[0]);
      if (column + 1 < width) to[column + 1] = FromFloat<T>(x[1]);
    }
  }
}

}  // namespace xattn

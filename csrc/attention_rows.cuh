// What the kernels of attention iterate over: packed rows, their key intervals, and tiles.
#pragma once

#include "cross_attention.h"
#include "tile.cuh"
#include "warp.cuh"

namespace xattn {

// The tile sizes of a block whose rows have WIDTH elements. Each warp keeps 16 rows for the
// whole loop ("staying" rows), and all warps share the tiles that the loop loads ("passing" ones).
// The sizes fit into 99 KiB of shared memory, which every device from sm_80 on has.
template <class T, int WIDTH>
struct AttentionBlock {
  static constexpr int kRowBytes = WIDTH * sizeof(T);
  static constexpr int kRows = kRowBytes > 512 ? 32 : 64;
  static constexpr int kThreads = kRows / 16 * kWarpSize;
  // The forward and dq load kKeys keys at a time, dk and dv kPassingRows rows.
  static constexpr int kKeys = kRowBytes > 512 ? 16 : kRowBytes > 256 || sizeof(T) == 4 ? 32 : 64;
  static constexpr int kPassingRows = kRowBytes > 512 ? 16 : kRowBytes > 128 ? 32 : 64;
  // The backward has kStages tiles in flight, the forward two.
  static constexpr int kStages = kRowBytes > 256 ? 1 : 2;
};

// What a block works on. The grid is 1-d, because its other dimensions end at 65,535.
struct Place {
  int tile, hkv, b, split;

  __device__ __forceinline__ Place(int n_tiles, const CrossAttentionShape& s) {
    unsigned n = blockIdx.x;
    tile = n % n_tiles, n /= n_tiles;
    hkv = n % s.Hkv, n /= s.Hkv;
    b = n % s.B, split = n / s.B;
  }
};

// Narrows [begin, end) to the whole tiles of one split.
__device__ __forceinline__ void SplitRange(int& begin, int& end, int split, int n_splits,
                                           int tile) {
  const int tiles = (max(end - begin, 0) + tile - 1) / tile;
  const int each = (tiles + n_splits - 1) / n_splits * tile;
  begin = begin + split * each;
  end = min(end, begin + each);
}

// A row of the scores, query i of head h. All queries of the heads that share a key head are
// packed: query i of the n-th of them is row i * group + n. The last tile may have rows that do not
// exist.
struct PackedRow {
  int i, h;
  bool exists;

  __device__ __forceinline__ PackedRow(int query, int head, bool row_exists)
      : i(query), h(head), exists(row_exists) {}

  __device__ __forceinline__ PackedRow(const CrossAttentionShape& s, int packed, int hkv) {
    const int group = s.Hq / s.Hkv;
    i = group == 1 ? packed : packed / group;
    h = hkv * group + packed - i * group;
    exists = i < s.Nq;
  }
};

template <class T>
__device__ __forceinline__ T* RowOf(const HeadTensor& t, int b, int h, int n) {
  return static_cast<T*>(t.data) + b * t.strides[0] + h * t.strides[1] + n * t.strides[2];
}

// The index of a row in [B, Hq, Nq].
__device__ __forceinline__ int64_t RowNumber(const CrossAttentionShape& s, int b,
                                             const PackedRow& row) {
  return (int64_t{b} * s.Hq + row.h) * s.Nq + row.i;
}

struct Interval {
  int first, last;  // first <= j < last

  __device__ __forceinline__ bool Has(int j) const { return j >= first && j < last; }
};

// The keys of a row. The interval is (Nk, 0) where the row has no key or does not exist.
__device__ __forceinline__ Interval KeysOf(const CrossAttentionCall& c, int b,
                                           const PackedRow& row) {
  Interval keys{0, c.shape.Nk};
  if (row.exists && c.start.data != nullptr) {
    keys.first = max(c.start.data[b * c.start.strides[0] + row.i * c.start.strides[1]], 0);
    keys.last = min(c.stop.data[b * c.stop.strides[0] + row.i * c.stop.strides[1]], keys.last);
  }
  if (!row.exists || keys.first >= keys.last) return {c.shape.Nk, 0};
  return keys;
}

// The keys [begin, end) that some of several rows see, and [full_begin, full_end) that all see.
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

  // Every thread of the block must call this; `scratch` has one element for each warp.
  __device__ __forceinline__ void AddWarps(KeyRange* scratch) {
    AddLanes();
    if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = *this;
    __syncthreads();
    for (int w = 0; w < static_cast<int>(blockDim.x) / kWarpSize; ++w) Add(scratch[w]);
  }

  // Whether some row does not see all of the n keys from k0 on.
  __device__ __forceinline__ bool Cuts(int k0, int n) const {
    return k0 < full_begin || k0 + n > full_end;
  }
};

// The packed rows that a block keeps, 16 for each warp. A lane has two of them in its fragments.
struct StayingRows {
  int hkv, b, p0, row0;
  PackedRow rows[2];
  Interval keys[2];
  KeyRange range;  // of the rows that exist

  // Every thread of the block must call this; `scratch` has one element for each warp.
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
      if (rows[r].exists) range.Add(keys[r]);
    range.AddWarps(scratch);
  }

  static __device__ __forceinline__ int Lane() { return threadIdx.x % kWarpSize; }

  // Starts to copy the first `width` columns of these rows of `t`.
  template <int THREADS, class T, int ROWS, int WIDTH>
  __device__ __forceinline__ void Copy(const Tile<T, ROWS, WIDTH>& tile, const HeadTensor& t,
                                       int width, const CrossAttentionCall& c) const {
    const auto row_of = [&](int n) -> const T* {
      const PackedRow row(c.shape, p0 + n, hkv);
      return row.exists ? RowOf<const T>(t, b, row.h, row.i) : nullptr;
    };
    tile.template Copy<THREADS>(row_of, width, static_cast<const T*>(t.data), c.aligned);
  }
};

// Starts to copy the keys j0 <= j < last. The other rows of the tile become zeros, because memory
// after the last key may hold NaN.
template <int THREADS, class T, int ROWS, int WIDTH>
__device__ __forceinline__ void CopyKeys(const Tile<T, ROWS, WIDTH>& tile, const T* t,
                                         int64_t stride, int width, int j0, int last,
                                         bool aligned) {
  const auto row_of = [&](int n) -> const T* {
    return j0 + n < last ? t + (j0 + n) * stride : nullptr;
  };
  tile.template Copy<THREADS>(row_of, width, t, aligned);
}

// STAGES pairs of tiles in shared memory, for two tensors whose rows a loop loads together.
template <class T, int ROWS, int WIDTH, int STAGES, int THREADS>
struct PassingTiles {
  using One = Tile<T, ROWS, WIDTH>;
  static constexpr int kBytes = 2 * STAGES * One::kBytes;

  uint32_t base;

  __device__ __forceinline__ One First(int stage) const { return {base + stage * 2 * One::kBytes}; }
  __device__ __forceinline__ One Second(int stage) const {
    return {First(stage).base + One::kBytes};
  }

  // Starts to copy the keys j0 <= j < last of k and v.
  __device__ __forceinline__ void CopyKeysAndValues(const CrossAttentionCall& c, int b, int hkv,
                                                    int stage, int j0, int last) const {
    CopyKeys<THREADS>(First(stage), RowOf<const T>(c.k, b, hkv, 0), c.k.strides[2], c.shape.D, j0,
                      last, c.aligned);
    CopyKeys<THREADS>(Second(stage), RowOf<const T>(c.v, b, hkv, 0), c.v.strides[2], c.shape.Dv, j0,
                      last, c.aligned);
  }
};

// Iterates over the tiles of rows that see some of the keys [k0, k1), in ascending order. All
// THREADS of the block must call it, and get the same tiles. Without bounds every tile counts.
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

  // The next tile, or a number from `end` on after the last one.
  __device__ __forceinline__ int Next() {
    if (bounds_ == nullptr) return next_++;
    while (next_ < end_) {
      if (next_ >= chunk_ + THREADS) Find();
      const int bit = next_ - chunk_;
      if (const uint32_t left = words_[bit / 32] >> bit % 32) {
        next_ += __ffs(left);
        return next_ - 1;
      }
      next_ = chunk_ + (bit / 32 + 1) * 32;
    }
    return end_;
  }

 private:
  // Sets one bit for each of THREADS tiles from next_ on that has a row which sees one of the keys.
  __device__ __forceinline__ void Find() {
    chunk_ = next_;
    const int t = chunk_ + threadIdx.x;
    const int4 bounds = t < end_ ? bounds_[t] : int4{0, 0, 0, 0};
    const uint32_t word = __ballot_sync(kAllLanes, t < end_ && bounds.x < k1_ && bounds.w > k0_);
    __syncthreads();
    if (threadIdx.x % kWarpSize == 0) words_[threadIdx.x / kWarpSize] = word;
    __syncthreads();
  }

  const int4* bounds_;
  uint32_t* words_;
  int next_, end_, chunk_, k0_, k1_;
};

// Writes this lane's elements of a row, times `factor`. They are those of the fragment of a
// product: columns 8 n + 2 (lane % 4) and the next one.
template <class T, int HALF, int N>
__device__ __forceinline__ void StoreRow(T* row, const float (&c)[N][4], float factor, int width) {
  const int lane = threadIdx.x % kWarpSize;
  const bool pairs = reinterpret_cast<uintptr_t>(row) % (2 * sizeof(T)) == 0;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int column = n * 8 + lane % 4 * 2;
    const float x[2] = {c[n][2 * HALF] * factor, c[n][2 * HALF + 1] * factor};
    if (pairs && column + 1 < width) {
      StoreFloats<T, 2>(row + column, x);
    } else {
      if (column < width) row[column] = FromFloat<T>(x[0]);
      if (column + 1 < width) row[column + 1] = FromFloat<T>(x[1]);
    }
  }
}

}  // namespace xattn

// Tiles of rows in shared memory, and the products that a warp computes from them. The fragments
// are those of ptx.cuh. A row's index permutes the 16-byte chunks of the row, so that the same
// chunk of eight rows lies in different banks.
#pragma once

#include "ptx.cuh"
#include "types.cuh"

namespace xattn {

// ROWS rows of WIDTH elements. A row covers all 32 banks a whole number of times.
template <class T, int ROWS, int WIDTH>
struct Tile {
  static_assert(WIDTH * sizeof(T) % 128 == 0, "a row covers all banks a whole number of times");
  static constexpr int kChunk = 16 / sizeof(T);  // elements that one copy moves
  static constexpr int kChunks = WIDTH / kChunk;
  static constexpr int kDepth = 2 * kChunk;  // the inner dimension of one mma
  static constexpr int kRowBytes = WIDTH * sizeof(T);
  static constexpr int kBytes = ROWS * kRowBytes;

  uint32_t base;  // address in shared memory, a multiple of 128

  __device__ __forceinline__ uint32_t At(int row, int chunk) const {
    return base + row * kRowBytes + ((chunk ^ (row & 7)) * 16);
  }

  // Equals At(row + more_rows, chunk + 2 pair) if chunk is 0 or 1 and more_rows is a multiple of 8.
  // Loops change only more_rows and pair, so one exclusive or serves all rows of a pair.
  __device__ __forceinline__ uint32_t At(int row, int chunk, int more_rows, int pair) const {
    return (At(row, chunk) ^ (pair % 4 * 32)) + pair / 4 * 128 + more_rows * kRowBytes;
  }

  // Starts to copy the first `width` columns of row_of(n) into row n, or zeros if row_of(n) is
  // null. Further columns up to a multiple of 16 become zero. All THREADS must call it. If the rows
  // are not `aligned` to 16 bytes, it reads them element by element. `any` is a valid address.
  template <int THREADS, class F>
  __device__ __forceinline__ void Copy(F row_of, int width, const T* any, bool aligned) const {
    const int columns = (width + 15) / 16 * 16;
    for (int n = threadIdx.x; n < ROWS * kChunks; n += THREADS) {
      const int row = n / kChunks, column = n % kChunks * kChunk;
      if (WIDTH > 64 && column >= columns) continue;
      const T* source = row_of(row);
      const int valid = source == nullptr ? 0 : min(max(width - column, 0), kChunk);
      if (aligned) {
        ptx::CopyAsync(At(row, n % kChunks), valid != 0 ? source + column : any,
                       valid * static_cast<int>(sizeof(T)));
      } else {
        Vector<T, kChunk> chunk{};
#pragma unroll
        for (int i = 0; i < kChunk; ++i)
          if (i < valid) chunk.x[i] = source[column + i];
        ptx::StoreShared(At(row, n % kChunks), reinterpret_cast<const uint32_t (&)[4]>(chunk));
      }
    }
  }

  // Loads rows row0 to row0 + 15, columns kDepth * step on, as the first operand of an mma.
  __device__ __forceinline__ void LoadA(uint32_t (&a)[4], int row0, int step) const {
    const int lane = threadIdx.x % 32;
    ptx::LoadMatrices(a, At(row0 + lane % 16, lane / 16, 0, step));
  }

  // Loads rows row0 to row0 + 15 as the columns of two second operands, 8 for each. The inner
  // dimension is that of the tile's columns, from kDepth * step on.
  __device__ __forceinline__ void LoadB(uint32_t (&b)[2][2], int row0, int step) const {
    const int lane = threadIdx.x % 32;
    uint32_t matrices[4];
    ptx::LoadMatrices(matrices, At(lane / 16 * 8 + lane % 8, lane / 8 % 2, row0, step));
    b[0][0] = matrices[0], b[0][1] = matrices[1];
    b[1][0] = matrices[2], b[1][1] = matrices[3];
  }

  // Loads columns 16 * pair to 16 * pair + 15 as the columns of two second operands. The inner
  // dimension is that of kDepth rows from row0 on, in the order of `AsOperand`.
  __device__ __forceinline__ void LoadBTransposed(uint32_t (&b)[2][2], int row0, int pair) const {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
      uint32_t matrices[4];
      ptx::LoadMatricesTransposed(matrices, At(lane % 16, lane / 16, row0, pair));
      b[0][0] = matrices[0], b[0][1] = matrices[1];
      b[1][0] = matrices[2], b[1][1] = matrices[3];
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t chunk = At(lane % 4 * 2 + i, lane / 16, row0, pair * 2 + half);
          b[half][i] = ptx::LoadShared(chunk + lane / 4 % 4 * 4);
        }
    }
  }
};

// Two TF32 numbers whose sum is x. If x is inf or NaN, so is `large`, and `finite` is 0; else
// `finite` equals `large`.
struct SplitTf32 {
  uint32_t large, small, finite;

  __device__ __forceinline__ explicit SplitTf32(uint32_t x) {
    constexpr uint32_t kInfinity = 0x7f800000, kHalf = 0x1000, kMantissa = 0xffffe000;
    const uint32_t magnitude = x & 0x7fffffff;
    // Rounding must not turn a finite number into infinity.
    large = (magnitude < kInfinity - kHalf ? x + kHalf : x) & kMantissa;
    const bool is_finite = magnitude < kInfinity;
    small = is_finite ? ptx::ToTf32(__uint_as_float(x) - __uint_as_float(large)) : 0;
    finite = is_finite ? large : 0;
  }
};

// c += a b for one fragment of each. float32 takes three products of TF32, which neglect less than
// 2^-22 of each term. Only one of the three has the infinities, because inf times a small part that
// is 0 would be NaN. The three are added to c outside of the tensor cores, which truncate the small
// terms of a large sum.
template <class T>
__device__ __forceinline__ void Accumulate(float (&c)[4], const uint32_t (&a)[4],
                                           const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 2) {
    ptx::Mma<T>(c, a, b);
  } else {
    const SplitTf32 as[4] = {SplitTf32(a[0]), SplitTf32(a[1]), SplitTf32(a[2]), SplitTf32(a[3])};
    const SplitTf32 bs[2] = {SplitTf32(b[0]), SplitTf32(b[1])};
    float sum[4] = {};
    ptx::MmaTf32(sum, {as[0].small, as[1].small, as[2].small, as[3].small},
                 {bs[0].finite, bs[1].finite});
    ptx::MmaTf32(sum, {as[0].finite, as[1].finite, as[2].finite, as[3].finite},
                 {bs[0].small, bs[1].small});
    ptx::MmaTf32(sum, {as[0].large, as[1].large, as[2].large, as[3].large},
                 {bs[0].large, bs[1].large});
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += sum[i];
  }
}

// Whether products skip the columns beyond the width of a narrower head. In short products of
// 16-bit elements the branch costs more than it saves; products of float32 would spill without it.
template <class T, int WIDTH>
constexpr bool kCanSkip = WIDTH > 64 || sizeof(T) == 4;

// c [16, ROWS] += a[row0 : row0 + 16] b^T, over the first `width` columns of both.
template <class T, int A_ROWS, int ROWS, int WIDTH>
__device__ __forceinline__ void MultiplyTransposed(float (&c)[ROWS / 8][4],
                                                   const Tile<T, A_ROWS, WIDTH>& a, int row0,
                                                   const Tile<T, ROWS, WIDTH>& b, int width) {
  constexpr int kDepth = Tile<T, ROWS, WIDTH>::kDepth;
  // float32 would spill if more steps were unrolled.
  constexpr int kUnroll = sizeof(T) == 4 ? 2 : 8;
#pragma unroll kUnroll
  for (int step = 0; step < WIDTH / kDepth; ++step) {
    if (kCanSkip<T, WIDTH> && step * kDepth >= width) break;
    uint32_t operand[4];
    a.LoadA(operand, row0, step);
#pragma unroll
    for (int n = 0; n < ROWS / 16; ++n) {
      uint32_t both[2][2];
      b.LoadB(both, n * 16, step);
      Accumulate<T>(c[2 * n], operand, both[0]);
      Accumulate<T>(c[2 * n + 1], operand, both[1]);
    }
  }
}

template <class T>
__device__ __forceinline__ uint32_t Pack(float low, float high) {
  Vector<T, 2> pair{{FromFloat<T>(low), FromFloat<T>(high)}};
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Makes a first operand of the columns of p from kDepth * step on; p has the layout of the result
// of a product. float32 takes its columns in another order, and LoadBTransposed the rows in the
// same.
template <class T, int N>
__device__ __forceinline__ void AsOperand(uint32_t (&a)[4], const float (&p)[N][4], int step) {
  if constexpr (sizeof(T) == 2) {
    a[0] = Pack<T>(p[2 * step][0], p[2 * step][1]);
    a[1] = Pack<T>(p[2 * step][2], p[2 * step][3]);
    a[2] = Pack<T>(p[2 * step + 1][0], p[2 * step + 1][1]);
    a[3] = Pack<T>(p[2 * step + 1][2], p[2 * step + 1][3]);
  } else {
    a[0] = __float_as_uint(p[step][0]), a[1] = __float_as_uint(p[step][2]);
    a[2] = __float_as_uint(p[step][1]), a[3] = __float_as_uint(p[step][3]);
  }
}

// c [16, WIDTH] += p [16, ROWS] b [ROWS, WIDTH], for the first `width` columns of b.
template <class T, int ROWS, int WIDTH>
__device__ __forceinline__ void MultiplyInto(float (&c)[WIDTH / 8][4],
                                             const float (&p)[ROWS / 8][4],
                                             const Tile<T, ROWS, WIDTH>& b, int width) {
  constexpr int kDepth = Tile<T, ROWS, WIDTH>::kDepth;
  // Without Opaque the compiler would keep the addresses of single words in registers from one tile
  // to the next, and spill.
  const Tile<T, ROWS, WIDTH> tile{sizeof(T) == 4 ? ptx::Opaque(b.base) : b.base};
#pragma unroll
  for (int step = 0; step < ROWS / kDepth; ++step) {
    uint32_t a[4];
    AsOperand<T>(a, p, step);
#pragma unroll
    for (int n = 0; n < WIDTH / 16; ++n) {
      if (kCanSkip<T, WIDTH> && n * 16 >= width) continue;
      uint32_t both[2][2];
      tile.LoadBTransposed(both, step * kDepth, n);
      Accumulate<T>(c[2 * n], a, both[0]);
      Accumulate<T>(c[2 * n + 1], a, both[1]);
    }
  }
}

}  // namespace xattn

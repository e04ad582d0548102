// Tiles of 16-bit rows in shared memory, without bank conflicts: the 16-byte chunks of a row are
// permuted by the row's number, so that eight rows of one chunk lie in different banks.
#pragma once

#include "ptx.cuh"

namespace xattn {

constexpr int kChunk = 8;  // elements that one copy moves

// ROWS rows of WIDTH elements, a multiple of 64.
template <class T, int ROWS, int WIDTH>
struct Tile {
  static_assert(sizeof(T) == 2 && WIDTH % 64 == 0, "a row is whole periods of the banks");
  static constexpr int kChunks = WIDTH / kChunk;
  static constexpr int kBytes = ROWS * WIDTH * 2;

  uint32_t base;  // address in shared memory, a multiple of 16

  __device__ __forceinline__ uint32_t At(int row, int chunk) const {
    return base + row * WIDTH * 2 + ((chunk ^ (row & 7)) * 16);
  }

  // Begins to copy `width` columns of the rows whose start `row_of(n)` names, or nullptr for a row
  // of zeros; columns from `width` on become zero. All THREADS take part.
  template <int THREADS, class F>
  __device__ __forceinline__ void Copy(F row_of, int width, const T* any) const {
    for (int n = threadIdx.x; n < ROWS * kChunks; n += THREADS) {
      const int row = n / kChunks, chunk = n % kChunks;
      const T* from = row_of(row);
      const int there = from == nullptr ? 0 : min(max(width - chunk * kChunk, 0), kChunk);
      ptx::CopyAsync(At(row, chunk), there ? from + chunk * kChunk : any, there * 2);
    }
  }

  // Rows row0 to +15 and columns 16 step to +15 as the first operand of Mma.
  __device__ __forceinline__ void LoadA(uint32_t (&a)[4], int row0, int step) const {
    const int lane = threadIdx.x % 32;
    ptx::LoadMatrices(a, At(row0 + lane % 16, step * 2 + lane / 16));
  }

  // Rows row0 to +15 as columns of two second operands, each 8 of them; the sum is over columns 16
  // step to +15 of the tile.
  __device__ __forceinline__ void LoadB(uint32_t (&b)[2][2], int row0, int step) const {
    const int lane = threadIdx.x % 32;
    uint32_t found[4];
    ptx::LoadMatrices(found, At(row0 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
    b[0][0] = found[0], b[0][1] = found[1], b[1][0] = found[2], b[1][1] = found[3];
  }

  // Columns 16 pair to +15 as columns of two second operands; the sum is over rows row0 to +15.
  __device__ __forceinline__ void LoadBTransposed(uint32_t (&b)[2][2], int row0, int pair) const {
    const int lane = threadIdx.x % 32;
    uint32_t found[4];
    ptx::LoadMatricesTransposed(found, At(row0 + lane % 16, pair * 2 + lane / 16));
    b[0][0] = found[0], b[0][1] = found[1], b[1][0] = found[2], b[1][1] = found[3];
  }
};

}  // namespace xattn

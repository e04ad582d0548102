// Kernels of the gated residual: forward, backward, and the sums of its parts.
//
// A team of threads walks whole rows of the result, each thread its own columns of every row: one
// warp beside others in a block where rows are short, else the block. What belongs to a column is
// summed in registers over the rows of one team, then over the teams of a block, then over blocks
// in a kernel of its own, always in the same order.
#pragma once

#include "gated_residual.h"
#include "warp.cuh"

namespace xattn {

constexpr int kGatedThreads = 512;  // of a block: the backward's sums take 48 registers of each
constexpr int kGatedGroups = 256;  // blocks of a backward; the same on each device, as its sums are
constexpr int kGatedSumThreads = 128;

// Runs of `vec` columns that a thread has in each row.
__host__ __device__ constexpr int Vectors(int vec) { return vec == 1 ? 8 : 2; }

// The place of a row in the leading dimensions.
struct RowIndex {
  int i[kMaxRowDims];

  __device__ __forceinline__ RowIndex(const RowSizes& rows, int r) {
#pragma unroll
    for (int d = 0; d + 1 < kMaxRowDims; ++d) {
      i[d] = r % rows.sizes[d];
      r /= rows.sizes[d];
    }
    i[kMaxRowDims - 1] = r;
  }

  template <class T>
  __device__ __forceinline__ T* Start(const RowTensor& t) const {
    int64_t at = 0;
#pragma unroll
    for (int d = 0; d < kMaxRowDims; ++d) at += i[d] * t.strides[d];
    return static_cast<T*>(t.data) + at;
  }
};

// A thread's columns of a row: Vectors(VEC) runs of VEC, a block's width apart.
template <int VEC>
struct ColumnRuns {
  int first, step, dim;

  __device__ __forceinline__ explicit ColumnRuns(int dim)
      : first((blockIdx.y * blockDim.x * Vectors(VEC) + threadIdx.x) * VEC),
        step(blockDim.x * VEC),
        dim(dim) {}

  template <class F>
  __device__ __forceinline__ void ForEach(F f) const {
#pragma unroll
    for (int n = 0; n < Vectors(VEC); ++n)
      if (first + n * step < dim) f(n, first + n * step);
  }
};

// tanh of the gate: one number, or one of each column.
struct Gate {
  Numbers numbers;
  bool is_vector;
  float number;

  __device__ __forceinline__ Gate(const Numbers& numbers, bool is_vector)
      : numbers(numbers), is_vector(is_vector), number(is_vector ? 0.f : tanhf(numbers.Load(0))) {}

  __device__ __forceinline__ float At(int c) const {
    return is_vector ? tanhf(numbers.Load(c)) : number;
  }
};

// Sum over the threads that share a row. `scratch` has a place for each warp of a block.
__device__ __forceinline__ float TeamSum(float x, float* scratch) {
  x = WarpSum(x);
  if (blockDim.x == kWarpSize) return x;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  x = WarpSum(lane < blockDim.x / kWarpSize ? scratch[lane] : 0.f);
  __syncthreads();
  return x;
}

// Makes y the normed row before weight and bias, and returns 1 / sqrt(...), by eq. norm.
template <Norm NORM, int VEC>
__device__ __forceinline__ float Normalise(float (&y)[Vectors(VEC)][VEC], ColumnRuns<VEC> columns,
                                           float eps, float* scratch) {
  if constexpr (NORM == Norm::kLayer) {
    float sum = 0.f;
    columns.ForEach([&](int n, int) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) sum += y[n][i];
    });
    const float mean = TeamSum(sum, scratch) / columns.dim;
    columns.ForEach([&](int n, int) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) y[n][i] -= mean;
    });
  }
  float squares = 0.f;
  columns.ForEach([&](int n, int) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) squares += y[n][i] * y[n][i];
  });
  const float factor = 1.f / sqrtf(TeamSum(squares, scratch) / columns.dim + eps);
  columns.ForEach([&](int n, int) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) y[n][i] *= factor;
  });
  return factor;
}

template <class T, class H, int VEC, Norm NORM>
__global__ void __launch_bounds__(kGatedThreads, 2)
    gated_forward_kernel(const __grid_constant__ GatedResidualForwardParams p) {
  __shared__ float scratch[kWarpSize];
  const uint32_t r = blockIdx.x * blockDim.y + threadIdx.y;
  if (r >= p.shape.rows.rows) return;  // all of a team
  const RowIndex row(p.shape.rows, static_cast<int>(r));
  const ColumnRuns<VEC> columns(p.shape.dim);
  const Gate gate(p.gate, p.shape.gate_is_vector);
  const bool gated = p.row_mask.data == nullptr || *row.Start<uint8_t>(p.row_mask) != 0;
  const T* x = row.Start<T>(p.x);
  const H* h = row.Start<H>(p.h);
  T* y = row.Start<T>(p.y);
  float values[Vectors(VEC)][VEC];
  columns.ForEach([&](int n, int c) {
    LoadFloats(values[n], x + c);
    if (gated) {
      float branch[VEC];
      LoadFloats(branch, h + c);
#pragma unroll
      for (int i = 0; i < VEC; ++i) values[n][i] += gate.At(c + i) * branch[i];
    }
    StoreFloats(y + c, values[n]);
    if constexpr (NORM != Norm::kNone) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) values[n][i] = ToFloat(FromFloat<T>(values[n][i]));
    }
  });
  if constexpr (NORM != Norm::kNone) {
    Normalise<NORM>(values, columns, p.shape.eps, scratch);
    T* normed = row.Start<T>(p.normed);
    columns.ForEach([&](int n, int c) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        if (p.weight.data != nullptr) values[n][i] *= p.weight.Load(c + i);
        if (p.bias.data != nullptr) values[n][i] += p.bias.Load(c + i);
      }
      StoreFloats(normed + c, values[n]);
    });
  }
}

// Adds up what the teams of a block hold for each column and stores it as one part.
template <int VEC>
__device__ __forceinline__ void StoreColumnSums(float* parts,
                                                const float (&sums)[Vectors(VEC)][VEC],
                                                ColumnRuns<VEC> columns, float* by_column) {
  const int before = blockIdx.y * blockDim.x * Vectors(VEC) * VEC;
  for (int team = 0; team < blockDim.y; ++team) {
    if (threadIdx.y == team) {
      columns.ForEach([&](int n, int c) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          float& total = by_column[c - before + i];
          total = team == 0 ? sums[n][i] : total + sums[n][i];
        }
      });
    }
    __syncthreads();
  }
  if (threadIdx.y == 0) {
    parts += int64_t{blockIdx.x} * columns.dim;
    columns.ForEach([&](int n, int c) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) parts[c + i] = by_column[c - before + i];
    });
  }
  __syncthreads();
}

template <class T, class H, int VEC, Norm NORM>
__global__ void __launch_bounds__(kGatedThreads)
    gated_backward_kernel(const __grid_constant__ GatedResidualBackwardParams p) {
  extern __shared__ float by_column[];
  __shared__ float scratch[kWarpSize];
  const ColumnRuns<VEC> columns(p.shape.dim);
  const Gate gate(p.gate, p.shape.gate_is_vector);
  float gate_sums[Vectors(VEC)][VEC] = {}, weight_sums[Vectors(VEC)][VEC] = {};
  float bias_sums[Vectors(VEC)][VEC] = {};
  const uint32_t teams = gridDim.x * blockDim.y;  // with it r stays below 2^32
  for (uint32_t r = blockIdx.x * blockDim.y + threadIdx.y; r < p.shape.rows.rows; r += teams) {
    const RowIndex row(p.shape.rows, static_cast<int>(r));
    const bool gated = p.row_mask.data == nullptr || *row.Start<uint8_t>(p.row_mask) != 0;
    float dy[Vectors(VEC)][VEC] = {};
    if constexpr (NORM != Norm::kNone) {
      const T* y = row.Start<T>(p.y);
      const T* dnormed = row.Start<T>(p.dnormed);
      float normed[Vectors(VEC)][VEC];
      columns.ForEach([&](int n, int c) { LoadFloats(normed[n], y + c); });
      const float factor = Normalise<NORM>(normed, columns, p.shape.eps, scratch);
      float along = 0.f, sum = 0.f;
      columns.ForEach([&](int n, int c) {
        LoadFloats(dy[n], dnormed + c);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          weight_sums[n][i] += dy[n][i] * normed[n][i];
          bias_sums[n][i] += dy[n][i];
          if (p.weight.data != nullptr) dy[n][i] *= p.weight.Load(c + i);
          along += dy[n][i] * normed[n][i];
          sum += dy[n][i];
        }
      });
      along = TeamSum(along, scratch) / p.shape.dim;
      const float mean = NORM == Norm::kLayer ? TeamSum(sum, scratch) / p.shape.dim : 0.f;
      columns.ForEach([&](int n, int) {
#pragma unroll
        for (int i = 0; i < VEC; ++i)
          dy[n][i] = factor * (dy[n][i] - (normed[n][i] * along + mean));
      });
    }
    columns.ForEach([&](int n, int c) {
      if (p.dy.data != nullptr) {
        float direct[VEC];
        LoadFloats(direct, row.Start<T>(p.dy) + c);
#pragma unroll
        for (int i = 0; i < VEC; ++i) dy[n][i] += direct[i];
      }
      if (p.dx.data != nullptr) StoreFloats(row.Start<T>(p.dx) + c, dy[n]);
      if (p.gate_parts != nullptr && gated) {
        float branch[VEC];
        LoadFloats(branch, row.Start<H>(p.h) + c);
#pragma unroll
        for (int i = 0; i < VEC; ++i) gate_sums[n][i] += dy[n][i] * branch[i];
      }
      if (p.dh.data != nullptr) {
        float dh[VEC];
#pragma unroll
        for (int i = 0; i < VEC; ++i) dh[i] = gated ? gate.At(c + i) * dy[n][i] : 0.f;
        StoreFloats(row.Start<H>(p.dh) + c, dh);
      }
    });
  }

  if (p.gate_parts != nullptr) {
    if (gate.is_vector) {
      StoreColumnSums(p.gate_parts, gate_sums, columns, by_column);
    } else {
      float gate_sum = 0.f;
#pragma unroll
      for (int n = 0; n < Vectors(VEC); ++n)
#pragma unroll
        for (int i = 0; i < VEC; ++i) gate_sum += gate_sums[n][i];
      gate_sum = BlockSum(gate_sum, scratch);
      if (threadIdx.x == 0 && threadIdx.y == 0)
        p.gate_parts[int64_t{blockIdx.x} * gridDim.y + blockIdx.y] = gate_sum;
    }
  }
  if constexpr (NORM != Norm::kNone) {
    if (p.weight_parts != nullptr) StoreColumnSums(p.weight_parts, weight_sums, columns, by_column);
    if (p.bias_parts != nullptr) StoreColumnSums(p.bias_parts, bias_sums, columns, by_column);
  }
}

struct GatedSums {
  Numbers dgate, dweight, dbias;
  const float *gate_parts, *weight_parts, *bias_parts;
  Numbers gate;
  int dim, groups, column_tiles;
  bool gate_is_vector;
};

// Adds up the parts of all blocks in their order.
__device__ __forceinline__ float SumOfParts(const float* parts, int c, const GatedSums& p) {
  float sum = 0.f;
  for (int group = 0; group < p.groups; ++group) sum += parts[int64_t{group} * p.dim + c];
  return sum;
}

__global__ void __launch_bounds__(kGatedSumThreads)
    gated_sums_kernel(const __grid_constant__ GatedSums p) {
  __shared__ float scratch[kWarpSize];
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c < p.dim) {
    if (p.dweight.data != nullptr) p.dweight.Store(c, SumOfParts(p.weight_parts, c, p));
    if (p.dbias.data != nullptr) p.dbias.Store(c, SumOfParts(p.bias_parts, c, p));
    if (p.dgate.data != nullptr && p.gate_is_vector) {
      const float t = tanhf(p.gate.Load(c));
      p.dgate.Store(c, SumOfParts(p.gate_parts, c, p) * (1.f - t * t));
    }
  }
  if (p.dgate.data != nullptr && !p.gate_is_vector && blockIdx.x == 0) {
    float sum = 0.f;
    for (int n = threadIdx.x; n < p.groups * p.column_tiles; n += blockDim.x)
      sum += p.gate_parts[n];
    sum = BlockSum(sum, scratch);
    const float t = tanhf(p.gate.Load(0));
    if (threadIdx.x == 0) p.dgate.Store(0, sum * (1.f - t * t));
  }
}

}  // namespace xattn

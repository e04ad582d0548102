// Kernels of the gated residual: the forward, the backward, and the sums of the backward's parts.
//
// A team of threads handles whole rows of the result, and each of its threads the same columns of
// every row. A team is one of several warps of a block if rows are short, and else the whole block.
// Sums over rows are taken in registers over the rows of a team, then over the teams of a block,
// and then over the blocks by a second kernel, always in the same order.
#pragma once

#include "gated_residual.h"
#include "warp.cuh"

namespace xattn {

// The threads of a block. The sums of the backward take 48 registers of each.
constexpr int kGatedThreads = 512;
// The blocks of a backward. The number does not depend on the device, so that sums do not either.
constexpr int kGatedGroups = 256;
constexpr int kGatedSumThreads = 128;

// The number of runs of `vec` columns that a thread has in each row.
__host__ __device__ constexpr int Vectors(int vec) { return vec == 1 ? 8 : 2; }

// The indices of a row in the leading dimensions.
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
    int64_t offset = 0;
#pragma unroll
    for (int d = 0; d < kMaxRowDims; ++d) offset += i[d] * t.strides[d];
    return static_cast<T*>(t.data) + offset;
  }
};

// The columns of a row that a thread has: Vectors(VEC) runs of VEC columns, `step` columns apart.
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

// tanh(gate), which is one number or one for each column.
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

// The sum of x over the threads of a team. `scratch` has one element for each warp of the block.
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

// Normalises the row y, without weight and bias, and returns the factor 1 / sqrt(...) of eq. norm.
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
    gated_forward_kernel(const __grid_constant__ GatedResidualForwardParams params) {
  __shared__ float scratch[kWarpSize];
  const uint32_t r = blockIdx.x * blockDim.y + threadIdx.y;
  if (r >= params.shape.rows.rows) return;  // All threads of a team return together.
  const RowIndex row(params.shape.rows, static_cast<int>(r));
  const ColumnRuns<VEC> columns(params.shape.dim);
  const Gate gate(params.gate, params.shape.gate_is_vector);
  const bool gated = params.row_mask.data == nullptr || *row.Start<uint8_t>(params.row_mask) != 0;
  const T* x = row.Start<T>(params.x);
  const H* h = row.Start<H>(params.h);
  T* y = row.Start<T>(params.y);
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
    Normalise<NORM>(values, columns, params.shape.eps, scratch);
    T* normed = row.Start<T>(params.normed);
    columns.ForEach([&](int n, int c) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        if (params.weight.data != nullptr) values[n][i] *= params.weight.Load(c + i);
        if (params.bias.data != nullptr) values[n][i] += params.bias.Load(c + i);
      }
      StoreFloats(normed + c, values[n]);
    });
  }
}

// Sums the teams' values of each column and writes them as the part of this block.
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
    gated_backward_kernel(const __grid_constant__ GatedResidualBackwardParams params) {
  extern __shared__ float by_column[];
  __shared__ float scratch[kWarpSize];
  const ColumnRuns<VEC> columns(params.shape.dim);
  const Gate gate(params.gate, params.shape.gate_is_vector);
  float gate_sums[Vectors(VEC)][VEC] = {}, weight_sums[Vectors(VEC)][VEC] = {};
  float bias_sums[Vectors(VEC)][VEC] = {};
  const uint32_t teams = gridDim.x * blockDim.y;  // rows + teams is below 2^32, so r cannot wrap.
  for (uint32_t r = blockIdx.x * blockDim.y + threadIdx.y; r < params.shape.rows.rows; r += teams) {
    const RowIndex row(params.shape.rows, static_cast<int>(r));
    const bool gated = params.row_mask.data == nullptr || *row.Start<uint8_t>(params.row_mask) != 0;
    float dy[Vectors(VEC)][VEC] = {};
    if constexpr (NORM != Norm::kNone) {
      const T* y = row.Start<T>(params.y);
      const T* dnormed = row.Start<T>(params.dnormed);
      float normed[Vectors(VEC)][VEC];
      columns.ForEach([&](int n, int c) { LoadFloats(normed[n], y + c); });
      const float factor = Normalise<NORM>(normed, columns, params.shape.eps, scratch);
      float along = 0.f, sum = 0.f;
      columns.ForEach([&](int n, int c) {
        LoadFloats(dy[n], dnormed + c);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          weight_sums[n][i] += dy[n][i] * normed[n][i];
          bias_sums[n][i] += dy[n][i];
          if (params.weight.data != nullptr) dy[n][i] *= params.weight.Load(c + i);
          along += dy[n][i] * normed[n][i];
          sum += dy[n][i];
        }
      });
      along = TeamSum(along, scratch) / params.shape.dim;
      const float mean = NORM == Norm::kLayer ? TeamSum(sum, scratch) / params.shape.dim : 0.f;
      columns.ForEach([&](int n, int) {
#pragma unroll
        for (int i = 0; i < VEC; ++i)
          dy[n][i] = factor * (dy[n][i] - (normed[n][i] * along + mean));
      });
    }
    columns.ForEach([&](int n, int c) {
      if (params.dy.data != nullptr) {
        float direct[VEC];
        LoadFloats(direct, row.Start<T>(params.dy) + c);
#pragma unroll
        for (int i = 0; i < VEC; ++i) dy[n][i] += direct[i];
      }
      if (params.dx.data != nullptr) StoreFloats(row.Start<T>(params.dx) + c, dy[n]);
      if (params.gate_parts != nullptr && gated) {
        float branch[VEC];
        LoadFloats(branch, row.Start<H>(params.h) + c);
#pragma unroll
        for (int i = 0; i < VEC; ++i) gate_sums[n][i] += dy[n][i] * branch[i];
      }
      if (params.dh.data != nullptr) {
        float dh[VEC];
#pragma unroll
        for (int i = 0; i < VEC; ++i) dh[i] = gated ? gate.At(c + i) * dy[n][i] : 0.f;
        StoreFloats(row.Start<H>(params.dh) + c, dh);
      }
    });
  }

  if (params.gate_parts != nullptr) {
    if (gate.is_vector) {
      StoreColumnSums(params.gate_parts, gate_sums, columns, by_column);
    } else {
      float gate_sum = 0.f;
#pragma unroll
      for (int n = 0; n < Vectors(VEC); ++n)
#pragma unroll
        for (int i = 0; i < VEC; ++i) gate_sum += gate_sums[n][i];
      gate_sum = BlockSum(gate_sum, scratch);
      if (threadIdx.x == 0 && threadIdx.y == 0)
        params.gate_parts[int64_t{blockIdx.x} * gridDim.y + blockIdx.y] = gate_sum;
    }
  }
  if constexpr (NORM != Norm::kNone) {
    if (params.weight_parts != nullptr)
      StoreColumnSums(params.weight_parts, weight_sums, columns, by_column);
    if (params.bias_parts != nullptr)
      StoreColumnSums(params.bias_parts, bias_sums, columns, by_column);
  }
}

struct GatedSums {
  Numbers dgate, dweight, dbias;
  const float *gate_parts, *weight_parts, *bias_parts;
  Numbers gate;
  int dim, groups, column_tiles;
  bool gate_is_vector;
};

// The sum of a column's parts over all blocks, in their order.
__device__ __forceinline__ float SumOfParts(const float* parts, int c, const GatedSums& params) {
  float sum = 0.f;
  for (int group = 0; group < params.groups; ++group) sum += parts[int64_t{group} * params.dim + c];
  return sum;
}

__global__ void __launch_bounds__(kGatedSumThreads)
    gated_sums_kernel(const __grid_constant__ GatedSums params) {
  __shared__ float scratch[kWarpSize];
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c < params.dim) {
    if (params.dweight.data != nullptr)
      params.dweight.Store(c, SumOfParts(params.weight_parts, c, params));
    if (params.dbias.data != nullptr)
      params.dbias.Store(c, SumOfParts(params.bias_parts, c, params));
    if (params.dgate.data != nullptr && params.gate_is_vector) {
      const float t = tanhf(params.gate.Load(c));
      params.dgate.Store(c, SumOfParts(params.gate_parts, c, params) * (1.f - t * t));
    }
  }
  if (params.dgate.data != nullptr && !params.gate_is_vector && blockIdx.x == 0) {
    float sum = 0.f;
    for (int n = threadIdx.x; n < params.groups * params.column_tiles; n += blockDim.x)
      sum += params.gate_parts[n];
    sum = BlockSum(sum, scratch);
    const float t = tanhf(params.gate.Load(0));
    if (threadIdx.x == 0) params.dgate.Store(0, sum * (1.f - t * t));
  }
}

}  // namespace xattn

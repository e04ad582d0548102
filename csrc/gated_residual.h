// The gated residual, alone and with the next norm: what its launchers take.
//
//     y = x + tanh(gate) * h                     normed = norm(y) * weight + bias
//
// Equations: eq. gate and eq. norm of xattn_kernels/reference.py. Tensors are [..., dim] with a
// contiguous last dimension, in device memory that the caller owns; null where a call has none.
#pragma once

#include <cuda_runtime_api.h>

#include "launch.h"
#include "types.cuh"

namespace xattn {

constexpr int kMaxRowDims = 4;

// The leading dimensions that all tensors of a call share, the last one first.
struct RowSizes {
  uint32_t rows;               // their product, from 1 and below 2^31
  int32_t sizes[kMaxRowDims];  // 1 where there are fewer
};

struct RowTensor {
  void* data;
  int64_t strides[kMaxRowDims];  // of the dimensions of RowSizes, in elements
};

enum class Norm : int32_t { kNone, kLayer, kRms };

struct GatedResidualShape {
  RowSizes rows;
  int32_t dim;
  DType x_dtype, h_dtype;  // equal, or float32 with a narrower h
  Norm norm;
  float eps;
  bool gate_is_vector;  // [dim]; or else a number. A gate is never null
};

struct GatedResidualForwardParams {
  RowTensor y, normed, x, h;  // normed with a norm only
  RowTensor row_mask;         // bytes [...]; where 0 y is x
  Numbers gate, weight, bias;
  GatedResidualShape shape;
};

// Results and parts are null where nobody asks for them. Without a norm dx is dy, so it is null.
// h is read for dgate; y and dnormed are needed with a norm, dy without one.
struct GatedResidualBackwardParams {
  RowTensor dx, dh;
  Numbers dgate, dweight, dbias;
  float *gate_parts, *weight_parts, *bias_parts;  // of dgate and so on: GatedResidualParts floats
  RowTensor dy, dnormed, h, y, row_mask;
  Numbers gate, weight;
  GatedResidualShape shape;
};

// How many floats each of the parts of a backward call needs; its tensors are known, parts not yet.
int64_t GatedResidualParts(const GatedResidualBackwardParams& params);

// The widest row that a call with a norm can have; aligned: dim, and the place where each row of
// each tensor begins, are multiples of as many elements as 16 bytes of x have.
int WidestNormedRow(DType x_dtype, bool aligned);

// cudaErrorInvalidValue, before anything is pushed, for other dtypes and rows that are too wide;
// else the first error of the queue.
cudaError_t GatedResidualForward(const GatedResidualForwardParams& params, Queue& queue);
cudaError_t GatedResidualBackward(const GatedResidualBackwardParams& params, Queue& queue);

}  // namespace xattn

// The interface of the gated residual, alone or fused with the next norm: its params and its
// launchers.
//
//     y = x + tanh(gate) * h                     normed = norm(y) * weight + bias
//
// The equations are eq. gate and eq. norm of xattn_kernels/reference.py. Tensors are [..., dim]
// with a contiguous last dimension, in device memory that the caller owns. A null pointer stands
// for a tensor that a call does not have.
#pragma once

#include <cuda_runtime_api.h>

#include "launch.h"
#include "types.cuh"

namespace xattn {

constexpr int kMaxRowDims = 4;

// The sizes of the leading dimensions, which all tensors of a call share. The last dimension before
// `dim` comes first.
struct RowSizes {
  uint32_t rows;               // the product of the sizes, 1 <= rows < 2^31
  int32_t sizes[kMaxRowDims];  // filled up with 1 if there are fewer dimensions
};

struct RowTensor {
  void* data;
  int64_t strides[kMaxRowDims];  // in elements, in the order of RowSizes
};

enum class Norm : int32_t { kNone, kLayer, kRms };

struct GatedResidualShape {
  RowSizes rows;
  int32_t dim;
  DType x_dtype, h_dtype;  // x has the dtype of h or is float32.
  Norm norm;
  float eps;
  bool gate_is_vector;  // The gate is [dim] if true, and else one number. It is never null.
};

struct GatedResidualForwardParams {
  RowTensor y, normed, x, h;  // normed is null without a norm.
  RowTensor row_mask;         // bytes [...]; rows with 0 have y = x
  Numbers gate, weight, bias;
  GatedResidualShape shape;
};

// Results that the caller does not want are null, and so are their parts. Without a norm dx is
// equal to dy, so it is null. h is read for dgate only. y and dnormed are read with a norm; dy may
// be null with a norm only.
struct GatedResidualBackwardParams {
  RowTensor dx, dh;
  Numbers dgate, dweight, dbias;
  // The workspace of dgate, dweight and dbias has GatedResidualParts(params) floats each.
  float *gate_parts, *weight_parts, *bias_parts;
  RowTensor dy, dnormed, h, y, row_mask;
  Numbers gate, weight;
  GatedResidualShape shape;
};

// The number of floats that each of the parts of a backward call needs. It reads the tensors and
// the shape, but not the parts.
int64_t GatedResidualParts(const GatedResidualBackwardParams& params);

// The widest row that a call with a norm can have. A call is aligned if dim, and the offset of each
// row of each tensor, are multiples of the number of elements of x in 16 bytes.
int WidestNormedRow(DType x_dtype, bool aligned);

// Both return cudaErrorInvalidValue before they push anything if the dtypes are not supported or
// the rows are too wide, and else the first error of the queue.
cudaError_t GatedResidualForward(const GatedResidualForwardParams& params, Queue& queue);
cudaError_t GatedResidualBackward(const GatedResidualBackwardParams& params, Queue& queue);

}  // namespace xattn

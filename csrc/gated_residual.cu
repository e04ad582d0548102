// Launchers of the gated residual. They choose the kernel for a call and the number of its blocks.
#include <algorithm>

#include "gated_residual.cuh"

namespace xattn {
namespace {

// How the rows and columns of a call are divided among blocks.
struct GatedWalk {
  int vec, lanes, teams, row_tiles, column_tiles;

  GatedWalk(const GatedResidualShape& shape, bool aligned)
      : vec(aligned ? 16 / SizeOf(shape.x_dtype) : 1) {
    const int per_lane = vec * Vectors(vec);
    const int wanted = (shape.dim + per_lane * kWarpSize - 1) / (per_lane * kWarpSize);
    lanes = kWarpSize * (shape.norm == Norm::kNone ? 1 : wanted);
    teams = lanes == kWarpSize ? kGatedThreads / kWarpSize : 1;
    row_tiles = static_cast<int>((shape.rows.rows + teams - 1) / teams);
    column_tiles = (shape.dim + per_lane * lanes - 1) / (per_lane * lanes);
  }

  dim3 block() const { return dim3(lanes, teams); }
  int groups() const { return std::min(row_tiles, kGatedGroups); }
};

bool IsAligned(const RowTensor& t, int element_size, int vec) {
  bool aligned = reinterpret_cast<uintptr_t>(t.data) % (element_size * vec) == 0;
  for (int64_t stride : t.strides) aligned &= stride % vec == 0;
  return aligned;
}

bool IsAligned(const GatedResidualForwardParams& params) {
  const int size = SizeOf(params.shape.x_dtype), vec = 16 / size;
  return params.shape.dim % vec == 0 && IsAligned(params.y, size, vec) &&
         IsAligned(params.normed, size, vec) && IsAligned(params.x, size, vec) &&
         IsAligned(params.h, SizeOf(params.shape.h_dtype), vec);
}

bool IsAligned(const GatedResidualBackwardParams& params) {
  const int size = SizeOf(params.shape.x_dtype), vec = 16 / size,
            h_size = SizeOf(params.shape.h_dtype);
  return params.shape.dim % vec == 0 && IsAligned(params.dx, size, vec) &&
         IsAligned(params.dh, h_size, vec) && IsAligned(params.dy, size, vec) &&
         IsAligned(params.dnormed, size, vec) && IsAligned(params.h, h_size, vec) &&
         IsAligned(params.y, size, vec);
}

template <class T, class H, Norm NORM>
struct GatedTypes {
  using X = T;
  using Branch = H;
  static constexpr Norm kNorm = NORM;
  static constexpr int kVec = 16 / sizeof(T);
};

template <class T, class H, class F>
cudaError_t WithNorm(Norm norm, F f) {
  switch (norm) {
    case Norm::kNone:
      return f(GatedTypes<T, H, Norm::kNone>{});
    case Norm::kLayer:
      return f(GatedTypes<T, H, Norm::kLayer>{});
    case Norm::kRms:
      return f(GatedTypes<T, H, Norm::kRms>{});
  }
  return cudaErrorInvalidValue;
}

// Calls f with the GatedTypes of a call.
template <class F>
cudaError_t WithTypes(const GatedResidualShape& shape, F f) {
  const DType x = shape.x_dtype, h = shape.h_dtype;
  if (x == DType::kFloat16 && h == x) return WithNorm<__half, __half>(shape.norm, f);
  if (x == DType::kBFloat16 && h == x) return WithNorm<__nv_bfloat16, __nv_bfloat16>(shape.norm, f);
  if (x != DType::kFloat32) return cudaErrorInvalidValue;
  switch (h) {
    case DType::kFloat32:
      return WithNorm<float, float>(shape.norm, f);
    case DType::kFloat16:
      return WithNorm<float, __half>(shape.norm, f);
    case DType::kBFloat16:
      return WithNorm<float, __nv_bfloat16>(shape.norm, f);
  }
  return cudaErrorInvalidValue;
}

bool Fits(const GatedResidualShape& shape, bool aligned) {
  return shape.rows.rows > 0 && shape.dim > 0 &&
         (shape.norm == Norm::kNone || shape.dim <= WidestNormedRow(shape.x_dtype, aligned));
}

}  // namespace

int WidestNormedRow(DType x_dtype, bool aligned) {
  const int vec = aligned ? 16 / SizeOf(x_dtype) : 1;
  return kGatedThreads * Vectors(vec) * vec;
}

cudaError_t GatedResidualForward(const GatedResidualForwardParams& params, Queue& queue) {
  const bool aligned = IsAligned(params);
  if (!Fits(params.shape, aligned)) return cudaErrorInvalidValue;
  const GatedWalk walk(params.shape, aligned);
  const Grid grid(walk.row_tiles, walk.column_tiles);
  return WithTypes(params.shape, [&](auto types) {
    using C = decltype(types);
    using T = typename C::X;
    using H = typename C::Branch;
    if (aligned)
      return Launch<gated_forward_kernel<T, H, C::kVec, C::kNorm>>(queue, grid, walk.block(), 0,
                                                                   params);
    return Launch<gated_forward_kernel<T, H, 1, C::kNorm>>(queue, grid, walk.block(), 0, params);
  });
}

int64_t GatedResidualParts(const GatedResidualBackwardParams& params) {
  const bool aligned = IsAligned(params);
  if (!Fits(params.shape, aligned)) return 0;
  const GatedWalk walk(params.shape, aligned);
  return int64_t{walk.groups()} * std::max(params.shape.dim, walk.column_tiles);
}

cudaError_t GatedResidualBackward(const GatedResidualBackwardParams& params, Queue& queue) {
  const bool aligned = IsAligned(params);
  if (!Fits(params.shape, aligned)) return cudaErrorInvalidValue;
  const GatedWalk walk(params.shape, aligned);
  const Grid grid(walk.groups(), walk.column_tiles);
  const size_t shared = sizeof(float) * walk.lanes * walk.vec * Vectors(walk.vec);
  cudaError_t error = WithTypes(params.shape, [&](auto types) {
    using C = decltype(types);
    using T = typename C::X;
    using H = typename C::Branch;
    if (aligned)
      return Launch<gated_backward_kernel<T, H, C::kVec, C::kNorm>>(queue, grid, walk.block(),
                                                                    shared, params);
    return Launch<gated_backward_kernel<T, H, 1, C::kNorm>>(queue, grid, walk.block(), shared,
                                                            params);
  });
  const bool vector_sums = params.dweight.data != nullptr || params.dbias.data != nullptr ||
                           (params.dgate.data != nullptr && params.shape.gate_is_vector);
  if (error != cudaSuccess || (!vector_sums && params.dgate.data == nullptr)) return error;
  GatedSums sums{};
  sums.dgate = params.dgate, sums.dweight = params.dweight, sums.dbias = params.dbias;
  sums.gate_parts = params.gate_parts;
  sums.weight_parts = params.weight_parts;
  sums.bias_parts = params.bias_parts;
  sums.gate = params.gate, sums.gate_is_vector = params.shape.gate_is_vector;
  sums.dim = params.shape.dim, sums.groups = walk.groups();
  sums.column_tiles = walk.column_tiles;
  const int blocks = vector_sums ? (params.shape.dim + kGatedSumThreads - 1) / kGatedSumThreads : 1;
  return Launch<gated_sums_kernel>(queue, blocks, kGatedSumThreads, 0, sums);
}

}  // namespace xattn

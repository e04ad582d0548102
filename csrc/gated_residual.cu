// Launchers of the gated residual: which kernel a call takes, and how many blocks of it.
#include <algorithm>

#include "gated_residual.cuh"

namespace xattn {
namespace {

// How a call is cut into blocks.
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

bool IsAligned(const GatedResidualForwardParams& p) {
  const int size = SizeOf(p.shape.x_dtype), vec = 16 / size;
  return p.shape.dim % vec == 0 && IsAligned(p.y, size, vec) && IsAligned(p.normed, size, vec) &&
         IsAligned(p.x, size, vec) && IsAligned(p.h, SizeOf(p.shape.h_dtype), vec);
}

bool IsAligned(const GatedResidualBackwardParams& p) {
  const int size = SizeOf(p.shape.x_dtype), vec = 16 / size, h_size = SizeOf(p.shape.h_dtype);
  return p.shape.dim % vec == 0 && IsAligned(p.dx, size, vec) && IsAligned(p.dh, h_size, vec) &&
         IsAligned(p.dy, size, vec) && IsAligned(p.dnormed, size, vec) &&
         IsAligned(p.h, h_size, vec) && IsAligned(p.y, size, vec);
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

// f of the GatedTypes of a call.
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
  const GatedSums sums{params.dgate,
                       params.dweight,
                       params.dbias,
                       params.gate_parts,
                       params.weight_parts,
                       params.bias_parts,
                       params.gate,
                       params.shape.dim,
                       walk.groups(),
                       walk.column_tiles,
                       params.shape.gate_is_vector};
  const int blocks = vector_sums ? (params.shape.dim + kGatedSumThreads - 1) / kGatedSumThreads : 1;
  return Launch<gated_sums_kernel>(queue, blocks, kGatedSumThreads, 0, sums);
}

}  // namespace xattn

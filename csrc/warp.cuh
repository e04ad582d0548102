// Sums over a warp and over a block, in an order that does not depend on timing.
#pragma once

#include <cstdint>

namespace xattn {

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffff;

// The sum of x over a warp. Every lane gets the same bits.
__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int lane = kWarpSize / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kAllLanes, x, lane);
  return x;
}

// The sum of x over a block. Every thread must call it; `scratch` has kWarpSize elements.
__device__ __forceinline__ float BlockSum(float x, float* scratch) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int warps = blockDim.x * blockDim.y / kWarpSize;
  x = WarpSum(x);
  __syncthreads();
  if (thread % kWarpSize == 0) scratch[thread / kWarpSize] = x;
  __syncthreads();
  return WarpSum(thread % kWarpSize < warps ? scratch[thread % kWarpSize] : 0.f);
}

}  // namespace xattn

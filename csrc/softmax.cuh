// The softmax of two rows of a warp's product, while their scores arrive tile by tile.
#pragma once

#include <cmath>

#include "ptx.cuh"

namespace xattn {

// m and l of one row, in units of log2: the sum of what was seen is l 2^m. A row that has seen
// nothing has m = -inf and l = 0.
struct SoftmaxState {
  float m = -INFINITY, l = 0.f;

  // What is subtracted from scores: inf - inf is never formed.
  __device__ __forceinline__ float Shift() const { return m == -INFINITY ? 0.f : m; }

  // Takes a larger maximum; returns what the sums of before are multiplied with.
  __device__ __forceinline__ float Raise(float largest) {
    const float before = m;
    m = fmaxf(m, largest);
    const float alpha = ptx::Exp2(before - Shift());
    l *= alpha;
    return alpha;
  }

  // 1 / l, and 0 for a row without keys.
  __device__ __forceinline__ float Inverse() const { return l == 0.f ? 0.f : 1.f / l; }

  // In natural units.
  __device__ __forceinline__ float Lse() const {
    return l == 0.f ? -INFINITY : (m + log2f(l)) * 0.69314718055994531f;
  }
};

}  // namespace xattn

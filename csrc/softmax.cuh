// The online softmax of a row whose scores arrive tile by tile.
#pragma once

#include <cmath>

#include "ptx.cuh"

namespace xattn {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.69314718055994531f;

// m and l of one row. The sum of the exponentials of all scores so far is l e^m if the scores are
// NATURAL, and l 2^m if they have log2 units. A row without scores has m = -inf and l = 0.
template <bool NATURAL>
struct SoftmaxState {
  float m = -INFINITY, l = 0.f;

  // The number that is subtracted from scores. It is never -inf, so that inf - inf cannot occur.
  __device__ __forceinline__ float Shift() const { return m == -INFINITY ? 0.f : m; }

  // e^t for NATURAL scores, and else 2^t.
  static __device__ __forceinline__ float Exp(float t) {
    return ptx::Exp2(NATURAL ? t * kLog2E : t);
  }

  // Raises the maximum to `largest` if that is larger. Returns the factor by which the caller must
  // multiply its earlier sums.
  __device__ __forceinline__ float Raise(float largest) {
    const float before = m;
    m = fmaxf(m, largest);
    const float alpha = Exp(before - Shift());
    l *= alpha;
    return alpha;
  }

  // Adds a split of the row, given its lse and lse_low.
  __device__ __forceinline__ void Merge(float lse, float lse_low) {
    static_assert(NATURAL, "lse has natural units");
    Raise(lse);
    l += Exp(lse - Shift() + lse_low * kLn2);
  }

  // The log of the share that a merged split has of the row's sum.
  __device__ __forceinline__ float LogShare(float lse, float lse_low) const {
    return lse - Shift() + lse_low * kLn2 - LogL();
  }

  __device__ __forceinline__ float LogL() const { return l == 0.f ? 0.f : logf(l); }

  // 1 / l, or 0 for a row without keys.
  __device__ __forceinline__ float Inverse() const { return l == 0.f ? 0.f : 1.f / l; }

  __device__ __forceinline__ float NaturalM() const { return NATURAL ? m : m * kLn2; }

  // log(l e^m) or log(l 2^m), in natural units.
  __device__ __forceinline__ float Lse() const {
    return l == 0.f ? -INFINITY : NaturalM() + logf(l);
  }

  // The part of lse that float32 cannot represent, in log2 units.
  __device__ __forceinline__ float LseLow() const {
    return l == 0.f ? 0.f : (NaturalM() - Lse() + logf(l)) * kLog2E;
  }
};

}  // namespace xattn

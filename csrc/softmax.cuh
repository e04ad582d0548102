// The softmax of a row while its scores arrive tile by tile.
#pragma once

#include <cmath>

#include "ptx.cuh"

namespace xattn {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.69314718055994531f;

// m and l of one row: the sum of what was seen is l e^m, with NATURAL scores, or l 2^m. A row that
// has seen nothing has m = -inf and l = 0.
template <bool NATURAL>
struct SoftmaxState {
  float m = -INFINITY, l = 0.f;

  // What is subtracted from scores: inf - inf is never formed.
  __device__ __forceinline__ float Shift() const { return m == -INFINITY ? 0.f : m; }

  // The base to the power of t.
  static __device__ __forceinline__ float Exp(float t) {
    return ptx::Exp2(NATURAL ? t * kLog2E : t);
  }

  // Takes a larger maximum; returns what the sums of before are multiplied with.
  __device__ __forceinline__ float Raise(float largest) {
    const float before = m;
    m = fmaxf(m, largest);
    const float alpha = Exp(before - Shift());
    l *= alpha;
    return alpha;
  }

  // Adds a part of a row of which this is known.
  __device__ __forceinline__ void Merge(float lse, float lse_low) {
    static_assert(NATURAL, "as lse is");
    Raise(lse);
    l += Exp(lse - Shift() + lse_low * kLn2);
  }

  // Of a part that was merged: the log of its share.
  __device__ __forceinline__ float LogShare(float lse, float lse_low) const {
    return lse - Shift() + lse_low * kLn2 - LogL();
  }

  __device__ __forceinline__ float LogL() const { return l == 0.f ? 0.f : logf(l); }

  // 1 / l, and 0 for a row without keys.
  __device__ __forceinline__ float Inverse() const { return l == 0.f ? 0.f : 1.f / l; }

  __device__ __forceinline__ float NaturalM() const { return NATURAL ? m : m * kLn2; }

  // log(l e^m) or log(l 2^m), in natural units.
  __device__ __forceinline__ float Lse() const {
    return l == 0.f ? -INFINITY : NaturalM() + logf(l);
  }

  // What float32 cannot hold of lse, in log2 units.
  __device__ __forceinline__ float LseLow() const {
    return l == 0.f ? 0.f : (NaturalM() - Lse() + logf(l)) * kLog2E;
  }
};

}  // namespace xattn

// What the launchers of attention share: the choice of the kernel and of the number of splits.
#pragma once

#include <algorithm>

#include "cross_attention.h"

namespace xattn {

// float32 may round a smaller positive scale to 0.
constexpr float kSmallestScale = 1.17549435e-38f;

// The width of the kernels that serve heads of these widths.
inline int KernelWidth(const CrossAttentionShape& s) {
  const int width = std::max(s.D, s.Dv);
  return width <= 64 ? 64 : width <= 128 ? 128 : 256;
}

inline int Group(const CrossAttentionShape& s) { return s.Hq / s.Hkv; }
inline int64_t CeilDiv(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

// Whether every score is <q, k> times one positive scale, and nothing else.
inline bool IsPlain(const CrossAttentionCall& c) {
  return c.shape.dtype != DType::kFloat32 && c.mask.data == nullptr && c.bias.data == nullptr &&
         c.scales.data == nullptr && c.seed == nullptr && c.softcap == 0.f &&
         c.scale >= kSmallestScale;
}

inline bool IsAligned(const HeadTensor& t, int B, int H, int N, DType dtype) {
  const int chunk = 16 / SizeOf(dtype);
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && (B == 1 || t.strides[0] % chunk == 0) &&
         (H == 1 || t.strides[1] % chunk == 0) && (N == 1 || t.strides[2] % chunk == 0);
}

inline bool QAndKAreAligned(const CrossAttentionCall& c) {
  const CrossAttentionShape& s = c.shape;
  return IsAligned(c.q, s.B, s.Hq, s.Nq, s.dtype) && IsAligned(c.k, s.B, s.Hkv, s.Nk, s.dtype);
}

inline bool IsAligned(const CrossAttentionCall& c) {
  const CrossAttentionShape& s = c.shape;
  return QAndKAreAligned(c) && IsAligned(c.v, s.B, s.Hkv, s.Nk, s.dtype);
}

inline bool AreBoth(const void* a, const void* b) { return (a == nullptr) == (b == nullptr); }

inline bool IsValid(const CrossAttentionCall& c) {
  const CrossAttentionShape& s = c.shape;
  const int widest = std::max(s.D, s.Dv), sizes[] = {s.B, s.Hq, s.Hkv, s.Nq, s.Nk, s.D, s.Dv};
  const DType last = DType::kBFloat16;
  return *std::min_element(std::begin(sizes), std::end(sizes)) > 0 && widest <= 256 &&
         s.Hq % s.Hkv == 0 && std::max<int64_t>(int64_t{s.Nq} * Group(s), s.Nk) <= kMostRows &&
         DType::kFloat32 <= s.dtype && s.dtype <= last && AreBoth(c.start.data, c.stop.data);
}

// The number of blocks that share a loop of `steps` tiles so that they fill the device twice over.
// A split keeps at least four tiles, because merging shorter ones costs more time than it saves.
inline int32_t Splits(int64_t blocks, int64_t steps, int multiprocessors) {
  const int64_t wanted = 2 * multiprocessors / std::max<int64_t>(blocks, 1);
  return static_cast<int32_t>(std::max<int64_t>(1, std::min(wanted, steps / 4)));
}

template <class T, int WIDTH>
struct KernelOf {
  using Element = T;
  static constexpr int kWidth = WIDTH;
};

template <class T, class F>
auto WithWidth(const CrossAttentionShape& s, F f) {
  switch (KernelWidth(s)) {
    case 64:
      return f(KernelOf<T, 64>{});
    case 128:
      return f(KernelOf<T, 128>{});
    default:
      return f(KernelOf<T, 256>{});
  }
}

// Calls f with the KernelOf that serves calls of this shape.
template <class F>
auto WithKernel(const CrossAttentionShape& s, F f) {
  switch (s.dtype) {
    case DType::kFloat16:
      return WithWidth<__half>(s, f);
    case DType::kBFloat16:
      return WithWidth<__nv_bfloat16>(s, f);
    default:
      return WithWidth<float>(s, f);
  }
}

// Calls f with `plain` as a constant. float32 has no plain kernels.
template <class T, class F>
cudaError_t WithPlain(const CrossAttentionCall& c, bool plain, F f) {
  if constexpr (sizeof(T) == 2)
    if (plain) return f(std::true_type{});
  return f(std::false_type{});
}

}  // namespace xattn

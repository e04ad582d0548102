// Scores of pairs and their gradients, for the kernels that serve every flag. Scores have natural
// units here, while the plain kernels use log2 units.
#pragma once

#include "attention_rows.cuh"
#include "softmax.cuh"

namespace xattn {

__device__ __forceinline__ float LoadPair(const PairTensor& t, int64_t offset) {
  return Numbers{const_cast<void*>(t.data), t.dtype}.Load(offset);
}

__device__ __forceinline__ float ScaleOf(const CrossAttentionCall& c, int h) {
  return c.scales.data == nullptr ? c.scale : c.scales.Load(h * c.scale_stride);
}

// The first word of Philox4x32-10 with counter (j, i, h, b).
__device__ __forceinline__ uint32_t Philox(int64_t seed, uint32_t j, uint32_t i, uint32_t h,
                                           uint32_t b) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    constexpr uint32_t kA = 0xD2511F53, kB = 0xCD9E8D57;
    const uint32_t high_a = __umulhi(kA, j), low_a = kA * j;
    const uint32_t high_b = __umulhi(kB, h), low_b = kB * h;
    j = high_b ^ i ^ key0, i = low_b, h = high_a ^ b ^ key1, b = low_a;
    key0 += 0x9E3779B9, key1 += 0xBB67AE85;
  }
  return j;
}

// A row (b, h, i) of the scores.
struct ScoreRow {
  int b, h, i;
  Interval keys;
  float scale;
  int64_t mask, bias;  // the offsets of this row's key 0

  __device__ __forceinline__ ScoreRow(const CrossAttentionCall& c, int batch, const PackedRow& row,
                                      const Interval& interval)
      : b(batch), h(row.h), i(row.i), keys(interval), scale(ScaleOf(c, row.h)) {
    mask = OffsetIn(c.mask), bias = OffsetIn(c.bias);
  }

  __device__ __forceinline__ int64_t OffsetIn(const PairTensor& t) const {
    return b * t.strides[0] + h * t.strides[1] + i * t.strides[2];
  }

  // The score of key j from `qk` = <q, k>; a forbidden key has -inf. Sets `tanh` to the one in the
  // softcap, which the gradient needs, or to 0.
  __device__ __forceinline__ float Score(const CrossAttentionCall& c, int j, float qk,
                                         float& tanh) const {
    tanh = 0.f;
    if (!keys.Has(j)) return -INFINITY;
    float s = qk * scale;
    if (c.softcap > 0.f) {
      tanh = tanhf(s / c.softcap);
      s = tanh * c.softcap;
    }
    if (c.bias.data != nullptr) s += LoadPair(c.bias, bias + j * c.bias.strides[3]);
    if (c.mask.data != nullptr && !Allows(c, j)) return -INFINITY;
    return s;
  }

  __device__ __forceinline__ bool Allows(const CrossAttentionCall& c, int j) const {
    if (c.mask_is_bits)
      return static_cast<const uint32_t*>(c.mask.data)[mask + j / 32] >> j % 32 & 1;
    return static_cast<const uint8_t*>(c.mask.data)[mask + j * c.mask.strides[3]] != 0;
  }

  // Whether the pair of this score has a gradient. A key that top-k did not choose has none, even
  // if it holds NaN.
  __device__ __forceinline__ bool Sees(const CrossAttentionCall& c, int j, float s) const {
    return keys.Has(j) && !(c.mask_is_bits && s == -INFINITY);
  }

  __device__ __forceinline__ bool Keeps(const CrossAttentionCall& c, int j) const {
    return c.seed == nullptr || Philox(*c.seed, j, i, h, b) >= c.threshold;
  }
};

// The terms of eq. ds that belong to a row.
struct RowTerms {
  float lse;          // +inf for a row without keys, so that p = 0
  float minus_delta;  // as row_terms_kernel defines it
  float lse_low, dentropy;
};

// p and ds of a pair by eq. ds. `s` is its score, `dp` is <dout, v>, `inside` says whether the pair
// has a gradient, and `kept` whether dropout keeps it.
struct PairGradient {
  float p, ds;

  __device__ __forceinline__ PairGradient(const CrossAttentionCall& c, const RowTerms& row,
                                          bool inside, float s, float tanh, float dp, bool kept) {
    const float log2_p = (s - row.lse) * kLog2E - row.lse_low;
    p = inside ? ptx::Exp2(log2_p) : 0.f;
    float t = (kept ? dp * c.keep_scale : 0.f) + row.minus_delta;
    // The entropy's term is 0 for p = 0, where log2_p is -inf.
    if (p > 0.f) t -= row.dentropy * (log2_p * kLn2);
    ds = inside && row.lse != INFINITY ? p * t : 0.f;
    if (c.softcap > 0.f && inside) ds *= 1.f - tanh * tanh;
  }
};

}  // namespace xattn

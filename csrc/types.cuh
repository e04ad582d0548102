// The element types of tensors, and vectors of numbers whose type only the call knows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace xattn {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };

constexpr int SizeOf(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

template <class T>
constexpr DType kDTypeOf = DType::kFloat32;
template <>
inline constexpr DType kDTypeOf<__half> = DType::kFloat16;
template <>
inline constexpr DType kDTypeOf<__nv_bfloat16> = DType::kBFloat16;

__device__ __forceinline__ float ToFloat(float x) { return x; }
__device__ __forceinline__ float ToFloat(__half x) { return __half2float(x); }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T FromFloat(float x);
template <>
__device__ __forceinline__ float FromFloat<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half FromFloat<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 FromFloat<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// VEC contiguous elements, which one instruction of at most 16 bytes moves.
template <class T, int VEC>
struct alignas(sizeof(T) * VEC) Vector {
  T x[VEC];
};

template <class T, int VEC>
__device__ __forceinline__ void LoadFloats(float (&values)[VEC], const T* source) {
  const auto v = *reinterpret_cast<const Vector<T, VEC>*>(source);
#pragma unroll
  for (int i = 0; i < VEC; ++i) values[i] = ToFloat(v.x[i]);
}

template <class T, int VEC>
__device__ __forceinline__ void StoreFloats(T* target, const float (&values)[VEC]) {
  Vector<T, VEC> v;
#pragma unroll
  for (int i = 0; i < VEC; ++i) v.x[i] = FromFloat<T>(values[i]);
  *reinterpret_cast<Vector<T, VEC>*>(target) = v;
}

// Contiguous numbers, such as gates, weights and scales, of a type that only the call knows.
struct Numbers {
  void* data;  // or null
  DType dtype;

  __device__ __forceinline__ float Load(int64_t i) const {
    switch (dtype) {
      case DType::kFloat32:
        return static_cast<const float*>(data)[i];
      case DType::kFloat16:
        return ToFloat(static_cast<const __half*>(data)[i]);
      default:
        return ToFloat(static_cast<const __nv_bfloat16*>(data)[i]);
    }
  }

  __device__ __forceinline__ void Store(int64_t i, float x) const {
    switch (dtype) {
      case DType::kFloat32:
        static_cast<float*>(data)[i] = x;
        break;
      case DType::kFloat16:
        static_cast<__half*>(data)[i] = FromFloat<__half>(x);
        break;
      default:
        static_cast<__nv_bfloat16*>(data)[i] = FromFloat<__nv_bfloat16>(x);
    }
  }
};

}  // namespace xattn

// Launchers of masked cross-attention.
#include "cross_attention.cuh"

namespace xattn {
namespace {

// The kernel's width for a head width.
constexpr int Padded(int width) { return width <= 64 ? 64 : width <= 128 ? 128 : 256; }

template <class T, int WIDTH, int WIDTH_V>
cudaError_t LaunchForward(const CrossAttentionForwardParams& params, Queue& queue) {
  const CrossAttentionShape& s = params.shape;
  const int rows = s.Nq * (s.Hq / s.Hkv);
  const dim3 grid((rows + kBlockQ - 1) / kBlockQ, s.Hkv, s.B);
  const size_t shared = Tile<T, kBlockQ, WIDTH>::kBytes +
                        2 * (Tile<T, kBlockK, WIDTH>::kBytes + Tile<T, kBlockK, WIDTH_V>::kBytes);
  return Launch<cross_attention_forward_kernel<T, WIDTH, WIDTH_V>>(queue, grid, kAttentionThreads,
                                                                   shared, params);
}

template <class T>
cudaError_t LaunchForward(const CrossAttentionForwardParams& params, Queue& queue) {
  const int width = Padded(params.shape.D), width_v = Padded(params.shape.Dv);
  if (width > 128 || width_v > 128) return cudaErrorInvalidValue;
  if (width == 64 && width_v == 64) return LaunchForward<T, 64, 64>(params, queue);
  return LaunchForward<T, 128, 128>(params, queue);
}

}  // namespace

cudaError_t CrossAttentionForward(const CrossAttentionForwardParams& params, Queue& queue) {
  switch (params.shape.dtype) {
    case DType::kFloat16:
      return LaunchForward<__half>(params, queue);
    case DType::kBFloat16:
      return LaunchForward<__nv_bfloat16>(params, queue);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace xattn

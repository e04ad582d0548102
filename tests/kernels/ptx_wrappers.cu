// A kernel for each wrapper of csrc/ptx.cuh: one warp, plain memory in and out.
#include "ptx.cuh"

using namespace xattn::ptx;

// c [16, 8] = a [16, 16] b [16, 8]^T, b given as [8, 16]; operands loaded as ldmatrix gives them.
template <class T>
__device__ void product(const T* a, const T* b, float* c) {
  __shared__ __align__(16) T shared_a[16 * 16], shared_b[8 * 16];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) shared_a[i] = a[i];
  for (int i = lane; i < 128; i += 32) shared_b[i] = b[i];
  __syncthreads();
  uint32_t fragment_a[4], both[4];
  LoadMatrices(fragment_a, SharedAddress(shared_a + (lane % 16) * 16 + lane / 16 * 8));
  LoadMatrices(both, SharedAddress(shared_b + (lane % 8) * 16 + lane / 8 % 2 * 8));
  const uint32_t fragment_b[2] = {both[0], both[1]};
  float sum[4] = {};
  Mma<T>(sum, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

extern "C" __global__ void mma_half(const __half* a, const __half* b, float* c) {
  product(a, b, c);
}
extern "C" __global__ void mma_bfloat16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  product(a, b, c);
}

// c [16, 8] = a [16, 8] b [8, 8]
extern "C" __global__ void mma_tf32(const float* a, const float* b, float* c) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4;
  const uint32_t fragment_a[4] = {ToTf32(a[row * 8 + column]), ToTf32(a[(row + 8) * 8 + column]),
                                  ToTf32(a[row * 8 + column + 4]),
                                  ToTf32(a[(row + 8) * 8 + column + 4])};
  const uint32_t fragment_b[2] = {ToTf32(b[column * 8 + row]), ToTf32(b[(column + 4) * 8 + row])};
  float sum[4] = {};
  MmaTf32(sum, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) c[(row + i / 2 * 8) * 8 + column * 2 + i % 2] = sum[i];
}

// out [4, 8, 8]: what each lane got of the matrices [4, 8, 8], put where it belongs
extern "C" __global__ void load_matrices(const __half* in, __half* out, int transposed) {
  __shared__ __align__(16) __half matrices[256];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) matrices[i] = in[i];
  __syncthreads();
  uint32_t found[4];
  const uint32_t row = SharedAddress(matrices + lane * 8);
  if (transposed) {
    LoadMatricesTransposed(found, row);
  } else {
    LoadMatrices(found, row);
  }
  for (int i = 0; i < 4; ++i) {
    const __half2 pair = *reinterpret_cast<const __half2*>(&found[i]);
    out[i * 64 + lane / 4 * 8 + lane % 4 * 2] = pair.x;
    out[i * 64 + lane / 4 * 8 + lane % 4 * 2 + 1] = pair.y;
  }
}

// out [2, 32, 8] = two tiles of in, the second one in flight while the first is read; of each row
// of 16 bytes only the first `bytes` are copied
extern "C" __global__ void copy_async(const __half* in, __half* out, int bytes) {
  __shared__ __align__(16) __half tiles[2][256];
  const int lane = threadIdx.x;
  for (int tile = 0; tile < 2; ++tile) {
    CopyAsync(SharedAddress(tiles[tile] + lane * 8), in + tile * 256 + lane * 8, bytes);
    CommitCopies();
  }
  WaitForCopies<1>();
  __syncthreads();
  for (int i = lane; i < 256; i += 32) out[i] = tiles[0][i];
  WaitForCopies<0>();
  __syncthreads();
  for (int i = lane; i < 256; i += 32) out[256 + i] = tiles[1][i];
}

extern "C" __global__ void exp2_of(const float* x, float* y) {
  y[threadIdx.x] = Exp2(x[threadIdx.x]);
}

extern "C" __global__ void to_tf32(const float* x, float* y) {
  y[threadIdx.x] = __uint_as_float(ToTf32(x[threadIdx.x]));
}

// out [32, 4] = in, four words stored and each loaded
extern "C" __global__ void shared_words(const uint32_t* in, uint32_t* out) {
  __shared__ __align__(16) uint32_t words[128];
  const uint32_t at = SharedAddress(words + threadIdx.x * 4);
  const uint32_t* four = in + threadIdx.x * 4;
  StoreShared(at, {four[0], four[1], four[2], four[3]});
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = LoadShared(at + i * 4);
}

// The forward of masked cross-attention from C++: documents whose text rows each see the last image
// before them. docs/cpp.md has the commands that build it.
//
//     ./cross_attention           exits with 0; with 1 after an error, with 77 without a device
//     ./cross_attention --plan    what would be launched on 132 multiprocessors; needs no device
#include "cross_attention.h"

#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int B = 2, H = 8, Nq = 256, D = 64, kImages = 32, kTokens = 64, Nk = kImages * kTokens;
// p and out are each rounded to 11 bits, and |v| <= 1, so that the error is up to 2^-10. Everything
// else is float32.
constexpr double kTolerance = 1.0 / 512, kLseTolerance = 1e-4;

void Check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  const std::string name = cudaGetErrorName(error);
  throw std::runtime_error(what + ": " + cudaGetErrorString(error) + " (" + name + ")");
}

struct Free {
  void operator()(void* data) const { cudaFree(data); }
};

// A tensor on the host, and its copy on the device after ToDevice.
template <class T>
struct Mirrored {
  std::vector<T> host;
  std::unique_ptr<T, Free> device;

  explicit Mirrored(size_t n, T value = T{}) : host(n, value) {}
  size_t bytes() const { return host.size() * sizeof(T); }
  void ToDevice() {
    if (host.empty()) return;
    void* data = nullptr;
    Check(cudaMalloc(&data, bytes()), "cudaMalloc");
    device.reset(static_cast<T*>(data));
    Check(cudaMemcpy(data, host.data(), bytes(), cudaMemcpyHostToDevice), "copy to the device");
  }
  void ToHost() {
    Check(cudaMemcpy(host.data(), device.get(), bytes(), cudaMemcpyDeviceToHost), "copy back");
  }
};

// The tensors are [B, N, H, D] in memory, as a model's projections write them. Results are NaN
// until they are written.
struct Tensors {
  Mirrored<__half> q{B * Nq * H * D}, k{B * Nk * H * D}, v{B * Nk * H * D};
  Mirrored<__half> out{B * Nq * H * D, __float2half(NAN)};
  Mirrored<int32_t> start{B * Nq}, stop{B * Nq};
  Mirrored<float> lse{B * H * Nq, NAN};

  // There is an image every seven rows. The first 20 rows have none before them, and so no key.
  Tensors() {
    std::mt19937 random(0);
    std::uniform_real_distribution<float> number(-1, 1);
    for (__half& x : q.host) x = __float2half(4 * number(random));
    for (__half& x : k.host) x = __float2half(number(random));
    for (__half& x : v.host) x = __float2half(number(random));
    for (int b = 0; b < B; ++b)
      for (int i = 20; i < Nq; ++i) {
        start.host[b * Nq + i] = std::min((i - 20) / 7, kImages - 1) * kTokens;
        stop.host[b * Nq + i] = start.host[b * Nq + i] + kTokens;
      }
  }
};

xattn::CrossAttentionForwardParams ParamsOf(const Tensors& t, int multiprocessors) {
  const auto heads = [](const Mirrored<__half>& t, int N) {
    return xattn::HeadTensor{t.device.get(), {N * H * D, D, H * D}};
  };
  xattn::CrossAttentionForwardParams params{};  // A null pointer stands for what is not wanted.
  params.call.shape = {B, H, H, Nq, Nk, D, D, xattn::DType::kFloat16};
  params.call.q = heads(t.q, Nq), params.call.k = heads(t.k, Nk), params.call.v = heads(t.v, Nk);
  params.call.start = {t.start.device.get(), {Nq, 1}};
  params.call.stop = {t.stop.device.get(), {Nq, 1}};
  params.call.scale = 1 / std::sqrt(static_cast<float>(D));
  params.call.keep_scale = 1;  // There is no dropout.
  params.out = heads(t.out, Nq);
  params.lse = t.lse.device.get();
  params.n_splits = xattn::CrossAttentionForwardSplits(params.call, multiprocessors);
  return params;
}

int Plan() {
  xattn::PlanQueue queue;
  Check(xattn::CrossAttentionForward(ParamsOf(Tensors(), 132), queue), "CrossAttentionForward");
  for (const auto& step : queue.steps)
    std::printf("%s grid %u %u %u block %u %u %u shared %zu\n", step.name.c_str(), step.grid.x,
                step.grid.y, step.grid.z, step.block.x, step.block.y, step.block.z, step.shared);
  return 0;
}

// Computes row (b, i) of head h by the definition of attention. Returns its lse, and writes the
// result to `out` [D].
double Attend(const Tensors& t, int b, int h, int i, std::vector<double>& out) {
  const auto element = [=](const Mirrored<__half>& tensor, int N, int n, int d) {
    return double{__half2float(tensor.host[((b * N + n) * H + h) * D + d])};
  };
  const int start = t.start.host[b * Nq + i], stop = t.stop.host[b * Nq + i];
  std::vector<double> s(stop - start);
  double m = -INFINITY, l = 0;
  for (int j = start; j < stop; ++j) {
    for (int d = 0; d < D; ++d)
      s[j - start] += element(t.q, Nq, i, d) * element(t.k, Nk, j, d) / std::sqrt(D);
    m = std::max(m, s[j - start]);
  }
  for (double x : s) l += std::exp(x - m);
  out.assign(D, 0);
  for (int j = start; j < stop; ++j)
    for (int d = 0; d < D; ++d) out[d] += std::exp(s[j - start] - m) / l * element(t.v, Nk, j, d);
  return m + std::log(l);
}

// |actual - expected|, which is 0 for equal infinities, and infinity if one of the two is NaN.
double Distance(double actual, double expected) {
  const double distance = actual == expected ? 0 : std::abs(actual - expected);
  return std::isnan(distance) ? INFINITY : distance;
}

int Compare(const Tensors& t) {
  double error = 0, lse_error = 0;
  std::vector<double> expected;
  for (int b = 0; b < B; ++b)
    for (int h = 0; h < H; ++h)
      for (int i = 0; i < Nq; i += 3) {
        const double lse = Attend(t, b, h, i, expected);
        lse_error = std::max(lse_error, Distance(t.lse.host[(b * H + h) * Nq + i], lse));
        const __half* out = &t.out.host[((b * Nq + i) * H + h) * D];
        for (int d = 0; d < D; ++d)
          error = std::max(error, Distance(__half2float(out[d]), expected[d]));
      }
  const bool right = error <= kTolerance && lse_error <= kLseTolerance;
  std::printf("largest error of out %.2g, of lse %.2g: %s\n", error, lse_error,
              right ? "right" : "WRONG");
  return right ? 0 : 1;
}

int Run() {
  int n_devices = 0, multiprocessors = 0;
  const cudaError_t error = cudaGetDeviceCount(&n_devices);
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) {
    std::fprintf(stderr, "no CUDA device, or no driver for one: %s\n", cudaGetErrorString(error));
    return 77;
  }
  Check(error, "cudaGetDeviceCount");
  Check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0),
        "cudaDeviceGetAttribute");
  cudaStream_t stream = nullptr;
  Check(cudaStreamCreate(&stream), "cudaStreamCreate");

  Tensors t;
  for (Mirrored<__half>* x : {&t.q, &t.k, &t.v, &t.out}) x->ToDevice();
  for (Mirrored<int32_t>* x : {&t.start, &t.stop}) x->ToDevice();
  t.lse.ToDevice();
  xattn::CrossAttentionForwardParams params = ParamsOf(t, multiprocessors);
  Mirrored<float> parts(xattn::CrossAttentionForwardParts(params), NAN);
  parts.ToDevice();
  params.parts = parts.device.get();

  xattn::StreamQueue queue(stream);
  Check(xattn::CrossAttentionForward(params, queue), "CrossAttentionForward");
  Check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  t.out.ToHost(), t.lse.ToHost();
  Check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  return Compare(t);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return argc == 2 && std::strcmp(argv[1], "--plan") == 0 ? Plan() : Run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

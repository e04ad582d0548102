// Queues, to which launchers push their kernels: a stream, or a list of what would be launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace xattn {

// No kernel has more bytes of static shared memory.
constexpr size_t kMostStaticShared = 4 * 1024;

class Queue {
 public:
  virtual ~Queue() = default;
  // `kernel` is the symbol on the host, and `name` is the C++ expression that names it in namespace
  // xattn. `shared` is the dynamic shared memory in bytes. `params` points to the kernel's only
  // argument, of `size` bytes, which need not outlive the call. If Push returns an error, the
  // launcher pushes nothing more and returns it.
  virtual cudaError_t Push(const void* kernel, std::string_view name, dim3 grid, dim3 block,
                           size_t shared, const void* params, size_t size) = 0;
};

// Launches on a stream of the current device.
class StreamQueue final : public Queue {
 public:
  explicit StreamQueue(cudaStream_t stream) : stream_(stream) {}

  cudaError_t Push(const void* kernel, std::string_view, dim3 grid, dim3 block, size_t shared,
                   const void* params, size_t) override {
    // A kernel must ask for more than 48 KiB, which include its static shared memory.
    constexpr size_t kWithoutAsking = 48 * 1024 - kMostStaticShared;
    if (shared > kWithoutAsking) {
      const cudaError_t error = cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
      // The invalid value is `shared`: no block of this device can have so much.
      if (error == cudaErrorInvalidValue) return cudaErrorLaunchOutOfResources;
      if (error != cudaSuccess) return error;
    }
    void* arguments[] = {const_cast<void*>(params)};
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream_);
  }

 private:
  cudaStream_t stream_;
};

// Keeps what would be launched, and needs no device.
class PlanQueue final : public Queue {
 public:
  struct Step {
    std::string name;
    dim3 grid, block;
    size_t shared;
    std::string params;
  };

  cudaError_t Push(const void*, std::string_view name, dim3 grid, dim3 block, size_t shared,
                   const void* params, size_t size) override {
    steps.push_back({std::string(name), grid, block, shared,
                     std::string(static_cast<const char*>(params), size)});
    return cudaSuccess;
  }

  std::vector<Step> steps;
};

// The C++ expression that names `kernel`. It is the text between "kernel = " and the next template
// parameter in the compiler's name of this function.
template <auto kernel>
constexpr std::string_view KernelName() {
  constexpr std::string_view text = __PRETTY_FUNCTION__;
  constexpr std::string_view before = "kernel = ";
  constexpr size_t first = text.find(before) + before.size();
  return text.substr(first, text.find_first_of(";]", first) - first);
}

// The number of blocks of a launch. It may be larger than what a device accepts.
struct Grid {
  int64_t x, y;

  Grid(int64_t x, int64_t y = 1) : x(x), y(y) {}
  bool fits() const { return 0 < x && x <= INT32_MAX && 0 < y && y <= UINT16_MAX; }
};

template <auto kernel, class Params>
cudaError_t Launch(Queue& queue, Grid grid, dim3 block, size_t shared, const Params& params) {
  if (!grid.fits()) return cudaErrorInvalidValue;
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  return queue.Push(reinterpret_cast<const void*>(kernel), KernelName<kernel>(), blocks, block,
                    shared, &params, sizeof(params));
}

}  // namespace xattn

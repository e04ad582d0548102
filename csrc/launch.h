// Where kernel launches go: a stream, or a list of what would be launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace xattn {

// Bytes of static shared memory that no kernel is above.
constexpr size_t kMostStaticShared = 4 * 1024;

class Queue {
 public:
  virtual ~Queue() = default;
  // `kernel` is the host's symbol, `name` the C++ expression that names it in namespace xattn;
  // `shared` is dynamic shared memory in bytes; `params` is the kernel's one argument, of `size`
  // bytes, and may be gone afterwards. An error ends the launcher's call, which returns it.
  virtual cudaError_t Push(const void* kernel, std::string_view name, dim3 grid, dim3 block,
                           size_t shared, const void* params, size_t size) = 0;
};

// Launches on a stream of the current device.
class StreamQueue final : public Queue {
 public:
  explicit StreamQueue(cudaStream_t stream) : stream_(stream) {}

  cudaError_t Push(const void* kernel, std::string_view, dim3 grid, dim3 block, size_t shared,
                   const void* params, size_t) override {
    // More than 48 KiB must be asked for, of which a kernel may have some statically.
    constexpr size_t kWithoutAsking = 48 * 1024 - kMostStaticShared;
    if (shared > kWithoutAsking) {
      const cudaError_t error = cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
      // the value, which is more than a block of this device can have
      if (error == cudaErrorInvalidValue) return cudaErrorLaunchOutOfResources;
      if (error != cudaSuccess) return error;
    }
    void* arguments[] = {const_cast<void*>(params)};
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream_);
  }

 private:
  cudaStream_t stream_;
};

// What would be launched; needs no device.
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

// The text between "kernel = " and the next parameter in what the compiler calls this function.
template <auto kernel>
constexpr std::string_view KernelName() {
  constexpr std::string_view text = __PRETTY_FUNCTION__;
  constexpr std::string_view before = "kernel = ";
  constexpr size_t first = text.find(before) + before.size();
  return text.substr(first, text.find_first_of(";]", first) - first);
}

// Blocks of a launch, as they are counted: a device takes fewer.
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

// How host code starts kernels: the same calls run on the device and in the CPU emulator, so that grids, blocks and
// shared-memory sizes are tested with the kernels.
#pragma once

#include <algorithm>

#include "intrinsics.cuh"

#if !defined(CUDA_ON_CPU)
#include <torch/csrc/stable/macros.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#endif

namespace fasttricks::cuda {

// What the planners need to know of a card.
struct Device {
  int sm_count;
  int shared_per_sm;
  int shared_per_block;  // with the opt-in
};

#if defined(CUDA_ON_CPU)

// A small card: few blocks, so that a test sees several blocks per SM and several tiles per block.
inline Device emulated_device() {
  const int shared = int(emu::world.shared_per_sm);
  return {4, shared, shared - 1024};
}

template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, size_t dynamic_bytes, cudaStream_t, const A&... args) {
  emu::launch(reinterpret_cast<const void*>(kernel), grid, threads, dynamic_bytes, false, [&] { kernel(args...); });
}
// Returns whether the card takes the launch.
template <typename... P, typename... A>
bool launch_cooperative(void (*kernel)(P...), dim3 grid, int threads, size_t dynamic_bytes, cudaStream_t,
                        const A&... args) {
  if (emu::world.refuse_cooperative) return false;
  emu::launch(reinterpret_cast<const void*>(kernel), grid, threads, dynamic_bytes, true, [&] { kernel(args...); });
  return true;
}
// Number of a kernel's blocks that are resident on one SM at a time: three by their registers.
template <typename... P>
int resident_blocks(void (*kernel)(P...), int threads, size_t dynamic_bytes, const Device& device) {
  if (emu::world.recorder)
    return emu::world.recorder->resident(reinterpret_cast<const void*>(kernel), threads, dynamic_bytes);
  return dynamic_bytes == 0 ? 3 : std::min(3, int(device.shared_per_sm / (dynamic_bytes + 17 * 1024)));
}

#else

// What a function of the key returned on the first call: asking the driver costs microseconds.
template <typename Key, typename Value>
class Remembered {
 public:
  template <typename Make>
  Value get(const Key& key, Make make) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = values_.find(key);
    return found != values_.end() ? found->second : values_.emplace(key, make()).first->second;
  }

 private:
  std::mutex mutex_;
  std::map<Key, Value> values_;
};

// The value, or less if the environment says so: tests of small tensors then reach the plans of large ones.
inline int capped(int value, const char* variable) {
  const char* const cap = std::getenv(variable);
  return cap ? std::min(value, std::atoi(cap)) : value;
}
inline Device device_properties(int index) {
  static auto& known = *new Remembered<int, Device>;  // never destroyed: other threads may still launch at exit
  return known.get(index, [index] {
    const auto attribute = [index](cudaDeviceAttr which) {
      int value = 0;
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
      return value;
    };
    const char* const shared = "FASTTRICKS_TEST_SHARED_BYTES";
    return Device{capped(attribute(cudaDevAttrMultiProcessorCount), "FASTTRICKS_TEST_SM_COUNT"),
                  capped(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor), shared),
                  capped(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), shared)};
  });
}

inline int current_device() {
  int index = 0;
  STD_CUDA_CHECK(cudaGetDevice(&index));
  return index;
}
// Allows as much dynamic shared memory as a block can have, once per kernel and device: if every call allowed what it
// needs, one thread could lower the limit between another's call and its launch.
inline void allow_dynamic(const void* kernel) {
  static auto& allowed = *new Remembered<std::tuple<const void*, int>, bool>;
  const int index = current_device();
  allowed.get({kernel, index}, [kernel, index] {
    cudaFuncAttributes of_kernel;
    STD_CUDA_CHECK(cudaFuncGetAttributes(&of_kernel, kernel));
    int most = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        most - int(of_kernel.sharedSizeBytes)));
    return true;
  });
}
template <typename... P, typename... A>
cudaError_t start(bool cooperative, void (*kernel)(P...), dim3 grid, int threads, size_t dynamic_bytes,
                  cudaStream_t stream, const A&... args) {
  if (dynamic_bytes > 0) allow_dynamic(reinterpret_cast<const void*>(kernel));
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = dynamic_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, P(args)...);
}
template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, size_t dynamic_bytes, cudaStream_t stream, const A&... args) {
  STD_CUDA_CHECK(start(false, kernel, grid, threads, dynamic_bytes, stream, args...));
}
// Returns whether the card takes the launch. It does not if its blocks do not fit together: what fits is planned for a
// whole card, and a green context or MPS may leave a process a part of one.
template <typename... P, typename... A>
bool launch_cooperative(void (*kernel)(P...), dim3 grid, int threads, size_t dynamic_bytes, cudaStream_t stream,
                        const A&... args) {
  const cudaError_t error = start(true, kernel, grid, threads, dynamic_bytes, stream, args...);
  if (error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported) {
    cudaGetLastError();  // it is dealt with, and must not surface in an unrelated call
    return false;
  }
  STD_CUDA_CHECK(error);
  return true;
}
template <typename... P>
int resident_blocks(void (*kernel)(P...), int threads, size_t dynamic_bytes, const Device&) {
  static auto& known = *new Remembered<std::tuple<const void*, int, int, size_t>, int>;
  const void* const address = reinterpret_cast<const void*>(kernel);
  return known.get({address, current_device(), threads, dynamic_bytes}, [&] {
    if (dynamic_bytes > 0) allow_dynamic(address);
    int blocks = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, dynamic_bytes));
    return blocks;
  });
}

#endif

}  // namespace fasttricks::cuda

// How host code starts kernels: the same calls run on the device and in the CPU emulator, so that grids, blocks and
// shared-memory sizes are tested with the kernels.
#pragma once

#include "intrinsics.cuh"

#if !defined(CUDA_ON_CPU)
#include <torch/csrc/stable/macros.h>

#include <stdexcept>
#include <string>
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
  emu::launch(grid, dim3(unsigned(threads)), dynamic_bytes, false, [&] { kernel(args...); });
}
template <typename... P, typename... A>
void launch_cooperative(void (*kernel)(P...), dim3 grid, int threads, size_t dynamic_bytes, cudaStream_t,
                        const A&... args) {
  emu::launch(grid, dim3(unsigned(threads)), dynamic_bytes, true, [&] { kernel(args...); });
}
// Number of a kernel's blocks that are resident on one SM at a time.
template <typename... P>
int resident_blocks(void (*)(P...), int, size_t dynamic_bytes, const Device& device) {
  return int(device.shared_per_sm / (dynamic_bytes + 18 * 1024));
}

#else

inline Device device_properties(int index) {
  const auto attribute = [index](cudaDeviceAttr which) {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

template <typename... P>
void allow_dynamic(void (*kernel)(P...), size_t bytes) {
  if (bytes > 48 * 1024)
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}
template <typename... P, typename... A>
void start(bool cooperative, void (*kernel)(P...), dim3 grid, int threads, size_t dynamic_bytes, cudaStream_t stream,
           const A&... args) {
  allow_dynamic(kernel, dynamic_bytes);
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
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, P(args)...));
}
template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, size_t dynamic_bytes, cudaStream_t stream, const A&... args) {
  start(false, kernel, grid, threads, dynamic_bytes, stream, args...);
}
template <typename... P, typename... A>
void launch_cooperative(void (*kernel)(P...), dim3 grid, int threads, size_t dynamic_bytes, cudaStream_t stream,
                        const A&... args) {
  start(true, kernel, grid, threads, dynamic_bytes, stream, args...);
}
template <typename... P>
int resident_blocks(void (*kernel)(P...), int threads, size_t dynamic_bytes, const Device&) {
  allow_dynamic(kernel, dynamic_bytes);
  int blocks = 0;
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, dynamic_bytes));
  return blocks;
}

#endif

}  // namespace fasttricks::cuda

// The tensor side of a launch: registration, the tensor's device and stream. Every csrc/cuda/NAME.cu starts here.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "launch.cuh"

// In the emulator the same files serve CPU tensors, under a name of their own.
#if defined(CUDA_ON_CPU)
#define FT_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fasttricks_emulated, CPU, m)
#else
#define FT_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fasttricks, CUDA, m)
#endif

namespace fasttricks::cuda {

#if defined(CUDA_ON_CPU)

struct OnDevice {
  explicit OnDevice(const torch::stable::Tensor&) {}
  Device device = emulated_device();
  cudaStream_t stream = nullptr;
};

#else

// Makes the device of `t` the current one while this lives, and names torch's current stream there.
struct OnDevice {
  explicit OnDevice(const torch::stable::Tensor& t)
      : guard(t.get_device_index()), device(device_properties(t.get_device_index())) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
    STD_CUDA_CHECK(cudaSetDevice(t.get_device_index()));  // of the runtime in this library: torch has its own
  }
  torch::stable::accelerator::DeviceGuard guard;
  Device device;
  cudaStream_t stream;
};

#endif

}  // namespace fasttricks::cuda

// Whether this library's code runs on a given card.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>

namespace fasttricks::cuda {
namespace {

__global__ void probe() {}

// A launch is refused for the same reasons for which asking after a kernel's attributes is.
std::string cuda_why_not(int64_t device) {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&probe));
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // it is reported here, and must not surface in an unrelated call
  return "built with CUDA " + version(CUDART_VERSION) + ", driver for CUDA " + version(driver) + ": " +
         cudaGetErrorString(error);
}

}  // namespace
}  // namespace fasttricks::cuda

STABLE_TORCH_LIBRARY_IMPL(fasttricks, CompositeExplicitAutograd, m) {
  m.impl("cuda_why_not", TORCH_BOX(&fasttricks::cuda::cuda_why_not));
}

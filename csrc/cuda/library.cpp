// Whether this library's code runs on a given card.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include <string>

namespace fasttricks::cuda {

// The kernel that asks most of a driver, with 32 KB of parameters: one that loads it loads all. In sgd.cu.
const void* sgd_step_kernel();

namespace {

// Querying a kernel's attributes fails exactly when launching it would.
std::string cuda_why_not(int64_t device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(static_cast<int>(device));
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, sgd_step_kernel());
    cudaSetDevice(before);
  }
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // it is reported here, and must not surface in an unrelated call
  int driver = 0;
  cudaDriverGetVersion(&driver);
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  const std::string found = driver ? "the driver is for CUDA " + version(driver) : "there is no driver";
  return "built with CUDA " + version(CUDART_VERSION) + ", " + found + ": " + cudaGetErrorString(error);
}

}  // namespace
}  // namespace fasttricks::cuda

STABLE_TORCH_LIBRARY_IMPL(fasttricks, CompositeExplicitAutograd, m) {
  m.impl("cuda_why_not", TORCH_BOX(&fasttricks::cuda::cuda_why_not));
}

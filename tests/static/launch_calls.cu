// csrc/cuda/launch.cuh with a CUDA runtime that counts its calls, so that it runs without a card: test_cuda_launch.py.
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "launch.cuh"

namespace {

constexpr int kMost = 200'000, kStatic = 1'000;  // bytes of shared memory: of a block, of the kernel

std::mutex lock;
std::map<std::string, int> calls;
int allowed = 0, least_allowed = kMost, refused = 0;
cudaError_t next_launch = cudaSuccess;

void called(const char* name) {
  const std::lock_guard<std::mutex> guard(lock);
  ++calls[name];
}
int number_of(const char* name) { return calls[name]; }

}  // namespace

#if !defined(__CUDA_ARCH__)  // device code has declarations of its own
extern "C" {

cudaError_t cudaGetDevice(int* device) {
  called("cudaGetDevice");
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  called("cudaDeviceGetAttribute");
  *value = which == cudaDevAttrMultiProcessorCount ? 132 : kMost;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  called("cudaFuncGetAttributes");
  memset(attributes, 0, sizeof *attributes);
  attributes->sharedSizeBytes = kStatic;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  called("cudaFuncSetAttribute");
  const std::lock_guard<std::mutex> guard(lock);
  allowed = value;
  least_allowed = std::min(least_allowed, value);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  called("cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags");
  *blocks = 2;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* of, int threads, size_t bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, of, threads, bytes, 0);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  called("cudaLaunchKernelExC");
  const std::lock_guard<std::mutex> guard(lock);
  refused += int(config->dynamicSmemBytes) > allowed;
  return std::exchange(next_launch, cudaSuccess);
}
cudaError_t cudaGetLastError() {
  called("cudaGetLastError");
  return cudaSuccess;
}

// torch's: a message for an error, and its version.
AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  *message = error ? strdup(std::to_string(error).c_str()) : nullptr;
  return 0;
}
void torch_c10_cuda_free_error_msg(char* message) { free(message); }
uint64_t aoti_torch_abi_version() { return TORCH_TARGET_VERSION; }

}  // extern "C"
#endif

namespace {

using namespace fasttricks::cuda;

__global__ void kernel(int) {}

void launch_with(size_t dynamic_bytes) { launch(&kernel, dim3(1), 32, dynamic_bytes, nullptr, 1); }

// Of a cooperative launch to which the runtime answers with `error`.
const char* outcome(cudaError_t error) {
  next_launch = error;
  try {
    return launch_cooperative(&kernel, dim3(1), 32, 0, nullptr, 1) ? "launched" : "refused";
  } catch (const std::runtime_error&) {
    return "thrown";
  }
}

// What a call asks of the driver, after one like it; the current device is known without it.
int questions_of_another_call() {
  const auto asked = [] {
    int sum = 0;
    for (const auto& [name, count] : calls) sum += name == "cudaLaunchKernelExC" || name == "cudaGetDevice" ? 0 : count;
    return sum;
  };
  int before = 0;
  for (int i = 0; i < 2; ++i) {
    before = asked();
    resident_blocks(&kernel, 32, 64'000, device_properties(0));
    launch_with(64'000);
  }
  return asked() - before;
}

}  // namespace

int main() {
  std::vector<std::thread> threads;
  for (int k = 0; k < 4; ++k)
    threads.emplace_back([k] {
      for (int i = 1; i <= 200; ++i) launch_with(size_t(k % 2 ? i : 900 * i));
    });
  for (std::thread& thread : threads) thread.join();
  printf("launches %d\nrefused %d\n", number_of("cudaLaunchKernelExC"), refused);
  printf("settings %d\nleast %d\n", number_of("cudaFuncSetAttribute"), least_allowed);
  printf("questions %d\n", questions_of_another_call());
  printf("attributes %d\n", number_of("cudaDeviceGetAttribute"));
  printf("fits %s\n", outcome(cudaSuccess));
  printf("too_large %s\n", outcome(cudaErrorCooperativeLaunchTooLarge));
  printf("cleared %d\n", number_of("cudaGetLastError"));
  printf("broken %s\n", outcome(cudaErrorIllegalAddress));
}

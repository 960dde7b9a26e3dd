// Kernels that use each primitive of the emulator once, with faults that can be planted, for the emulator's own tests.
#include <string>

#include "bindings.h"
#include "launch.cuh"

using namespace fasttricks::cuda;

// Each thread's right neighbour through shared memory, then its warp's sum, then the vote of the block.
__global__ void neighbours(const int* x, int* out, int fault) {
  FT_SHARED(int, buffer, 128);
  const int t = int(threadIdx.x), n = int(blockDim.x);
  if (fault != 5 || t != 9) buffer[t] = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (fault != 1) __syncthreads();
  if (fault == 2 && t < 40) __syncthreads();  // divergent
  if (fault == 3 && t > 40) return;
  const int next = buffer[fault == 4 ? t + 128 : (t + 1) % n];
  const int sum = sum_over_lanes<32>(next), any = __syncthreads_or(next == 7);
  out[blockIdx.x * blockDim.x + threadIdx.x + (fault == 6 ? 1 : 0)] = next + 1000 * sum + 1000000 * any;
}

// Blocks exchange through global memory.
__global__ void ring(const int* x, int* middle, int* out, int fault) {
  const int b = int(blockIdx.x), n = int(gridDim.x), t = int(threadIdx.x), w = int(blockDim.x);
  store(middle + b * w + t, load(x + b * w + t));
  if (fault != 1) FT_GRID_BARRIER();
  if (fault == 2 && b == 0) FT_GRID_BARRIER();
  store(out + b * w + t, load_shared_between_blocks(middle + (b + 1) % n * w + t));
}

// Counts, maxima, ballots, and a value handed down a warp.
__global__ void votes(const int* x, int* counts, int fault) {
  const int v = x[threadIdx.x];
  atomicAdd(&counts[0], v);
  atomicMax(&counts[1], v);
  if (fault == 1 && threadIdx.x == 3) return;
  const unsigned odd = __ballot_sync(kAllLanes, v & 1);
  const int last = __shfl_sync(kAllLanes, v, 31);
  if (threadIdx.x == 0) {
    atomicExch(&counts[2], int(odd));
    atomicExch(&counts[3], last);
  }
}

// 16 x 16 times 16 x 8 (the first 8 columns of the second matrix): cp.async, ldmatrix, mma.sync. Matrices of halves.
__global__ void product(const Half* a, const Half* b, float* out, int fault) {
  FT_DYNAMIC_SHARED(memory);
  Half* const tile = reinterpret_cast<Half*>(memory);  // a, then b
  const int lane = int(threadIdx.x);
  const int row = lane % 16, half = lane / 16 * 8;
  copy_async(tile + row * 16 + half + (fault == 2 ? 1 : 0), a + row * 16 + half, true);
  copy_async(tile + 256 + row * 16 + half, b + row * 16 + half, fault != 3);
  copy_commit();
  if (fault != 1) copy_wait<0>();
  if (fault != 4) __syncthreads();
  uint32_t fragment[4], other[4];
  load_matrices<false>(fragment, tile + lane % 16 * 16 + lane / 16 * 8);
  load_matrices<true>(other, tile + 256 + lane % 16 * 16 + lane / 16 * 8);
  float d[4] = {};
  multiply_add<Half>(d, fragment, {other[0], other[1]});
  for (int i = 0; i < 4; ++i) store(out + (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2, d[i]);
}

// Threads store words that are `stride` apart, then load 16 bytes each, of every stride-th row of 16.
__global__ void banks(int* out, int stride) {
  FT_SHARED(int, buffer, 32 * 4 * 32);
  const int t = int(threadIdx.x);
  store_shared(buffer + t * stride, t);
  __syncthreads();
  store(out + t, int(load_shared(reinterpret_cast<const uint4*>(buffer) + t * stride).x));
}

// Runs a primitive on buffers x and y, and z where it needs a third.
static void run(const std::string& name, const py::buffer& x, const py::buffer& y, const py::buffer& z, int fault) {
  const auto i = [](const py::buffer& b) { return static_cast<int*>(b.request(true).ptr); };
  if (name == "neighbours") {
    launch(&neighbours, dim3(3), 128, 0, nullptr, i(x), i(y), fault);
  } else if (name == "ring" && fault == 3) {
    launch(&ring, dim3(4), 64, 0, nullptr, i(x), i(y), i(z), 0);
  } else if (name == "ring") {
    launch_cooperative(&ring, dim3(4), 64, 0, nullptr, i(x), i(y), i(z), fault);
  } else if (name == "votes") {
    launch(&votes, fault == 2 ? dim3(1, 70000) : dim3(1), fault == 3 ? 2048 : 32, 0, nullptr, i(x), i(y), fault);
  } else if (name == "product") {
    const size_t bytes = fault == 5 ? 768 : 1024;
    const auto half = [](const py::buffer& b) { return static_cast<Half*>(b.request(true).ptr); };
    launch(&product, dim3(1), 32, bytes, nullptr, half(x), half(y), static_cast<float*>(z.request(true).ptr), fault);
  } else if (name == "banks") {
    launch(&banks, dim3(1), 32, 0, nullptr, i(y), fault);
  } else {
    throw std::invalid_argument("no primitive " + name);
  }
}

EMU_BINDINGS(m) {
  m.def("run_primitive", &run, py::arg("name"), py::arg("x"), py::arg("y"), py::arg("z"), py::arg("fault"));
}

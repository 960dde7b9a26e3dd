// What kernels may use of the device beyond plain C++. Every global access goes through load/store, which vectorise to
// 16 bytes and which the CPU emulator (tests/emulator) counts; this is the only kernel header that tells device from
// emulator.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(CUDA_ON_CPU)
#define FT_METER_LOAD(bytes) ::emu::count_load(bytes)
#define FT_METER_STORE(bytes) ::emu::count_store(bytes)
// T name[N] in the block's shared memory.
#define FT_SHARED(T, name, N)     \
  static char name##_declaration; \
  T(&name)[N] = ::emu::shared<T, N>(&name##_declaration)
// The dynamic shared memory of the launch.
#define FT_DYNAMIC_SHARED(name) unsigned char* const name = static_cast<unsigned char*>(::emu::dynamic_shared())
// A large struct in the kernel's parameter space, read in place.
#define FT_PARAMETER(T) const T&
#define FT_DEVICE inline
#else
#include <cooperative_groups.h>
#define FT_METER_LOAD(bytes) ((void)0)
#define FT_METER_STORE(bytes) ((void)0)
#define FT_SHARED(T, name, N) __shared__ T name[N]
#define FT_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define FT_PARAMETER(T) __grid_constant__ const T
#define FT_DEVICE __device__ __forceinline__
#endif

namespace fasttricks::cuda {

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

// The type in which values of type T are accumulated.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T, int N>
FT_DEVICE void load(const T* p, T (&v)[N]) {
  static_assert(N * sizeof(T) % 16 == 0, "whole 16-byte vectors");
  FT_METER_LOAD(N * sizeof(T));
#pragma unroll
  for (int i = 0; i < int(N * sizeof(T) / 16); ++i) {
    const uint4 u = reinterpret_cast<const uint4*>(p)[i];
    memcpy(reinterpret_cast<char*>(v) + 16 * i, &u, 16);
  }
}
template <typename T, int N>
FT_DEVICE void store(T* p, const T (&v)[N]) {
  static_assert(N * sizeof(T) % 16 == 0, "whole 16-byte vectors");
  FT_METER_STORE(N * sizeof(T));
#pragma unroll
  for (int i = 0; i < int(N * sizeof(T) / 16); ++i) {
    uint4 u;
    memcpy(&u, reinterpret_cast<const char*>(v) + 16 * i, 16);
    reinterpret_cast<uint4*>(p)[i] = u;
  }
}
template <typename T>
FT_DEVICE T load(const T* p) {
  FT_METER_LOAD(sizeof(T));
  return *p;
}
template <typename T>
FT_DEVICE void store(T* p, T v) {
  FT_METER_STORE(sizeof(T));
  *p = v;
}
// A value that another block of the same launch has written before the last grid barrier: never through the read-only
// cache.
template <typename T>
FT_DEVICE T load_shared_between_blocks(const T* p) {
  FT_METER_LOAD(sizeof(T));
#if defined(CUDA_ON_CPU)
  return *p;
#else
  return __ldcg(p);
#endif
}

// All blocks of a cooperative launch wait for each other, and see each other's writes.
#if defined(CUDA_ON_CPU)
#define FT_GRID_BARRIER() ::emu::grid_barrier(__FILE__, __LINE__)
#else
#define FT_GRID_BARRIER() cooperative_groups::this_grid().sync()
#endif

template <int Lanes, typename A>
FT_DEVICE A sum_over_lanes(A v) {
#pragma unroll
  for (int bit = Lanes / 2; bit > 0; bit /= 2) v += __shfl_xor_sync(kAllLanes, v, bit);
  return v;
}

}  // namespace fasttricks::cuda

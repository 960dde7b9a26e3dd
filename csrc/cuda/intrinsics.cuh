// Everything that kernels use of the device beyond plain C++. Every global access goes through load/store, which
// vectorise to 16 bytes and which the CPU emulator (tests/emulator) counts; this is the only kernel header that tells
// device from emulator.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "math/common.h"
#include "types.h"

#if defined(CUDA_ON_CPU)
#define FT_METER_LOAD(p, bytes) ::emu::count_load(p, bytes)
#define FT_METER_STORE(p, bytes) ::emu::count_store(p, bytes)
#define FT_METER_SHARED(p, bytes) ::emu::count_shared(p, bytes)
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
#define FT_METER_LOAD(p, bytes) ((void)0)
#define FT_METER_STORE(p, bytes) ((void)0)
#define FT_METER_SHARED(p, bytes) ((void)0)
#define FT_SHARED(T, name, N) __shared__ T name[N]
#define FT_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define FT_PARAMETER(T) __grid_constant__ const T
#define FT_DEVICE __device__ __forceinline__
#endif

namespace fasttricks::cuda {

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T, int N>
FT_DEVICE void load(const T* p, T (&v)[N]) {
  static_assert(N * sizeof(T) % 16 == 0, "whole 16-byte vectors");
  FT_METER_LOAD(p, N * sizeof(T));
#pragma unroll
  for (int i = 0; i < int(N * sizeof(T) / 16); ++i) {
    const uint4 u = reinterpret_cast<const uint4*>(p)[i];
    memcpy(reinterpret_cast<char*>(v) + 16 * i, &u, 16);
  }
}
// As load, of what no kernel reads soon again: L2 evicts it first. Unlike load's it may have been written by this
// thread.
template <typename T, int N>
FT_DEVICE void load_last(const T* p, T (&v)[N]) {
  static_assert(N * sizeof(T) % 16 == 0, "whole 16-byte vectors");
  FT_METER_LOAD(p, N * sizeof(T));
#pragma unroll
  for (int i = 0; i < int(N * sizeof(T) / 16); ++i) {
#if defined(CUDA_ON_CPU)
    const uint4 u = reinterpret_cast<const uint4*>(p)[i];
#else
    const uint4 u = __ldcs(reinterpret_cast<const uint4*>(p) + i);
#endif
    memcpy(reinterpret_cast<char*>(v) + 16 * i, &u, 16);
  }
}
template <typename T, int N>
FT_DEVICE void store(T* p, const T (&v)[N]) {
  static_assert(N * sizeof(T) % 16 == 0, "whole 16-byte vectors");
  FT_METER_STORE(p, N * sizeof(T));
#pragma unroll
  for (int i = 0; i < int(N * sizeof(T) / 16); ++i) {
    uint4 u;
    memcpy(&u, reinterpret_cast<const char*>(v) + 16 * i, 16);
    reinterpret_cast<uint4*>(p)[i] = u;
  }
}
template <typename T>
FT_DEVICE T load(const T* p) {
  FT_METER_LOAD(p, sizeof(T));
  return *p;
}
template <typename T>
FT_DEVICE void store(T* p, T v) {
  FT_METER_STORE(p, sizeof(T));
  *p = v;
}
// Two neighbours in one access; p is aligned to both.
template <typename T>
using pair_t = std::conditional_t<sizeof(T) == 2, uint32_t, std::conditional_t<sizeof(T) == 4, uint64_t, uint4>>;
template <typename T>
FT_DEVICE void load_pair(const T* p, T (&v)[2]) {
  FT_METER_LOAD(p, 2 * sizeof(T));
  const auto u = *reinterpret_cast<const pair_t<T>*>(p);
  memcpy(v, &u, sizeof u);
}
template <typename T>
FT_DEVICE void store_pair(T* p, const T (&v)[2]) {
  FT_METER_STORE(p, 2 * sizeof(T));
  pair_t<T> u;
  memcpy(&u, v, sizeof u);
  *reinterpret_cast<pair_t<T>*>(p) = u;
}
// Loads a value that another block of the same launch wrote before the last grid barrier, bypassing the read-only
// cache.
template <typename T>
FT_DEVICE T load_shared_between_blocks(const T* p) {
  FT_METER_LOAD(p, sizeof(T));
#if defined(CUDA_ON_CPU)
  return *p;
#else
  return __ldcg(p);
#endif
}

template <typename T>
FT_DEVICE void load_pair_shared_between_blocks(const T* p, T (&v)[2]) {
  FT_METER_LOAD(p, 2 * sizeof(T));
#if defined(CUDA_ON_CPU)
  const auto u = *reinterpret_cast<const pair_t<T>*>(p);
#else
  const auto u = __ldcg(reinterpret_cast<const pair_t<T>*>(p));
#endif
  memcpy(v, &u, sizeof u);
}

// v, of which the compiler knows nothing: what depends on it is not computed early, nor kept from before.
template <typename T>
FT_DEVICE T hidden(T v) {
  static_assert(sizeof(T) == 4);
#if !defined(CUDA_ON_CPU)
  asm volatile("" : "+r"(v));
#endif
  return v;
}

// Accesses to shared memory that the emulator counts bank conflicts of.
template <typename T>
FT_DEVICE T load_shared(const T* p) {
  FT_METER_SHARED(p, sizeof(T));
  return *p;
}
template <typename T>
FT_DEVICE void store_shared(T* p, T v) {
  FT_METER_SHARED(p, sizeof(T));
  *p = v;
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

// d += a * b on the tensor cores: a is 16 x 16, b 16 x 8, of T = Half or BFloat16; d is fp32. The elements of a thread
// follow the PTX manual ("Matrix fragments for mma.m16n8k16").
template <typename T>
FT_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(CUDA_ON_CPU)
  ::emu::mma_m16n8k16(d, a, b, +[](uint16_t bits) { return float(std::bit_cast<T>(bits)); });
#else
  if constexpr (std::is_same_v<T, Half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8 x 8 matrices of 16-bit values from shared memory (ldmatrix): lane l names row l % 8 of matrix l / 8, 16 bytes.
template <bool kTranspose>
FT_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
#if defined(CUDA_ON_CPU)
  ::emu::ldmatrix_x4(r, row, kTranspose);
#else
  const uint32_t at = uint32_t(__cvta_generic_to_shared(row));
  if constexpr (kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
#endif
}

// Copies 16 bytes from global to shared memory, bypassing the registers; zeros unless `needed`. Visible to this thread
// after copy_wait, to others after a barrier that follows.
FT_DEVICE void copy_async(void* to, const void* from, bool needed) {
#if defined(CUDA_ON_CPU)
  ::emu::cp_async16(to, from, needed ? 16 : 0);
#else
  const uint32_t at = uint32_t(__cvta_generic_to_shared(to));
  const int bytes = needed ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
#endif
}
// Ends a group of copies.
FT_DEVICE void copy_commit() {
#if defined(CUDA_ON_CPU)
  ::emu::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most the last kPending of this thread's groups are in flight.
template <int kPending>
FT_DEVICE void copy_wait() {
#if defined(CUDA_ON_CPU)
  ::emu::cp_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace fasttricks::cuda

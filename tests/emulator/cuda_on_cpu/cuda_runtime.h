// Test-only stand-in for the toolkit's header of this name: CUDA C++ kernels compile with g++ and run on the CPU.
// Standard headers come first, so that no macro below leaks into them. __noinline__ stays undefined: libstdc++ spells
// it.
#pragma once
#include <math.h>  // puts isfinite, isnan, ... at global scope, as nvcc does

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <type_traits>

#include "warp.h"

#define CUDA_ON_CPU 1
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define EMU_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()

#define EMU_VECTOR_TYPES(T, n, size)                                             \
  struct __attribute__((may_alias, aligned((size) * 2))) n##2 { T x, y; };       \
  struct __attribute__((may_alias, aligned((size) * 4))) n##4 { T x, y, z, w; }; \
  inline n##2 make_##n##2(T x, T y) { return {x, y}; }                           \
  inline n##4 make_##n##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTOR_TYPES(float, float, 4)
EMU_VECTOR_TYPES(unsigned, uint, 4)

using cudaStream_t = void*;

EMU_UNSEEN inline const uint3& emu_thread() { return emu::world.current->tid; }
EMU_UNSEEN inline const uint3& emu_block() { return emu::world.current->block->id; }
EMU_UNSEEN inline int emu_lane() { return emu::world.current->lane; }
#define threadIdx (emu_thread())
#define blockIdx (emu_block())
#define blockDim (emu::world.block)
#define gridDim (emu::world.grid)

EMU_UNSEEN inline void __syncthreads(EMU_AT) { emu::barrier(0, file, line); }
EMU_UNSEEN inline int __syncthreads_or(int vote, EMU_AT) { return emu::barrier(vote != 0, file, line); }
EMU_UNSEEN inline void __syncwarp(unsigned mask = ~0u, EMU_AT) {
  emu::collective(mask, emu::kSyncWarp, nullptr, nullptr, true, file, line);
}
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, EMU_AT) {
  return emu::shuffle_from(mask, v, (emu_lane() & ~(width - 1)) | (source & (width - 1)), emu::kShuffle, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, EMU_AT) {
  const int lane = emu_lane(), source = lane ^ bits;
  return emu::shuffle_from(mask, v, source > (lane | (width - 1)) ? lane : source, emu::kShuffleXor, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, EMU_AT) {
  const int lane = emu_lane();
  return emu::shuffle_from(mask, v, (lane & (width - 1)) + int(by) < width ? lane + int(by) : lane, emu::kShuffleDown,
                           file, line);
}
EMU_UNSEEN inline unsigned __ballot_sync(unsigned mask, int vote, EMU_AT) {
  unsigned r = vote != 0;
  emu::collective(
      mask, emu::kBallot, &r,
      +[](emu::Fiber** lanes, unsigned m) {
        unsigned all = 0;
        for (int l = 0; l < 32; ++l)
          if (m >> l & 1) all |= *static_cast<unsigned*>(lanes[l]->arg) << l;
        for (int l = 0; l < 32; ++l)
          if (m >> l & 1) *static_cast<unsigned*>(lanes[l]->arg) = all;
      },
      false, file, line);
  return r;
}

// Atomics: no race to ThreadSanitizer, and they order no memory (CUDA's are relaxed).
template <class T, class F>
T emu_read_modify_write(T* p, F f) {
  using U = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  U* q = reinterpret_cast<U*>(p);
  U seen = __atomic_load_n(q, __ATOMIC_RELAXED);
  for (;;) {
    const T old = std::bit_cast<T>(seen);
    if (__atomic_compare_exchange_n(q, &seen, std::bit_cast<U>(T(f(old))), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
      return old;
  }
}
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  return emu_read_modify_write(p, [=](T old) { return T(old + v); });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  return emu_read_modify_write(p, [=](T old) { return old > v ? old : v; });
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v) {
  return emu_read_modify_write(p, [=](T) { return v; });
}
inline float __uint_as_float(unsigned u) { return std::bit_cast<float>(u); }
inline unsigned __float_as_uint(float f) { return std::bit_cast<unsigned>(f); }

// The blocked matrix product of the convolution kernels: C[rows x cols] (+)= A[rows x kc] B[kc x cols].
// Like vec.h, included by csrc/cpu/isa/*.cpp only and compiled once per ISA.
//
// A: rows of kRow<T> elements, each contiguous in k. The fixed stride makes every address of the innermost loop a
// constant
//    offset from one pointer, and is no multiple of a page, so that the rows of a tile fall into different cache sets.
// B: panels of kNr<T> columns, contiguous in k: kc rows of kNr<T>. Missing columns of the last panel are zeros.
// The tile kMr x kNr of C lives in registers: 14 x 2 of the 32 of AVX-512, 6 x 2 of the 16 of AVX2.
#pragma once

#include "cpu/shuffle.h"

namespace fasttricks::cpu::FT_ISA {

#if defined(FT_ISA_AVX512)
constexpr int kMr = 14, kNv = 2;
#elif defined(FT_ISA_AVX2)
constexpr int kMr = 6, kNv = 2;
#else
constexpr int kMr = 4, kNv = 1;
#endif
constexpr int64_t kKc = 512;   // the deepest block of k
constexpr int64_t kSum = 128;  // the longest sum in registers: rounding errors grow with its length
constexpr int64_t kPad = 64;   // bytes
template <class A>
constexpr int kNr = kNv * Vec<A>::N;
template <class A>
constexpr int64_t kRow = kKc + kPad / int64_t(sizeof(A));

FT_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
FT_INLINE int64_t max_of(int64_t a, int64_t b) { return a < b ? b : a; }

// Part `i` of `parts` equal parts of [0, n), in whole units.
FT_INLINE int64_t part_begin(int64_t n, int64_t unit, int64_t parts, int64_t i) {
  return min_of(n, ceil_div(n, unit) * i / parts * unit);
}

// C[R x kNr] (+)= A[R x kc] B[kc x kNr]
template <class A, int R>
static void multiply_tile(int64_t kc, const A* a, const A* b, A* c, int64_t ldc, bool accumulate) {
  constexpr int N = Vec<A>::N;
  Vec<A> acc[R][kNv];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    if (accumulate) __builtin_prefetch(c + i * ldc, 1), __builtin_prefetch(c + i * ldc + kNr<A> - 1, 1);
#pragma GCC unroll 2
    for (int j = 0; j < kNv; ++j) acc[i][j] = Vec<A>(A(0));
  }
  for (int64_t k = 0; k < kc; ++k, ++a, b += kNr<A>) {
    Vec<A> row[kNv];
#pragma GCC unroll 2
    for (int j = 0; j < kNv; ++j) row[j] = Vec<A>::load(b + j * N);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      Vec<A> x(a[i * kRow<A>]);
#if defined(FT_ISA_AVX512)
      asm("" : "+v"(x.v));  // loaded once: a memory operand in both products would saturate the load ports
#endif
#pragma GCC unroll 2
      for (int j = 0; j < kNv; ++j) acc[i][j] = Vec<A>::fma(x, row[j], acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kNv; ++j) {
      A* p = c + i * ldc + j * N;
      (accumulate ? Vec<A>::load(p) + acc[i][j] : acc[i][j]).store(p);
    }
}

template <class A>
using TileKernel = void (*)(int64_t kc, const A* a, const A* b, A* c, int64_t ldc, bool accumulate);

template <class A, int R = kMr>
FT_INLINE TileKernel<A> tile_kernel(int64_t rows) {
  if constexpr (R == 1)
    return multiply_tile<A, 1>;
  else
    return rows == R ? multiply_tile<A, R> : tile_kernel<A, R - 1>(rows);
}

// C[rows x cols] (+)= A B over panels that lie panel_stride apart. If c_padded, C has room for whole panels; otherwise
// the last panel is computed in a separate tile, and nothing right of `cols` is touched.
template <class A>
static void multiply(int64_t rows, int64_t cols, int64_t kc, const A* a, const A* b, int64_t panel_stride, A* c,
                     int64_t ldc, bool accumulate, bool c_padded) {
  const int64_t tiles = ceil_div(rows, kMr);
  for (int64_t j = 0; j < cols; j += kNr<A>, b += panel_stride) {
    const int64_t width = min_of(kNr<A>, cols - j);
    for (int64_t t = 0; t < tiles; ++t) {
      // rows are spread evenly over the tiles: a thin last tile could not hide the latency of its products
      const int64_t r0 = rows * t / tiles, r = rows * (t + 1) / tiles - r0;
      const auto tile_product = [&](A* out, int64_t ld, bool add) {
        for (int64_t k = 0; k < kc; k += kSum, add = true)
          tile_kernel<A>(r)(min_of(kSum, kc - k), a + r0 * kRow<A> + k, b + k * kNr<A>, out, ld, add);
      };
      A* out = c + r0 * ldc + j;
      if (width == kNr<A> || c_padded) {
        tile_product(out, ldc, accumulate);
      } else {
        A tile[kMr * kNr<A>];
        tile_product(tile, kNr<A>, false);
        for (int64_t i = 0; i < r; ++i)
          for (int64_t q = 0; q < width; ++q)
            out[i * ldc + q] = accumulate ? out[i * ldc + q] + tile[i * kNr<A> + q] : tile[i * kNr<A> + q];
      }
    }
  }
}

}  // namespace fasttricks::cpu::FT_ISA

// Runs of vectors, and lane shuffles beyond those of Vec: sums of neighbours, duplicated lanes, transposes of N x N
// tiles.
// Like vec.h, included by csrc/cpu/isa/*.cpp only and compiled once per ISA.
#pragma once

#include "cpu/vec.h"

namespace fasttricks::cpu::FT_ISA {

// Loads and stores of n lanes, 0 <= n <= N.
template <class A, class T>
FT_INLINE Vec<A> load_n(const T* p, int64_t n) {
  return n == Vec<A>::N ? Vec<A>::load(p) : Vec<A>::load(p, int(n));
}
template <class A, class T>
FT_INLINE void store_n(Vec<A> v, T* p, int64_t n) {
  if (n == Vec<A>::N)
    v.store(p);
  else
    v.store(p, int(n));
}

// Calls f(i, n) for [0, size) in steps of n = N, and once for the rest.
template <class V, class F>
FT_INLINE void each(int64_t size, F f) {
  int64_t i = 0;
  for (; i + V::N <= size; i += V::N) f(i, V::N);
  if (i < size) f(i, int(size - i));
}
#define FT_LAMBDA __attribute__((always_inline))

#if defined(FT_ISA_AVX512)

// Lane i: the sum of elements 2i and 2i + 1 of lo followed by hi.
FT_INLINE Vec<float> pair_sum(Vec<float> lo, Vec<float> hi) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return _mm512_add_ps(_mm512_permutex2var_ps(lo.v, even, hi.v), _mm512_permutex2var_ps(lo.v, odd, hi.v));
}
FT_INLINE Vec<double> pair_sum(Vec<double> lo, Vec<double> hi) {
  const __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
  const __m512i odd = _mm512_add_epi64(even, _mm512_set1_epi64(1));
  return _mm512_add_pd(_mm512_permutex2var_pd(lo.v, even, hi.v), _mm512_permutex2var_pd(lo.v, odd, hi.v));
}

// Every lane twice: lo followed by hi is a0 a0 a1 a1 ...
FT_INLINE void twice(Vec<float> a, Vec<float>& lo, Vec<float>& hi) {
  const __m512i first = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  lo = _mm512_permutexvar_ps(first, a.v);
  hi = _mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32(8)), a.v);
}
FT_INLINE void twice(Vec<double> a, Vec<double>& lo, Vec<double>& hi) {
  const __m512i first = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
  lo = _mm512_permutexvar_pd(first, a.v);
  hi = _mm512_permutexvar_pd(_mm512_add_epi64(first, _mm512_set1_epi64(4)), a.v);
}

// Transposes an N x N tile held in registers.
FT_INLINE void transpose_tile(Vec<float> (&r)[16]) {
  __m512 t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // 32-bit pairs of two rows
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // four rows: u[4i + q] holds columns q, q + 4, q + 8, q + 12
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    u[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    u[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    u[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    u[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {  // 128-bit blocks across the four groups of rows
    const __m512 a = _mm512_shuffle_f32x4(u[q], u[4 + q], 0x88), b = _mm512_shuffle_f32x4(u[8 + q], u[12 + q], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(u[q], u[4 + q], 0xdd), d = _mm512_shuffle_f32x4(u[8 + q], u[12 + q], 0xdd);
    r[q] = _mm512_shuffle_f32x4(a, b, 0x88);
    r[4 + q] = _mm512_shuffle_f32x4(c, d, 0x88);
    r[8 + q] = _mm512_shuffle_f32x4(a, b, 0xdd);
    r[12 + q] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
}
FT_INLINE void transpose_tile(Vec<double> (&r)[8]) {
  __m512d t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm512_unpacklo_pd(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_pd(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 2
  for (int q = 0; q < 2; ++q) {
    const __m512d a = _mm512_shuffle_f64x2(t[q], t[2 + q], 0x88), b = _mm512_shuffle_f64x2(t[4 + q], t[6 + q], 0x88);
    const __m512d c = _mm512_shuffle_f64x2(t[q], t[2 + q], 0xdd), d = _mm512_shuffle_f64x2(t[4 + q], t[6 + q], 0xdd);
    r[q] = _mm512_shuffle_f64x2(a, b, 0x88);
    r[2 + q] = _mm512_shuffle_f64x2(c, d, 0x88);
    r[4 + q] = _mm512_shuffle_f64x2(a, b, 0xdd);
    r[6 + q] = _mm512_shuffle_f64x2(c, d, 0xdd);
  }
}

#elif defined(FT_ISA_AVX2)

FT_INLINE Vec<float> pair_sum(Vec<float> lo, Vec<float> hi) {
  const __m256d s = _mm256_castps_pd(_mm256_hadd_ps(lo.v, hi.v));
  return _mm256_castpd_ps(_mm256_permute4x64_pd(s, 0xd8));
}
FT_INLINE Vec<double> pair_sum(Vec<double> lo, Vec<double> hi) {
  return _mm256_permute4x64_pd(_mm256_hadd_pd(lo.v, hi.v), 0xd8);
}

FT_INLINE void twice(Vec<float> a, Vec<float>& lo, Vec<float>& hi) {
  const __m256 l = _mm256_unpacklo_ps(a.v, a.v), h = _mm256_unpackhi_ps(a.v, a.v);
  lo = _mm256_permute2f128_ps(l, h, 0x20);
  hi = _mm256_permute2f128_ps(l, h, 0x31);
}
FT_INLINE void twice(Vec<double> a, Vec<double>& lo, Vec<double>& hi) {
  lo = _mm256_permute4x64_pd(a.v, 0x50);
  hi = _mm256_permute4x64_pd(a.v, 0xfa);
}

FT_INLINE void transpose_tile(Vec<float> (&r)[8]) {
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256d a = _mm256_castps_pd(t[4 * i]), b = _mm256_castps_pd(t[4 * i + 1]);
    const __m256d c = _mm256_castps_pd(t[4 * i + 2]), d = _mm256_castps_pd(t[4 * i + 3]);
    u[4 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    u[4 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    u[4 * i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    u[4 * i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    r[q] = _mm256_permute2f128_ps(u[q], u[4 + q], 0x20);
    r[4 + q] = _mm256_permute2f128_ps(u[q], u[4 + q], 0x31);
  }
}
FT_INLINE void transpose_tile(Vec<double> (&r)[4]) {
  const __m256d a = _mm256_unpacklo_pd(r[0].v, r[1].v), b = _mm256_unpackhi_pd(r[0].v, r[1].v);
  const __m256d c = _mm256_unpacklo_pd(r[2].v, r[3].v), d = _mm256_unpackhi_pd(r[2].v, r[3].v);
  r[0] = _mm256_permute2f128_pd(a, c, 0x20);
  r[1] = _mm256_permute2f128_pd(b, d, 0x20);
  r[2] = _mm256_permute2f128_pd(a, c, 0x31);
  r[3] = _mm256_permute2f128_pd(b, d, 0x31);
}

#else

template <class A>
FT_INLINE Vec<A> pair_sum(Vec<A> lo, Vec<A> hi) {
  constexpr int N = Vec<A>::N;
  Vec<A> r;
  for (int i = 0; i < N / 2; ++i) {
    r.v[i] = lo.v[2 * i] + lo.v[2 * i + 1];
    r.v[N / 2 + i] = hi.v[2 * i] + hi.v[2 * i + 1];
  }
  return r;
}

template <class A>
FT_INLINE void twice(Vec<A> a, Vec<A>& lo, Vec<A>& hi) {
  constexpr int N = Vec<A>::N;
  for (int i = 0; i < N; ++i) {
    lo.v[i] = a.v[i / 2];
    hi.v[i] = a.v[N / 2 + i / 2];
  }
}

template <class A>
FT_INLINE void transpose_tile(Vec<A> (&r)[Vec<A>::N]) {
  for (int i = 0; i < Vec<A>::N; ++i)
    for (int j = 0; j < i; ++j) {
      const A t = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = t;
    }
}
#endif

// dst[c][r] = src[r][c] for r < rows, c < cols; src has row stride src_ld, dst has row stride dst_ld.
template <class A, class T>
static void transpose(const T* src, int64_t src_ld, int64_t rows, int64_t cols, A* dst, int64_t dst_ld) {
  constexpr int N = Vec<A>::N;
  const int64_t whole = rows / N * N;
  for (int64_t r = 0; r < whole; r += N) {
    int64_t c = 0;
    for (; c + N <= cols; c += N) {
      Vec<A> tile[N];
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) tile[i] = Vec<A>::load(src + (r + i) * src_ld + c);
      transpose_tile(tile);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) tile[i].store(dst + (c + i) * dst_ld + r);
    }
    for (; c < cols; ++c)
      for (int i = 0; i < N; ++i) dst[c * dst_ld + r + i] = load1(src + (r + i) * src_ld + c);
  }
  for (int64_t r = whole; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) dst[c * dst_ld + r] = load1(src + r * src_ld + c);
}

}  // namespace fasttricks::cpu::FT_ISA

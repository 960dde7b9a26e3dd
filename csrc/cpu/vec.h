// Vec<float> and Vec<double>: the registers of the ISA being compiled, with loads and stores that convert fp16 and
// bf16. Included by csrc/cpu/isa/*.cpp only, each of which is compiled once per ISA with FT_ISA = generic | avx2 |
// avx512; everything lives in that ISA's namespace, so that no inline function is shared between differently compiled
// files.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(FT_ISA_AVX512) || defined(FT_ISA_AVX2)
#include <immintrin.h>
#endif

#define FT_INLINE inline __attribute__((always_inline))

namespace fasttricks::cpu::FT_ISA {

// How many elements ahead of the loads memory is prefetched. Hardware prefetchers stop at the end of a page, every 1024
// fp32 elements in each stream: without this a reduction of bn_relu over NHWC takes 1.4 times as long.
constexpr int64_t kAhead = 1024;

// Prefetches the cache lines of kCount elements that lie `ahead` elements after p, possibly past the end of the tensor.
template <bool kWrite, int kCount, class P>
FT_INLINE void fetch(const P* p, int64_t ahead = kAhead) {
  const uintptr_t from = uintptr_t(p) + uintptr_t(ahead) * sizeof(P);
  for (size_t line = 0; line < kCount * sizeof(P); line += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(from + line), kWrite);
}

// Bit patterns as stored in memory; arithmetic is done in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
FT_INLINE To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_copy needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

FT_INLINE float to_float(BFloat16 h) { return bit_copy<float>(uint32_t(h.bits) << 16); }

FT_INLINE BFloat16 to_bfloat16(float f) {
  const uint32_t u = bit_copy<uint32_t>(f);
  if (f != f) return {uint16_t((u >> 16) | 0x40u)};  // stay a NaN
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

FT_INLINE float to_float(Half h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16, rest = uint32_t(h.bits & 0x7fffu);
  if (rest >= 0x7c00u) return bit_copy<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinity, NaN
  if (rest >= 0x0400u) return bit_copy<float>(sign | ((rest << 13) + 0x38000000u));         // normal
  return bit_copy<float>(sign | bit_copy<uint32_t>(float(rest) * 0x1p-24f));                // subnormal: rest * 2^-24
}

FT_INLINE Half to_half(float f) {  // round to nearest even
  const uint32_t u = bit_copy<uint32_t>(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return {uint16_t(sign | 0x7e00u | ((a >> 13) & 0x3ffu))};
  if (a >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to 65536 or more
  if (a < 0x38800000u) {                                    // subnormal: adding 0.5 rounds at 2^-24
    const float r = bit_copy<float>(a) + 0.5f;
    return {uint16_t(sign | (bit_copy<uint32_t>(r) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13))};
}

FT_INLINE float to_float(float f) { return f; }
FT_INLINE double to_float(double f) { return f; }

// Conversion of one element between its storage type and its accumulation type.
template <class T>
FT_INLINE auto load1(const T* p) {
  return to_float(*p);
}
FT_INLINE void store1(float* p, float v) { *p = v; }
FT_INLINE void store1(double* p, double v) { *p = v; }
FT_INLINE void store1(Half* p, float v) { *p = to_half(v); }
FT_INLINE void store1(BFloat16* p, float v) { *p = to_bfloat16(v); }

#if defined(FT_ISA_AVX512)

template <class T>
struct Vec;

template <>
struct Vec<float> {
  static constexpr int N = 16;
  __m512 v;
  Vec() = default;
  FT_INLINE Vec(__m512 x) : v(x) {}
  FT_INLINE explicit Vec(float x) : v(_mm512_set1_ps(x)) {}
  static FT_INLINE __mmask16 first(int n) { return __mmask16((1u << n) - 1u); }

  static FT_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static FT_INLINE Vec load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static FT_INLINE Vec load(const BFloat16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  // The first n lanes, 0 <= n < N; the others are zero and are not touched in memory.
  static FT_INLINE Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static FT_INLINE Vec load(const Half* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  static FT_INLINE Vec load(const BFloat16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }

  FT_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  FT_INLINE void store(Half* p) const { _mm256_storeu_si256((__m256i*)p, half()); }
  FT_INLINE void store(BFloat16* p) const { _mm256_storeu_si256((__m256i*)p, bf16()); }
  FT_INLINE void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  FT_INLINE void store(Half* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), half()); }
  FT_INLINE void store(BFloat16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), bf16()); }

  friend FT_INLINE Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
  friend FT_INLINE Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
  friend FT_INLINE Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
  friend FT_INLINE Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
  // a * b + c, fused where the ISA has it.
  static FT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
  // Bit i: lane i is > 0 or NaN (the ReLU's mask: NaN passes, as in torch).
  FT_INLINE uint32_t passes_relu() const { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ); }
  // Lanes whose bit is set; zero elsewhere.
  FT_INLINE Vec keep(uint32_t bits) const { return _mm512_maskz_mov_ps(__mmask16(bits), v); }
  FT_INLINE Vec relu() const { return keep(passes_relu()); }
  FT_INLINE Vec abs() const { return _mm512_abs_ps(v); }
  // Bit i: lane i is infinite or NaN.
  FT_INLINE uint32_t non_finite() const { return _mm512_fpclass_ps_mask(v, 0x99); }
  // The values after rounding to that storage type.
  FT_INLINE Vec rounded(const Half*) const { return _mm512_cvtph_ps(half()); }
  FT_INLINE Vec rounded(const BFloat16*) const { return widen(bf16()); }
  // Lane by lane: yes where a == b, else no.
  static FT_INLINE Vec where_equal(Vec a, Vec b, Vec yes, Vec no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), no.v, yes.v);
  }

 private:
  static FT_INLINE Vec widen(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
  FT_INLINE __m256i half() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  FT_INLINE __m256i bf16() const {
    const __m512i u = _mm512_castps_si512(v), top = _mm512_srli_epi32(u, 16);
    const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), top, _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(r);
  }
};

template <>
struct Vec<double> {
  static constexpr int N = 8;
  __m512d v;
  Vec() = default;
  FT_INLINE Vec(__m512d x) : v(x) {}
  FT_INLINE explicit Vec(double x) : v(_mm512_set1_pd(x)) {}
  static FT_INLINE __mmask8 first(int n) { return __mmask8((1u << n) - 1u); }
  static FT_INLINE Vec load(const double* p) { return _mm512_loadu_pd(p); }
  static FT_INLINE Vec load(const double* p, int n) { return _mm512_maskz_loadu_pd(first(n), p); }
  FT_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
  FT_INLINE void store(double* p, int n) const { _mm512_mask_storeu_pd(p, first(n), v); }
  friend FT_INLINE Vec operator+(Vec a, Vec b) { return _mm512_add_pd(a.v, b.v); }
  friend FT_INLINE Vec operator-(Vec a, Vec b) { return _mm512_sub_pd(a.v, b.v); }
  friend FT_INLINE Vec operator*(Vec a, Vec b) { return _mm512_mul_pd(a.v, b.v); }
  friend FT_INLINE Vec operator/(Vec a, Vec b) { return _mm512_div_pd(a.v, b.v); }
  static FT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_pd(a.v, b.v, c.v); }
  FT_INLINE uint32_t passes_relu() const { return _mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_NLE_UQ); }
  FT_INLINE Vec keep(uint32_t bits) const { return _mm512_maskz_mov_pd(__mmask8(bits), v); }
  FT_INLINE Vec relu() const { return keep(passes_relu()); }
  FT_INLINE Vec abs() const { return _mm512_abs_pd(v); }
  FT_INLINE uint32_t non_finite() const { return _mm512_fpclass_pd_mask(v, 0x99); }
};

#elif defined(FT_ISA_AVX2)

template <class T>
struct Vec;

template <>
struct Vec<float> {
  static constexpr int N = 8;
  __m256 v;
  Vec() = default;
  FT_INLINE Vec(__m256 x) : v(x) {}
  FT_INLINE explicit Vec(float x) : v(_mm256_set1_ps(x)) {}
  static FT_INLINE __m256i lanes() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static FT_INLINE __m256i first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes()); }

  static FT_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static FT_INLINE Vec load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static FT_INLINE Vec load(const BFloat16* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
  // The first n lanes, 0 <= n < N; the others are zero and are not touched in memory.
  static FT_INLINE Vec load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static FT_INLINE Vec load(const Half* p, int n) { return _mm256_cvtph_ps(part(p, n)); }
  static FT_INLINE Vec load(const BFloat16* p, int n) { return widen(part(p, n)); }

  FT_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  FT_INLINE void store(Half* p) const { _mm_storeu_si128((__m128i*)p, half()); }
  FT_INLINE void store(BFloat16* p) const { _mm_storeu_si128((__m128i*)p, bf16()); }
  FT_INLINE void store(float* p, int n) const { _mm256_maskstore_ps(p, first(n), v); }
  FT_INLINE void store(Half* p, int n) const { part_store(p, half(), n); }
  FT_INLINE void store(BFloat16* p, int n) const { part_store(p, bf16(), n); }

  friend FT_INLINE Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
  friend FT_INLINE Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
  friend FT_INLINE Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
  friend FT_INLINE Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
  static FT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
  FT_INLINE uint32_t passes_relu() const {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ)));
  }
  FT_INLINE Vec keep(uint32_t bits) const {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i hit = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), bit), bit);
    return _mm256_and_ps(v, _mm256_castsi256_ps(hit));
  }
  FT_INLINE Vec relu() const { return _mm256_and_ps(v, _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ)); }
  FT_INLINE Vec abs() const { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
  FT_INLINE uint32_t non_finite() const {  // x - x is NaN where x is infinite or NaN
    const __m256 d = _mm256_sub_ps(v, v);
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(d, d, _CMP_UNORD_Q)));
  }
  // The values after rounding to that storage type.
  FT_INLINE Vec rounded(const Half*) const { return _mm256_cvtph_ps(half()); }
  FT_INLINE Vec rounded(const BFloat16*) const { return widen(bf16()); }
  // Lane by lane: yes where a == b, else no.
  static FT_INLINE Vec where_equal(Vec a, Vec b, Vec yes, Vec no) {
    return _mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ));
  }

 private:
  static FT_INLINE Vec widen(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
  static FT_INLINE __m128i part(const void* p, int n) {
    uint16_t t[8] = {0};
    memcpy(t, p, size_t(n) * 2);
    return _mm_loadu_si128((const __m128i*)t);
  }
  static FT_INLINE void part_store(void* p, __m128i h, int n) {
    uint16_t t[8];
    _mm_storeu_si128((__m128i*)t, h);
    memcpy(p, t, size_t(n) * 2);
  }
  FT_INLINE __m128i half() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  FT_INLINE __m128i bf16() const {
    const __m256i u = _mm256_castps_si256(v), top = _mm256_srli_epi32(u, 16);
    const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_or_si256(top, _mm256_set1_epi32(0x40)), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }
};

template <>
struct Vec<double> {
  static constexpr int N = 4;
  __m256d v;
  Vec() = default;
  FT_INLINE Vec(__m256d x) : v(x) {}
  FT_INLINE explicit Vec(double x) : v(_mm256_set1_pd(x)) {}
  static FT_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static FT_INLINE Vec load(const double* p) { return _mm256_loadu_pd(p); }
  static FT_INLINE Vec load(const double* p, int n) { return _mm256_maskload_pd(p, first(n)); }
  FT_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
  FT_INLINE void store(double* p, int n) const { _mm256_maskstore_pd(p, first(n), v); }
  friend FT_INLINE Vec operator+(Vec a, Vec b) { return _mm256_add_pd(a.v, b.v); }
  friend FT_INLINE Vec operator-(Vec a, Vec b) { return _mm256_sub_pd(a.v, b.v); }
  friend FT_INLINE Vec operator*(Vec a, Vec b) { return _mm256_mul_pd(a.v, b.v); }
  friend FT_INLINE Vec operator/(Vec a, Vec b) { return _mm256_div_pd(a.v, b.v); }
  static FT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_pd(a.v, b.v, c.v); }
  FT_INLINE uint32_t passes_relu() const {
    return uint32_t(_mm256_movemask_pd(_mm256_cmp_pd(v, _mm256_setzero_pd(), _CMP_NLE_UQ)));
  }
  FT_INLINE Vec keep(uint32_t bits) const {
    const __m256i bit = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i hit = _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x((long long)bits), bit), bit);
    return _mm256_and_pd(v, _mm256_castsi256_pd(hit));
  }
  FT_INLINE Vec relu() const { return _mm256_and_pd(v, _mm256_cmp_pd(v, _mm256_setzero_pd(), _CMP_NLE_UQ)); }
  FT_INLINE Vec abs() const { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), v); }
  FT_INLINE uint32_t non_finite() const {
    const __m256d d = _mm256_sub_pd(v, v);
    return uint32_t(_mm256_movemask_pd(_mm256_cmp_pd(d, d, _CMP_UNORD_Q)));
  }
};

#else  // plain C++: the compiler vectorises what it can

template <class T>
struct Vec {
  static constexpr int N = 32 / sizeof(T);
  T v[N];
  Vec() = default;
  FT_INLINE explicit Vec(T x) {
    for (T& e : v) e = x;
  }
  template <class P>
  static FT_INLINE Vec load(const P* p) {
    Vec r;
    for (int i = 0; i < N; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  // The first n lanes, 0 <= n < N; the others are zero and are not touched in memory.
  template <class P>
  static FT_INLINE Vec load(const P* p, int n) {
    Vec r(T(0));
    for (int i = 0; i < n; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  template <class P>
  FT_INLINE void store(P* p) const {
    for (int i = 0; i < N; ++i) store1(p + i, v[i]);
  }
  template <class P>
  FT_INLINE void store(P* p, int n) const {
    for (int i = 0; i < n; ++i) store1(p + i, v[i]);
  }
  friend FT_INLINE Vec operator+(Vec a, Vec b) {
    for (int i = 0; i < N; ++i) a.v[i] += b.v[i];
    return a;
  }
  friend FT_INLINE Vec operator-(Vec a, Vec b) {
    for (int i = 0; i < N; ++i) a.v[i] -= b.v[i];
    return a;
  }
  friend FT_INLINE Vec operator*(Vec a, Vec b) {
    for (int i = 0; i < N; ++i) a.v[i] *= b.v[i];
    return a;
  }
  friend FT_INLINE Vec operator/(Vec a, Vec b) {
    for (int i = 0; i < N; ++i) a.v[i] /= b.v[i];
    return a;
  }
  static FT_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  FT_INLINE uint32_t passes_relu() const {
    uint32_t bits = 0;
    for (int i = 0; i < N; ++i) bits |= uint32_t(!(v[i] <= T(0))) << i;
    return bits;
  }
  FT_INLINE Vec keep(uint32_t bits) const {
    Vec r;
    for (int i = 0; i < N; ++i) r.v[i] = (bits >> i & 1u) ? v[i] : T(0);
    return r;
  }
  FT_INLINE Vec relu() const {
    Vec r;
    for (int i = 0; i < N; ++i) r.v[i] = v[i] <= T(0) ? T(0) : v[i];
    return r;
  }
  FT_INLINE Vec abs() const {
    Vec r;
    for (int i = 0; i < N; ++i) r.v[i] = v[i] < T(0) ? -v[i] : v[i];
    return r;
  }
  FT_INLINE uint32_t non_finite() const {
    uint32_t bits = 0;
    for (int i = 0; i < N; ++i) bits |= uint32_t(v[i] - v[i] != T(0)) << i;
    return bits;
  }
  // The values after rounding to the storage type P.
  template <class P>
  FT_INLINE Vec rounded(const P*) const {
    P stored[N];
    store(stored);
    return load(stored);
  }
  // Lane by lane: yes where a == b, else no.
  static FT_INLINE Vec where_equal(Vec a, Vec b, Vec yes, Vec no) {
    for (int i = 0; i < N; ++i) no.v[i] = a.v[i] == b.v[i] ? yes.v[i] : no.v[i];
    return no;
  }
};
#endif

// The lanes' sum, pairwise: the same order on every call.
template <class T>
FT_INLINE T sum(Vec<T> a) {
  T t[Vec<T>::N];
  a.store(t);
  for (int w = Vec<T>::N / 2; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) t[i] += t[i + w];
  return t[0];
}

}  // namespace fasttricks::cpu::FT_ISA

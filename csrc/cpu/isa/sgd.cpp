// sgd_step and sgd_check on contiguous memory; compiled once per ISA.
#include "cpu/sgd.h"

#include "cpu/vec.h"

namespace fasttricks::cpu::FT_ISA {

#if defined(FT_ISA_AVX512) || defined(FT_ISA_AVX2)
template <class T>
FT_INLINE Vec<T> fused(Vec<T> a, Vec<T> b, Vec<T> c) {
  return Vec<T>::fma(a, b, c);
}
#else
// A fused multiply-add without the instruction: the product of two floats is exact in double. (The sum is rounded
// twice, which differs from the instruction in about one result in 2^29, by one ulp.)
FT_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
  for (int i = 0; i < Vec<float>::N; ++i) a.v[i] = float(double(a.v[i]) * double(b.v[i]) + double(c.v[i]));
  return a;
}
FT_INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) {
  for (int i = 0; i < Vec<double>::N; ++i) a.v[i] = __builtin_fma(a.v[i], b.v[i], c.v[i]);
  return a;
}
#endif

namespace {

template <class P, class T>
FT_INLINE Vec<T> load_as(const P* p) {
  if constexpr (sizeof(T) == 8 && sizeof(P) != 8) {
    T wide[Vec<T>::N];
    for (int i = 0; i < Vec<T>::N; ++i) wide[i] = T(load1(p + i));
    return Vec<T>::load(wide);
  } else if constexpr (sizeof(P) == 8 && sizeof(T) != 8) {
    T narrow[Vec<T>::N];
    for (int i = 0; i < Vec<T>::N; ++i) narrow[i] = T(p[i]);
    return Vec<T>::load(narrow);
  } else {
    return Vec<T>::load(p);
  }
}

template <class P>
constexpr bool kHasMaster = sizeof(P) == 2;

// The master, or the parameter if it no longer equals the rounded master because it was changed from outside.
template <class P>
FT_INLINE Vec<float> as_seen(Vec<float> param, Vec<float> master) {
  return Vec<float>::where_equal(master.rounded(static_cast<const P*>(nullptr)), param, master, param);
}

template <class P, class G>
void step(void* param_, const void* grad_, void* master_, void* buf_, int64_t n, const SgdScalars& s) {
  using T = acc_t<P>;
  using V = Vec<T>;
  P* const param = static_cast<P*>(param_);
  const G* const grad = static_cast<const G*>(grad_);
  T* const master = static_cast<T*>(kHasMaster<P> ? master_ : param_);
  T* const buf = static_cast<T*>(buf_);
  const SgdCoefficients<V> k = SgdCoefficients<V>::of(s, T(0));

  const auto one_vector = [&](P* param, const G* grad, T* master, T* buf) __attribute__((always_inline)) {
    V p = V::load(master), b(T(0));
    if constexpr (kHasMaster<P>) p = as_seen<P>(V::load(param), p);
    if (s.has_momentum && !s.first) b = V::load(buf);
    sgd_update(s, k, load_as<G, T>(grad), p, b);
    if (s.has_momentum) b.store(buf);
    p.store(master);
    if constexpr (kHasMaster<P>) p.store(param);
  };

  int64_t i = 0;
  constexpr int kPair = 2 * V::N;
  for (; i + kPair <= n; i += kPair) {
    fetch<false, kPair>(grad + i);
    fetch<true, kPair>(param + i);
    if constexpr (kHasMaster<P>) fetch<true, kPair>(master + i);
    if (buf) fetch<true, kPair>(buf + i);
    for (int64_t j = i; j < i + kPair; j += V::N) one_vector(param + j, grad + j, master + j, buf ? buf + j : nullptr);
  }
  for (; i + V::N <= n; i += V::N) one_vector(param + i, grad + i, master + i, buf ? buf + i : nullptr);
  if (i < n) {  // the tail as a whole vector in separate buffers
    const size_t left = size_t(n - i);
    P p[V::N] = {};
    G g[V::N] = {};
    T m[V::N] = {}, b[V::N] = {};
    memcpy(p, param + i, left * sizeof(P));
    memcpy(g, grad + i, left * sizeof(G));
    if (kHasMaster<P>) memcpy(m, master + i, left * sizeof(T));
    if (buf) memcpy(b, buf + i, left * sizeof(T));
    if constexpr (kHasMaster<P>)
      one_vector(p, g, m, b);
    else
      one_vector(p, g, p, b);
    memcpy(param + i, p, left * sizeof(P));
    if (kHasMaster<P>) memcpy(master + i, m, left * sizeof(T));
    if (buf) memcpy(buf + i, b, left * sizeof(T));
  }
}

// Whether a sum of squares in fp32 equals that in float64 up to rounding: no square overflowed, and the squares that
// underflowed (each below 2^-126, at most 2^14 of them) are negligible.
FT_INLINE bool holds(float sum) { return sum >= 0x1p-88f && sum <= 3.4028234e38f; }
FT_INLINE bool holds(double) { return true; }

// The sum of squares of n values in float64. at(i, count): a vector of `count` values from the i-th on, zeros after
// them.
template <class V, class T, class At>
double wide_square_sum(int64_t n, T, const At& at) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; i += V::N) {
    T values[V::N];
    at(i, n - i < V::N ? int(n - i) : V::N).store(values);
    for (T v : values) sum += double(v) * double(v);
  }
  return sum;
}

// Vectors of fp32 and half values, summed in four independent chains; the same order on every call and thread count.
template <class G>
bool check(const void* grad_, int64_t n, double* square_sum) {
  using T = acc_t<G>;
  using V = Vec<T>;
  const G* const grad = static_cast<const G*>(grad_);
  const V zero(T(0));
  V bad[4] = {zero, zero, zero, zero}, squares[4] = {zero, zero, zero, zero};
  const bool squared = square_sum != nullptr;
  const auto take = [&](V v, int c) __attribute__((always_inline)) {
    bad[c] = bad[c] + v * zero;  // 0, or NaN for an infinity or a NaN
    if (squared) squares[c] = V::fma(v, v, squares[c]);
  };
  int64_t i = 0;
  for (; i + 4 * V::N <= n; i += 4 * V::N)
    for (int c = 0; c < 4; ++c) take(V::load(grad + i + c * V::N), c);
  const auto at = [&](int64_t i, int count) __attribute__((always_inline)) {
    return count == V::N ? V::load(grad + i) : V::load(grad + i, count);
  };
  for (; i < n; i += V::N) take(at(i, n - i < V::N ? int(n - i) : V::N), 0);
  const bool found = ((bad[0] + bad[1]) + (bad[2] + bad[3])).non_finite() != 0;
  if (squared) {
    const T total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    *square_sum = found || holds(total) ? double(total) : wide_square_sum<V>(n, T(0), at);
  }
  return found;
}

template <class P>
double weight_square(const void* param_, const void* master_, int64_t n) {
  using T = acc_t<P>;
  using V = Vec<T>;
  const P* const param = static_cast<const P*>(param_);
  const T* const master = static_cast<const T*>(kHasMaster<P> ? master_ : param_);
  const auto at = [&](int64_t i, int count) __attribute__((always_inline)) {
    const V m = count == V::N ? V::load(master + i) : V::load(master + i, count);
    if constexpr (kHasMaster<P>)
      return as_seen<P>(count == V::N ? V::load(param + i) : V::load(param + i, count), m);
    else
      return m;
  };
  V squares(T(0));
  for (int64_t i = 0; i < n; i += V::N) {
    const V v = at(i, n - i < V::N ? int(n - i) : V::N);
    squares = V::fma(v, v, squares);
  }
  const T total = sum(squares);
  return holds(total) ? double(total) : wide_square_sum<V>(n, T(0), at);
}

}  // namespace

#define FT_STEPS(P) {step<P, Half>, step<P, BFloat16>, step<P, float>, step<P, double>}
extern const SgdKernels sgd_kernels = {
    {FT_STEPS(Half), FT_STEPS(BFloat16), FT_STEPS(float), FT_STEPS(double)},
    {check<Half>, check<BFloat16>, check<float>, check<double>},
    {weight_square<Half>, weight_square<BFloat16>, weight_square<float>, weight_square<double>},
};
#undef FT_STEPS

}  // namespace fasttricks::cpu::FT_ISA

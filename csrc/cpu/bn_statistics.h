// Mean and variance of the values of a channel. Like vec.h, included by csrc/cpu/isa/*.cpp only and compiled once per
// ISA.
#pragma once

#include "cpu/bn_planes.h"
#include "cpu/bn_relu.h"
#include "cpu/shuffle.h"
#include "cpu/vec.h"
#include "math/welford.h"

namespace fasttricks::cpu::FT_ISA {

// Values summed in the accumulation type before they are added to a double: a part of the first-level cache.
constexpr int64_t kChunk = 4096;
// NHWC: values of a block of rows, so that its second pass finds it in the second-level cache.
constexpr int64_t kRowBlock = 32768;

FT_INLINE int64_t rows_together(int64_t channels) {
  const int64_t rows = kRowBlock / channels;
  return rows < 4 ? 4 : rows > 512 ? 512 : rows;
}

template <class T>
struct BnStatistics {
  using A = acc_t<T>;
  using V = Vec<A>;

  // Four vectors of sums, kept over the rows of a part: reducing the lanes costs more than a short row.
  struct Lanes {
    V s0, s1, s2, s3;
    Lanes() : s0(A(0)), s1(A(0)), s2(A(0)), s3(A(0)) {}
    A total() const { return sum((s0 + s1) + (s2 + s3)); }
  };

  static FT_INLINE void slab_sum(const T* p, int64_t n, Lanes& t) {
    V s0 = t.s0;
    int64_t i = 0;
    if (n >= 4 * V::N) {
      V s1 = t.s1, s2 = t.s2, s3 = t.s3;
      for (; i + 4 * V::N <= n; i += 4 * V::N) {
        s0 = s0 + V::load(p + i), s1 = s1 + V::load(p + i + V::N);
        s2 = s2 + V::load(p + i + 2 * V::N), s3 = s3 + V::load(p + i + 3 * V::N);
      }
      t.s1 = s1, t.s2 = s2, t.s3 = s3;
    }
    each<V>(n - i, [&](int64_t j, int m) FT_LAMBDA { s0 = s0 + load_n<A>(p + i + j, m); });
    t.s0 = s0;
  }

  // The values are in the cache; those that lie `ahead` are prefetched meanwhile.
  static FT_INLINE void slab_m2(const T* p, int64_t n, V m, int64_t ahead, Lanes& t) {
    V s0 = t.s0;
    int64_t i = 0;
    if (n >= 4 * V::N) {
      V s1 = t.s1, s2 = t.s2, s3 = t.s3;
      for (; i + 4 * V::N <= n; i += 4 * V::N) {
        fetch<false, 4 * V::N>(p + i, ahead);
        const V d0 = V::load(p + i) - m, d1 = V::load(p + i + V::N) - m;
        const V d2 = V::load(p + i + 2 * V::N) - m, d3 = V::load(p + i + 3 * V::N) - m;
        s0 = V::fma(d0, d0, s0), s1 = V::fma(d1, d1, s1), s2 = V::fma(d2, d2, s2), s3 = V::fma(d3, d3, s3);
      }
      t.s1 = s1, t.s2 = s2, t.s3 = s3;
    }
    each<V>(n - i, [&](int64_t j, int k) FT_LAMBDA {
      fetch<false, V::N>(p + i + j, ahead);
      const V d = (load_n<A>(p + i + j, k) - m).keep((uint32_t(1) << k) - 1u);
      s0 = V::fma(d, d, s0);
    });
    t.s0 = s0;
  }

  // NCHW: of `channels` channels from c on, at most kMostTogether.
  static void of_channels(const BnArguments& a, int64_t c, int64_t channels) {
    const T* x = static_cast<const T*>(a.x) + c * a.inner;
    const int64_t stride = a.channels * a.inner;
    const int64_t piece = a.inner < kChunk ? a.inner : kChunk, together = kChunk / piece;
    Moments<double> all[kMostTogether] = {};
    double mean[kMostTogether];
    for (int64_t r0 = 0; r0 < a.rows; r0 += together) {
      const int64_t r1 = r0 + together < a.rows ? r0 + together : a.rows;
      for (int64_t i = 0; i < a.inner; i += piece) {
        const int64_t n = i + piece < a.inner ? piece : a.inner - i;
        const double values = double((r1 - r0) * n);
        Lanes total[kMostTogether], square[kMostTogether];
        for (int64_t r = r0; r < r1; ++r)
          for (int64_t k = 0; k < channels; ++k) slab_sum(x + r * stride + k * a.inner + i, n, total[k]);
        for (int64_t k = 0; k < channels; ++k) mean[k] = double(total[k].total()) / values;
        for (int64_t r = r0; r < r1; ++r) {
          const int64_t ahead = planes_ahead(a, r, together);
          for (int64_t k = 0; k < channels; ++k)
            slab_m2(x + r * stride + k * a.inner + i, n, V(A(mean[k])), ahead, square[k]);
        }
        for (int64_t k = 0; k < channels; ++k) all[k] = merge(all[k], {values, mean[k], double(square[k].total())});
      }
    }
    for (int64_t k = 0; k < channels; ++k) {
      static_cast<A*>(a.mean)[c + k] = A(all[k].mean);
      static_cast<A*>(a.var)[c + k] = A(all[k].m2 / all[k].count);
    }
  }

  // NHWC: sums[c] = add(sums[c], x[c], c) over `rows` rows. Four rows share the loads and stores of the sums, and half
  // of what lies `ahead` is prefetched: of each four rows two, from row kFetched on.
  template <int kFetched, class Add>
  static FT_INLINE void over_rows(const T* x, int64_t rows, int64_t channels, int64_t ahead, A* sums, Add add) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      const T *x0 = x + r * channels, *x1 = x0 + channels, *x2 = x1 + channels, *x3 = x2 + channels;
      each<V>(channels, [&](int64_t c, int n) FT_LAMBDA {
        for (int64_t row = kFetched; row < kFetched + 2; ++row) fetch<false, V::N>(x0 + row * channels + c, ahead);
        V s = load_n<A>(sums + c, n);
        s = add(s, load_n<A>(x0 + c, n), c, n), s = add(s, load_n<A>(x1 + c, n), c, n);
        s = add(s, load_n<A>(x2 + c, n), c, n), s = add(s, load_n<A>(x3 + c, n), c, n);
        store_n(s, sums + c, n);
      });
    }
    for (; r < rows; ++r)
      each<V>(channels, [&](int64_t c, int n) FT_LAMBDA {
        store_n(add(load_n<A>(sums + c, n), load_n<A>(x + r * channels + c, n), c, n), sums + c, n);
      });
  }

  // NHWC: mean and M2 of every channel over rows [begin, end).
  static void of_rows(const BnArguments& a, int64_t begin, int64_t end, double* mean, double* m2) {
    const int64_t C = a.channels, step = rows_together(C);
    A* block = new A[size_t(3 * C)];
    A *total = block, *centre = block + C, *square = block + 2 * C;
    double count = 0;
    for (int64_t c = 0; c < C; ++c) mean[c] = m2[c] = 0;
    for (int64_t r0 = begin; r0 < end; r0 += step) {
      const int64_t r1 = r0 + step < end ? r0 + step : end;
      const double n = double(r1 - r0);
      for (int64_t c = 0; c < C; ++c) total[c] = square[c] = A(0);
      const T* x = static_cast<const T*>(a.x) + r0 * C;
      over_rows<0>(x, r1 - r0, C, step * C, total, [](V s, V v, int64_t, int) FT_LAMBDA { return s + v; });
      for (int64_t c = 0; c < C; ++c) centre[c] = A(double(total[c]) / n);
      over_rows<2>(x, r1 - r0, C, step * C, square, [&](V s, V v, int64_t c, int k) FT_LAMBDA {
        const V d = v - load_n<A>(centre + c, k);
        return V::fma(d, d, s);
      });
      const MergeFactors<double> factors = merge_factors(count, n);
      for (int64_t c = 0; c < C; ++c) merge_into(mean[c], m2[c], double(total[c]) / n, double(square[c]), factors);
      count = factors.count;
    }
    delete[] block;
  }
};

}  // namespace fasttricks::cpu::FT_ISA

// The kernels of bn_relu and bn_add_relu; math/bn.h has the formulas.
#include "cpu/bn_relu.h"

#include "cpu/bits.h"
#include "cpu/shuffle.h"
#include "cpu/vec.h"
#include "math/bn.h"
#include "math/welford.h"

namespace fasttricks::cpu::FT_ISA {
namespace {

// Values summed in the accumulation type before they are added to a double: a part of the first-level cache.
constexpr int64_t kChunk = 4096;
// NHWC: values of a block of rows, so that its second pass finds it in the second-level cache.
constexpr int64_t kRowBlock = 32768;

template <class A>
FT_INLINE bool finite(A v) {
  return v - v == A(0);
}

// v rounded to T: the mask must be that of the stored y.
template <class T, class V>
FT_INLINE V rounded(V v) {
  if constexpr (sizeof(T) >= 4) {
    return v;
  } else {
    T t[V::N];
    v.store(t);
    return V::load(t);
  }
}

// Calls f(i, n) for [0, size) in steps of n = N, and once for the rest.
template <class V, class F>
FT_INLINE void each(int64_t size, F f) {
  int64_t i = 0;
  for (; i + V::N <= size; i += V::N) f(i, V::N);
  if (i < size) f(i, int(size - i));
}
#define FT_LAMBDA __attribute__((always_inline))

template <class T>
struct Bn {
  using A = acc_t<T>;
  using V = Vec<A>;

  // The parameters of one channel (NCHW) or of one vector of channels (NHWC); P is A or V.
  struct Channel {
    A mean, scale, bias;
  };

  static Channel channel(const BnArguments& a, int64_t c) {
    const A weight = a.weight ? static_cast<const A*>(a.weight)[c] : A(1);
    const A rstd = bn_rstd(static_cast<const A*>(a.var)[c], a.eps);
    return {static_cast<const A*>(a.mean)[c], weight * rstd, a.bias ? static_cast<const A*>(a.bias)[c] : A(0)};
  }

  // Whether (x - mean) * scale is exactly zero for all x of the channel, so that x need not be read. The statistics are
  // those of x, so a NaN or infinity in x shows in them.
  static bool vanishes(const BnArguments& a, const Channel& k, int64_t c) {
    return a.training && k.scale == A(0) && finite(k.mean) && finite(static_cast<const A*>(a.var)[c]);
  }

  static FT_INLINE V normalised(V x, V mean, V scale, V bias) { return V::fma(x - mean, scale, bias); }

  // ---- NCHW: one slab of n values of one channel ----

  // Four vectors of sums, kept over the rows of a part: reducing the lanes costs more than a short row.
  struct Lanes {
    V s0, s1, s2, s3;
    Lanes() : s0(A(0)), s1(A(0)), s2(A(0)), s3(A(0)) {}
    A total() const { return sum((s0 + s1) + (s2 + s3)); }
  };

  static FT_INLINE void slab_sum(const T* p, int64_t n, Lanes& t) {
    V s0 = t.s0, s1 = t.s1, s2 = t.s2, s3 = t.s3;
    int64_t i = 0;
    for (; i + 4 * V::N <= n; i += 4 * V::N) {
      s0 = s0 + V::load(p + i), s1 = s1 + V::load(p + i + V::N);
      s2 = s2 + V::load(p + i + 2 * V::N), s3 = s3 + V::load(p + i + 3 * V::N);
    }
    each<V>(n - i, [&](int64_t j, int m) FT_LAMBDA { s0 = s0 + load_n<A>(p + i + j, m); });
    t.s0 = s0, t.s1 = s1, t.s2 = s2, t.s3 = s3;
  }

  static FT_INLINE void slab_m2(const T* p, int64_t n, V m, Lanes& t) {
    V s0 = t.s0, s1 = t.s1, s2 = t.s2, s3 = t.s3;
    int64_t i = 0;
    for (; i + 4 * V::N <= n; i += 4 * V::N) {
      const V d0 = V::load(p + i) - m, d1 = V::load(p + i + V::N) - m;
      const V d2 = V::load(p + i + 2 * V::N) - m, d3 = V::load(p + i + 3 * V::N) - m;
      s0 = V::fma(d0, d0, s0), s1 = V::fma(d1, d1, s1), s2 = V::fma(d2, d2, s2), s3 = V::fma(d3, d3, s3);
    }
    each<V>(n - i, [&](int64_t j, int k) FT_LAMBDA {
      const V d = (load_n<A>(p + i + j, k) - m).keep((uint32_t(1) << k) - 1u);
      s0 = V::fma(d, d, s0);
    });
    t.s0 = s0, t.s1 = s1, t.s2 = s2, t.s3 = s3;
  }

  static void statistics(const BnArguments& a, int64_t c) {
    const T* x = static_cast<const T*>(a.x) + c * a.inner;
    const int64_t stride = a.channels * a.inner;
    const int64_t piece = a.inner < kChunk ? a.inner : kChunk, together = kChunk / piece;
    Moments<double> all{0, 0, 0};
    for (int64_t r0 = 0; r0 < a.rows; r0 += together) {
      const int64_t r1 = r0 + together < a.rows ? r0 + together : a.rows;
      for (int64_t i = 0; i < a.inner; i += piece) {
        const int64_t n = i + piece < a.inner ? piece : a.inner - i;
        Lanes total, square;
        for (int64_t r = r0; r < r1; ++r) slab_sum(x + r * stride + i, n, total);
        const double values = double((r1 - r0) * n), mean = double(total.total()) / values;
        for (int64_t r = r0; r < r1; ++r) slab_m2(x + r * stride + i, n, V(A(mean)), square);
        all = merge(all, {values, mean, double(square.total())});
      }
    }
    static_cast<A*>(a.mean)[c] = A(all.mean);
    static_cast<A*>(a.var)[c] = A(all.m2 / all.count);
  }

  template <bool ReadX, bool Residual>
  static void apply(const BnArguments& a, int64_t c, const Channel& k, bool first, bool last) {
    const V mean(k.mean), scale(k.scale), bias(k.bias);
    for (int64_t r = 0; r < a.rows; ++r) {
      const int64_t at = (r * a.channels + c) * a.inner;
      const T* x = static_cast<const T*>(a.x) + at;
      const T* residual = static_cast<const T*>(a.residual) + at;
      T* y = static_cast<T*>(a.y) + at;
      if constexpr (Residual) {
        BitWriter bits(a.mask_out, at, first);
        each<V>(a.inner, [&](int64_t i, int n) FT_LAMBDA {
          V z = ReadX ? normalised(load_n<A>(x + i, n), mean, scale, bias) : bias;
          z = rounded<T>(z + load_n<A>(residual + i, n));
          const uint32_t pass = z.passes_relu() & ((uint32_t(1) << n) - 1u);
          store_n(z.keep(pass), y + i, n);
          bits.push(pass, n);
        });
        bits.finish(last);
      } else {
        each<V>(a.inner, [&](int64_t i, int n) FT_LAMBDA {
          const V z = ReadX ? normalised(load_n<A>(x + i, n), mean, scale, bias) : bias;
          store_n(z.relu(), y + i, n);
        });
      }
    }
  }

  // dz from dy, by the saved mask or by the same arithmetic as in the forward pass.
  template <bool Masked>
  static FT_INLINE V gradient(V dy, V x, V mean, V scale, V bias, BitReader& bits, int n) {
    if constexpr (Masked) return dy.keep(bits.pull(n));
    return dy.keep(rounded<T>(normalised(x, mean, scale, bias)).passes_relu());
  }

  template <bool Masked>
  static void reduce(const BnArguments& a, int64_t c, const Channel& k) {
    const V mean(k.mean), scale(k.scale), bias(k.bias);
    double total = 0, total_d = 0;
    V s(A(0)), s_d(A(0));
    int64_t held = 0;
    for (int64_t r = 0; r < a.rows; ++r)
      for (int64_t i0 = 0; i0 < a.inner; i0 += kChunk) {
        const int64_t at = (r * a.channels + c) * a.inner + i0;
        const T* x = static_cast<const T*>(a.x) + at;
        const T* dy = static_cast<const T*>(a.dy) + at;
        BitReader bits(a.mask_in, Masked ? at : 0, a.mask_in + a.mask_bytes);
        const int64_t count = i0 + kChunk < a.inner ? kChunk : a.inner - i0;
        each<V>(count, [&](int64_t i, int n) FT_LAMBDA {
          const V v = load_n<A>(x + i, n);
          const V dz = gradient<Masked>(load_n<A>(dy + i, n), v, mean, scale, bias, bits, n);
          s = s + dz;
          s_d = V::fma(dz, (v - mean).keep((uint32_t(1) << n) - 1u), s_d);
        });
        if ((held += count) < kChunk) continue;
        total += sum(s), total_d += sum(s_d);
        s = s_d = V(A(0));
        held = 0;
      }
    total += sum(s), total_d += sum(s_d);
    store_sums(a, c, total, total_d);
  }

  static void store_sums(const BnArguments& a, int64_t c, double sum_dz, double sum_dz_d) {
    static_cast<A*>(a.dbias)[c] = A(sum_dz);
    static_cast<A*>(a.dweight)[c] = A(sum_dz_d * double(bn_rstd(static_cast<const A*>(a.var)[c], a.eps)));
  }

  static BnBackward<A> factors(const BnArguments& a, int64_t c) {
    const A weight = a.weight ? static_cast<const A*>(a.weight)[c] : A(1);
    return bn_backward_factors(weight, bn_rstd(static_cast<const A*>(a.var)[c], a.eps),
                               a.training ? static_cast<const A*>(a.dweight)[c] : A(0),
                               a.training ? static_cast<const A*>(a.dbias)[c] : A(0), a.training ? 1.0 / a.count : 0.0);
  }

  // Whether dx is exactly zero over the channel, so that neither x nor (without a residual) dy is read again.
  static bool vanishes(const BnArguments& a, const BnBackward<A>& f, const Channel& k, int64_t c) {
    return vanishes(a, k, c) && finite(f.shift) && finite(f.slope);
  }

  template <bool Masked>
  static void backward(const BnArguments& a, int64_t c, const Channel& k) {
    const BnBackward<A> f = factors(a, c);
    const V mean(k.mean), scale(k.scale), bias(k.bias), shift(f.shift), slope(f.slope), zero(A(0));
    const bool nothing = vanishes(a, f, k, c), constant = !a.training;  // constant statistics: dx does not depend on x
    for (int64_t r = 0; r < a.rows; ++r) {
      const int64_t at = (r * a.channels + c) * a.inner;
      const T* x = static_cast<const T*>(a.x) + at;
      const T* dy = static_cast<const T*>(a.dy) + at;
      T* dx = static_cast<T*>(a.dx) + at;
      T* dresidual = a.dresidual ? static_cast<T*>(a.dresidual) + at : nullptr;
      BitReader bits(a.mask_in, Masked ? at : 0, a.mask_in + a.mask_bytes);
      if (nothing) {
        each<V>(a.inner, [&](int64_t i, int n) FT_LAMBDA { store_n(zero, dx + i, n); });
        if (!dresidual) continue;
        if constexpr (Masked)
          each<V>(a.inner, [&](int64_t i, int n)
                               FT_LAMBDA { store_n(load_n<A>(dy + i, n).keep(bits.pull(n)), dresidual + i, n); });
        continue;
      }
      each<V>(a.inner, [&](int64_t i, int n) FT_LAMBDA {
        const V v = load_n<A>(x + i, n);
        const V dz = gradient<Masked>(load_n<A>(dy + i, n), v, mean, scale, bias, bits, n);
        if (dresidual) store_n(dz, dresidual + i, n);
        store_n(constant ? scale * dz : scale * V::fma(v - mean, slope, dz - shift), dx + i, n);
      });
    }
  }

  static void channels(const BnArguments& a, int passes, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      if (passes & kBnStatistics) statistics(a, c);
      if (passes == kBnStatistics) continue;
      const Channel k = channel(a, c);
      if (passes & kBnApply) {
        const bool read = !vanishes(a, k, c);
        // Mask bytes that another thread may also write: those at the range's ends, or all if inner < 8.
        const bool first = c == begin || a.inner < 8, last = c == end - 1 || a.inner < 8;
        if (a.residual)
          read ? apply<true, true>(a, c, k, first, last) : apply<false, true>(a, c, k, first, last);
        else
          read ? apply<true, false>(a, c, k, first, last) : apply<false, false>(a, c, k, first, last);
      }
      if (passes & kBnReduce) a.mask_in ? reduce<true>(a, c, k) : reduce<false>(a, c, k);
      if (passes & kBnBackward) a.mask_in ? backward<true>(a, c, k) : backward<false>(a, c, k);
    }
  }

  // ---- NHWC: rows of all channels ----

  static int64_t rows_together(int64_t channels) {
    const int64_t rows = kRowBlock / channels;
    return rows < 4 ? 4 : rows > 512 ? 512 : rows;
  }

  static void row_statistics(const BnArguments& a, int64_t begin, int64_t end, double* mean, double* m2) {
    const int64_t C = a.channels, step = rows_together(C);
    A* block = new A[size_t(3 * C)];
    A *total = block, *centre = block + C, *square = block + 2 * C;
    double count = 0;
    for (int64_t c = 0; c < C; ++c) mean[c] = m2[c] = 0;
    for (int64_t r0 = begin; r0 < end; r0 += step) {
      const int64_t r1 = r0 + step < end ? r0 + step : end;
      const double n = double(r1 - r0);
      for (int64_t c = 0; c < C; ++c) total[c] = square[c] = A(0);
      for (int64_t r = r0; r < r1; ++r) {
        const T* x = static_cast<const T*>(a.x) + r * C;
        each<V>(C, [&](int64_t c, int k)
                       FT_LAMBDA { store_n(load_n<A>(total + c, k) + load_n<A>(x + c, k), total + c, k); });
      }
      for (int64_t c = 0; c < C; ++c) centre[c] = A(double(total[c]) / n);
      for (int64_t r = r0; r < r1; ++r) {
        const T* x = static_cast<const T*>(a.x) + r * C;
        each<V>(C, [&](int64_t c, int k) FT_LAMBDA {
          const V d = load_n<A>(x + c, k) - load_n<A>(centre + c, k);
          store_n(V::fma(d, d, load_n<A>(square + c, k)), square + c, k);
        });
      }
      const MergeFactors<double> factors = merge_factors(count, n);
      for (int64_t c = 0; c < C; ++c) merge_into(mean[c], m2[c], double(total[c]) / n, double(square[c]), factors);
      count = factors.count;
    }
    delete[] block;
  }

  // Every channel's mean, scale, bias, shift and slope, as prepare() left them for the row passes.
  struct Channels {
    A *mean, *scale, *bias, *shift, *slope;
    explicit Channels(const BnArguments& a) : mean(static_cast<A*>(a.prepared)) {
      scale = mean + a.channels, bias = scale + a.channels, shift = bias + a.channels, slope = shift + a.channels;
    }
    FT_INLINE V normalise(V x, int64_t c, int n) const {
      return normalised(x, load_n<A>(mean + c, n), load_n<A>(scale + c, n), load_n<A>(bias + c, n));
    }
  };

  static bool prepare(const BnArguments& a, bool backward) {
    const Channels k(a);
    bool vanish = true;
    for (int64_t c = 0; c < a.channels; ++c) {
      const Channel one = channel(a, c);
      k.mean[c] = one.mean, k.scale[c] = one.scale, k.bias[c] = one.bias;
      const BnBackward<A> f = backward ? factors(a, c) : BnBackward<A>{one.scale, A(0), A(0)};
      k.shift[c] = f.shift, k.slope[c] = f.slope;
      vanish = vanish && vanishes(a, f, one, c);
    }
    return vanish;
  }

  template <bool ReadX, bool Residual>
  static void apply_rows(const BnArguments& a, const Channels& k, int64_t begin, int64_t end) {
    BitWriter bits(a.mask_out, Residual ? begin * a.channels : 0, false);  // slices begin on whole bytes
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(a.x) + r * a.channels;
      const T* residual = static_cast<const T*>(a.residual) + r * a.channels;
      T* y = static_cast<T*>(a.y) + r * a.channels;
      each<V>(a.channels, [&](int64_t c, int n) FT_LAMBDA {
        V z = ReadX ? k.normalise(load_n<A>(x + c, n), c, n) : load_n<A>(k.bias + c, n);
        if constexpr (Residual) {
          z = rounded<T>(z + load_n<A>(residual + c, n));
          const uint32_t pass = z.passes_relu() & ((uint32_t(1) << n) - 1u);
          store_n(z.keep(pass), y + c, n);
          bits.push(pass, n);
        } else {
          store_n(z.relu(), y + c, n);
        }
      });
    }
    if constexpr (Residual) bits.finish(false);
  }

  static void row_apply(const BnArguments& a, int64_t begin, int64_t end) {
    const Channels k(a);
    if (a.residual)
      a.vanish ? apply_rows<false, true>(a, k, begin, end) : apply_rows<true, true>(a, k, begin, end);
    else
      a.vanish ? apply_rows<false, false>(a, k, begin, end) : apply_rows<true, false>(a, k, begin, end);
  }

  template <bool Masked>
  static void reduce_rows(const BnArguments& a, int64_t begin, int64_t end, double* sum_dz, double* sum_dz_d) {
    const int64_t C = a.channels, step = rows_together(C);
    const Channels k(a);
    A* block = new A[size_t(2 * C)];
    A *total = block, *total_d = block + C;
    for (int64_t c = 0; c < C; ++c) sum_dz[c] = sum_dz_d[c] = 0;
    BitReader bits(a.mask_in, Masked ? begin * C : 0, a.mask_in + a.mask_bytes);
    for (int64_t r0 = begin; r0 < end; r0 += step) {
      const int64_t r1 = r0 + step < end ? r0 + step : end;
      for (int64_t c = 0; c < C; ++c) total[c] = total_d[c] = A(0);
      for (int64_t r = r0; r < r1; ++r) {
        const T* x = static_cast<const T*>(a.x) + r * C;
        const T* dy = static_cast<const T*>(a.dy) + r * C;
        each<V>(C, [&](int64_t c, int n) FT_LAMBDA {
          const V v = load_n<A>(x + c, n), mean = load_n<A>(k.mean + c, n);
          const V dz = gradient<Masked>(load_n<A>(dy + c, n), v, mean, load_n<A>(k.scale + c, n),
                                        load_n<A>(k.bias + c, n), bits, n);
          store_n(load_n<A>(total + c, n) + dz, total + c, n);
          store_n(V::fma(dz, v - mean, load_n<A>(total_d + c, n)), total_d + c, n);
        });
      }
      for (int64_t c = 0; c < C; ++c) sum_dz[c] += double(total[c]), sum_dz_d[c] += double(total_d[c]);
    }
    delete[] block;
  }

  static void row_reduce(const BnArguments& a, int64_t begin, int64_t end, double* sum_dz, double* sum_dz_d) {
    a.mask_in ? reduce_rows<true>(a, begin, end, sum_dz, sum_dz_d)
              : reduce_rows<false>(a, begin, end, sum_dz, sum_dz_d);
  }

  template <bool Masked>
  static void backward_rows(const BnArguments& a, int64_t begin, int64_t end) {
    const int64_t C = a.channels;
    const Channels k(a);
    const bool nothing = a.vanish, constant = !a.training;
    BitReader bits(a.mask_in, Masked ? begin * C : 0, a.mask_in + a.mask_bytes);
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(a.x) + r * C;
      const T* dy = static_cast<const T*>(a.dy) + r * C;
      T* dx = static_cast<T*>(a.dx) + r * C;
      T* dresidual = a.dresidual ? static_cast<T*>(a.dresidual) + r * C : nullptr;
      if (nothing) {
        each<V>(C, [&](int64_t c, int n) FT_LAMBDA { store_n(V(A(0)), dx + c, n); });
        if constexpr (Masked)
          if (dresidual)
            each<V>(C, [&](int64_t c, int n)
                           FT_LAMBDA { store_n(load_n<A>(dy + c, n).keep(bits.pull(n)), dresidual + c, n); });
        continue;
      }
      each<V>(C, [&](int64_t c, int n) FT_LAMBDA {
        const V v = load_n<A>(x + c, n), mean = load_n<A>(k.mean + c, n), scale = load_n<A>(k.scale + c, n);
        const V dz = gradient<Masked>(load_n<A>(dy + c, n), v, mean, scale, load_n<A>(k.bias + c, n), bits, n);
        if (dresidual) store_n(dz, dresidual + c, n);
        store_n(
            constant ? scale * dz : scale * V::fma(v - mean, load_n<A>(k.slope + c, n), dz - load_n<A>(k.shift + c, n)),
            dx + c, n);
      });
    }
  }

  static void row_backward(const BnArguments& a, int64_t begin, int64_t end) {
    a.mask_in ? backward_rows<true>(a, begin, end) : backward_rows<false>(a, begin, end);
  }

  static constexpr BnOfType table() { return {channels, prepare, row_statistics, row_apply, row_reduce, row_backward}; }
};

}  // namespace

const BnReluKernels bn_relu_kernels = {Bn<float>::table(), Bn<double>::table(), Bn<Half>::table(),
                                       Bn<BFloat16>::table()};

}  // namespace fasttricks::cpu::FT_ISA

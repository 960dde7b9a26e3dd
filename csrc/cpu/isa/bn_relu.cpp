// The kernels of bn_relu, bn_add_relu and bn_add_bn_relu; math/bn.h has the formulas.
#include "cpu/bn_relu.h"

#include "cpu/bits.h"
#include "cpu/bn_gradient.h"
#include "cpu/bn_means.h"
#include "cpu/bn_planes.h"
#include "cpu/bn_statistics.h"
#include "cpu/shuffle.h"
#include "cpu/vec.h"
#include "math/bn.h"

namespace fasttricks::cpu::FT_ISA {
namespace {

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

// What is added to bn(x): nothing, the residual, or its BatchNorm.
enum class Shortcut { kNone, kPlain, kNormalised };

// How the gradient of y becomes dz: by the saved mask, by the same arithmetic as in the forward pass, or it is dz.
enum class Gate { kMask, kOutput, kOpen };

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

  // ---- NCHW: a group of channels ----

  struct Applied {
    Channel main, residual;
    bool vanishes;
  };

  template <bool ReadX, Shortcut S>
  static FT_INLINE void apply_plane(const BnArguments& a, const Applied& k, int64_t r, int64_t c, int64_t ahead,
                                    bool first, bool last) {
    const V mean(k.main.mean), scale(k.main.scale), bias(k.main.bias);
    const V mean_r(k.residual.mean), scale_r(k.residual.scale), bias_r(k.residual.bias);
    const int64_t at = (r * a.channels + c) * a.inner;
    const T* x = static_cast<const T*>(a.x) + at;
    const T* residual = static_cast<const T*>(a.residual) + at;
    T* y = static_cast<T*>(a.y) + at;
    if constexpr (S == Shortcut::kNone) {
      each<V>(a.inner, [&](int64_t i, int n) FT_LAMBDA {
        if constexpr (ReadX) fetch<false, V::N>(x + i, ahead);
        fetch<true, V::N>(y + i, ahead);
        const V z = ReadX ? normalised(load_n<A>(x + i, n), mean, scale, bias) : bias;
        store_n(z.relu(), y + i, n);
      });
    } else {
      BitWriter bits(a.mask_out, at, first);
      each<V>(a.inner, [&](int64_t i, int n) FT_LAMBDA {
        if constexpr (ReadX) fetch<false, V::N>(x + i, ahead);
        fetch<false, V::N>(residual + i, ahead);
        fetch<true, V::N>(y + i, ahead);
        const V z = ReadX ? normalised(load_n<A>(x + i, n), mean, scale, bias) : bias;
        V added = load_n<A>(residual + i, n);
        if constexpr (S == Shortcut::kNormalised) added = normalised(added, mean_r, scale_r, bias_r);
        store_with_mask(z + added, y + i, n, bits);
      });
      bits.finish(last);
    }
  }

  // shared_from, shared_to: the first and last channel whose mask bytes another thread may also write.
  template <Shortcut S>
  static void apply(const BnArguments& a, int64_t begin, int64_t end, MeansOfY<T>& means, int64_t shared_from,
                    int64_t shared_to) {
    ChannelGroup<Applied> group(begin, end, [&](int64_t c) {
      const Channel main = channel(a, c);
      return Applied{main, S == Shortcut::kNormalised ? channel(*a.of_residual, c) : Channel{}, vanishes(a, main, c)};
    });
    const bool all_shared = a.inner < 8;
    group.planes(a, [&](const Applied& k, int64_t r, int64_t c, int64_t ahead) {
      const bool first = c == shared_from || all_shared, last = c == shared_to || all_shared;
      k.vanishes ? apply_plane<false, S>(a, k, r, c, ahead, first, last)
                 : apply_plane<true, S>(a, k, r, c, ahead, first, last);
      if constexpr (S == Shortcut::kPlain) means.of_plane(r, c);
    });
  }
  static FT_INLINE void store_with_mask(V z, T* y, int n, BitWriter& bits) {
    const V value = rounded<T>(z);
    const uint32_t pass = value.passes_relu() & ((uint32_t(1) << n) - 1u);
    store_n(value.keep(pass), y, n);
    bits.push(pass, n);
  }

  template <Gate G>
  static FT_INLINE V gradient(V dy, V x, V mean, V scale, V bias, BitReader& bits, int n) {
    if constexpr (G == Gate::kMask) return dy.keep(bits.pull(n));
    if constexpr (G == Gate::kOutput) return dy.keep(rounded<T>(normalised(x, mean, scale, bias)).passes_relu());
    return dy;
  }
  template <Gate G>
  static BitReader mask_bits(const BnArguments& a, int64_t at) {
    return BitReader(a.mask_in, G == Gate::kMask ? at : 0, a.mask_in + a.mask_bytes);
  }

  // A channel and its sums: those of `held` values in A, those before them in double.
  struct Reduced {
    Channel main;
    A mean_r;
    V s{A(0)}, s_d{A(0)}, s_r{A(0)};
    double total = 0, total_d = 0, total_r = 0;
    int64_t held = 0;
    void settle() {
      total += sum(s), total_d += sum(s_d), total_r += sum(s_r);
      s = s_d = s_r = V(A(0));
      held = 0;
    }
  };

  // Two: the residual has a BatchNorm of its own. Keep: dz is kept.
  template <Gate G, bool Two, bool Keep>
  static void reduce(const BnArguments& a, int64_t begin, int64_t end, GradientOfY<T>& gradients) {
    ChannelGroup<Reduced> group(
        begin, end, [&](int64_t c) { return Reduced{channel(a, c), Two ? channel(*a.of_residual, c).mean : A(0)}; });
    group.planes(a, [&](Reduced& k, int64_t r, int64_t c, int64_t ahead) {
      const V mean(k.main.mean), scale(k.main.scale), bias(k.main.bias), mean_r(k.mean_r);
      for (int64_t i0 = 0; i0 < a.inner; i0 += kChunk) {
        V s = k.s, s_d = k.s_d, s_r = k.s_r;
        const int64_t plane = r * a.channels + c, at = plane * a.inner + i0;
        const int64_t count = i0 + kChunk < a.inner ? kChunk : a.inner - i0;
        const T* x = static_cast<const T*>(a.x) + at;
        const T* residual = static_cast<const T*>(a.residual) + at;
        const T *given = static_cast<const T*>(a.dy) + at, *dy = gradients.piece(plane, i0, count);
        T* kept = static_cast<T*>(a.dz) + at;
        BitReader bits = mask_bits<G>(a, at);
        each<V>(count, [&](int64_t i, int n) FT_LAMBDA {
          fetch<false, V::N>(x + i, ahead), fetch<false, V::N>(given + i, ahead);
          if constexpr (Two) fetch<false, V::N>(residual + i, ahead);
          if constexpr (Keep) fetch<true, V::N>(kept + i, ahead);
          const V v = load_n<A>(x + i, n);
          const V dz = gradient<G>(load_n<A>(dy + i, n), v, mean, scale, bias, bits, n);
          if constexpr (Keep) store_n(dz, kept + i, n);
          const uint32_t lanes = (uint32_t(1) << n) - 1u;
          s = s + dz;
          s_d = V::fma(dz, (v - mean).keep(lanes), s_d);
          if constexpr (Two) s_r = V::fma(dz, (load_n<A>(residual + i, n) - mean_r).keep(lanes), s_r);
        });
        k.s = s, k.s_d = s_d, k.s_r = s_r;
        if ((k.held += count) >= kChunk) k.settle();
      }
    });
    for (int64_t c = begin; c < end; ++c) {
      Reduced& k = group.of[c - begin];
      k.settle();
      static_cast<A*>(a.dbias)[c] = A(k.total);
      store_dweight(a, c, k.total_d);
      if constexpr (Two) store_dweight(*a.of_residual, c, k.total_r);
    }
  }

  template <Gate G, bool Two>
  static void reduce(const BnArguments& a, int64_t begin, int64_t end, GradientOfY<T>& gradients) {
    a.dz ? reduce<G, Two, true>(a, begin, end, gradients) : reduce<G, Two, false>(a, begin, end, gradients);
  }

  static void store_dweight(const BnArguments& a, int64_t c, double sum_dz_d) {
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

  // The gradient of y of an apply pass, which is dz if the reduction kept that.
  static const T* kept_gradient(const BnArguments& a) { return static_cast<const T*>(a.dz ? a.dz : a.dy); }

  // What one channel (or a vector of channels) needs for dx; constant statistics: dx does not depend on x.
  struct Input {
    V mean, scale, shift, slope;
    FT_INLINE V gradient(V dz, V x, bool constant) const {
      return constant ? scale * dz : scale * V::fma(x - mean, slope, dz - shift);
    }
  };

  struct Differentiated {
    Channel main;
    BnBackward<A> factors, factors_r;
    A mean_r;
    bool vanishes;
  };

  template <Gate G, bool Two>
  static void backward(const BnArguments& a, int64_t begin, int64_t end) {
    ChannelGroup<Differentiated> group(begin, end, [&](int64_t c) {
      const Channel main = channel(a, c);
      const BnBackward<A> f = factors(a, c), f_r = Two ? factors(*a.of_residual, c) : BnBackward<A>{};
      return Differentiated{main, f, f_r, Two ? channel(*a.of_residual, c).mean : A(0), vanishes(a, f, main, c)};
    });
    const bool constant = !a.training;
    group.planes(a, [&](const Differentiated& k, int64_t r, int64_t c, int64_t ahead) {
      const BnBackward<A>&f = k.factors, &f_r = k.factors_r;
      const V scale(k.main.scale), bias(k.main.bias), zero(A(0));
      const Input input{V(k.main.mean), scale, V(f.shift), V(f.slope)};
      const Input input_r{V(k.mean_r), V(f_r.scale), V(f_r.shift), V(f_r.slope)};
      const int64_t at = (r * a.channels + c) * a.inner;
      const T* x = static_cast<const T*>(a.x) + at;
      const T* residual = static_cast<const T*>(a.residual) + at;
      const T* dy = kept_gradient(a) + at;
      T* dx = static_cast<T*>(a.dx) + at;
      T* dresidual = a.dresidual ? static_cast<T*>(a.dresidual) + at : nullptr;
      BitReader bits = mask_bits<G>(a, at);
      const auto store_dresidual = [&](V dz, int64_t i, int n) FT_LAMBDA {
        if constexpr (Two) dz = input_r.gradient(dz, load_n<A>(residual + i, n), constant);
        if (dresidual) store_n(dz, dresidual + i, n);
      };
      if (k.vanishes) {  // dz may lie where dx will
        if (G != Gate::kOutput && dresidual)
          each<V>(a.inner, [&](int64_t i, int n) FT_LAMBDA {
            store_dresidual(gradient<G>(load_n<A>(dy + i, n), zero, zero, zero, zero, bits, n), i, n);
          });
        each<V>(a.inner, [&](int64_t i, int n) FT_LAMBDA { store_n(zero, dx + i, n); });
        return;
      }
      each<V>(a.inner, [&](int64_t i, int n) FT_LAMBDA {
        fetch<false, V::N>(x + i, ahead), fetch<false, V::N>(dy + i, ahead);
        if constexpr (Two) fetch<false, V::N>(residual + i, ahead);
        fetch<true, V::N>(dx + i, ahead);
        if (dresidual) fetch<true, V::N>(dresidual + i, ahead);
        const V v = load_n<A>(x + i, n);
        const V dz = gradient<G>(load_n<A>(dy + i, n), v, input.mean, scale, bias, bits, n);
        store_dresidual(dz, i, n);
        store_n(input.gradient(dz, v, constant), dx + i, n);
      });
    });
  }

  static void channels(const BnArguments& a, int passes, int64_t begin, int64_t end) {
    GradientOfY<T> gradients(a, a.inner < kChunk ? a.inner : kChunk);
    MeansOfY<T> means(a);
    const int64_t together = channels_together(a);
    for (int64_t from = begin; from < end; from += together) {
      const int64_t to = from + together < end ? from + together : end;
      if (passes & kBnStatistics) {
        BnStatistics<T>::of_channels(a, from, to - from);
        if (a.of_residual) BnStatistics<T>::of_channels(*a.of_residual, from, to - from);
      }
      if (passes & kBnApply)
        a.of_residual ? apply<Shortcut::kNormalised>(a, from, to, means, begin, end - 1)
        : a.residual  ? apply<Shortcut::kPlain>(a, from, to, means, begin, end - 1)
                      : apply<Shortcut::kNone>(a, from, to, means, begin, end - 1);
      if (passes & kBnReduce)
        a.of_residual ? reduce<Gate::kMask, true>(a, from, to, gradients)
        : a.mask_in   ? reduce<Gate::kMask, false>(a, from, to, gradients)
                      : reduce<Gate::kOutput, false>(a, from, to, gradients);
      if (passes & kBnBackward) {
        if (a.of_residual)
          a.dz ? backward<Gate::kOpen, true>(a, from, to) : backward<Gate::kMask, true>(a, from, to);
        else
          a.dz        ? backward<Gate::kOpen, false>(a, from, to)
          : a.mask_in ? backward<Gate::kMask, false>(a, from, to)
                      : backward<Gate::kOutput, false>(a, from, to);
      }
    }
  }

  // ---- NHWC: rows of all channels ----

  // Every channel's mean, scale, bias, shift and slope, as prepare() left them for the row passes.
  struct Channels {
    A *mean, *scale, *bias, *shift, *slope;
    explicit Channels(const BnArguments& a) : mean(static_cast<A*>(a.prepared)) {
      scale = mean + a.channels, bias = scale + a.channels, shift = bias + a.channels, slope = shift + a.channels;
    }
    FT_INLINE V normalise(V x, int64_t c, int n) const {
      return normalised(x, load_n<A>(mean + c, n), load_n<A>(scale + c, n), load_n<A>(bias + c, n));
    }
    FT_INLINE Input input(int64_t c, int n) const {
      return {load_n<A>(mean + c, n), load_n<A>(scale + c, n), load_n<A>(shift + c, n), load_n<A>(slope + c, n)};
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

  // shared: whether the rows may begin or end within a byte of the mask, which another thread then writes, too.
  template <bool ReadX, Shortcut S>
  static void apply_rows(const BnArguments& a, int64_t begin, int64_t end, bool shared) {
    const Channels k(a), k_r(S == Shortcut::kNormalised ? *a.of_residual : a);
    BitWriter bits(a.mask_out, S == Shortcut::kNone ? 0 : begin * a.channels, shared);
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(a.x) + r * a.channels;
      const T* residual = static_cast<const T*>(a.residual) + r * a.channels;
      T* y = static_cast<T*>(a.y) + r * a.channels;
      each<V>(a.channels, [&](int64_t c, int n) FT_LAMBDA {
        if constexpr (ReadX) fetch<false, V::N>(x + c);
        if constexpr (S != Shortcut::kNone) fetch<false, V::N>(residual + c);
        fetch<true, V::N>(y + c);
        const V z = ReadX ? k.normalise(load_n<A>(x + c, n), c, n) : load_n<A>(k.bias + c, n);
        if constexpr (S == Shortcut::kNone) {
          store_n(z.relu(), y + c, n);
        } else {
          V added = load_n<A>(residual + c, n);
          if constexpr (S == Shortcut::kNormalised) added = k_r.normalise(added, c, n);
          store_with_mask(z + added, y + c, n, bits);
        }
      });
    }
    if constexpr (S != Shortcut::kNone) bits.finish(shared);
  }
  template <Shortcut S>
  static void apply_rows(const BnArguments& a, int64_t begin, int64_t end, bool shared = false) {
    a.vanish ? apply_rows<false, S>(a, begin, end, shared) : apply_rows<true, S>(a, begin, end, shared);
  }

  static void row_apply(const BnArguments& a, int64_t begin, int64_t end) {
    a.of_residual ? apply_rows<Shortcut::kNormalised>(a, begin, end)
    : a.residual  ? apply_rows<Shortcut::kPlain>(a, begin, end)
                  : apply_rows<Shortcut::kNone>(a, begin, end);
  }

  static void row_apply_pooled(const BnArguments& a, int64_t begin, int64_t end) {
    const MeansOfY<T> means(a);
    for (int64_t pair = begin; pair < end; ++pair) {
      apply_rows<Shortcut::kPlain>(a, means.first_pixel(pair), means.first_pixel(pair + 1), true);
      means.of_pair(pair);
    }
  }

  template <Gate G, bool Two, bool Keep>
  static void reduce_rows(const BnArguments& a, int64_t begin, int64_t end, double* sums) {
    constexpr int kSums = Two ? 3 : 2;
    const int64_t C = a.channels, step = rows_together(C);
    const Channels k(a), k_r(Two ? *a.of_residual : a);
    A* block = new A[size_t(kSums * C)];
    A *total = block, *total_d = block + C, *total_r = block + 2 * C;
    for (int64_t i = 0; i < kSums * C; ++i) sums[i] = 0;
    GradientOfY<T> gradients(a, C);
    BitReader bits = mask_bits<G>(a, begin * C);
    for (int64_t r0 = begin; r0 < end; r0 += step) {
      const int64_t r1 = r0 + step < end ? r0 + step : end;
      for (int64_t i = 0; i < kSums * C; ++i) block[i] = A(0);
      for (int64_t r = r0; r < r1; ++r) {
        const T* x = static_cast<const T*>(a.x) + r * C;
        const T* residual = static_cast<const T*>(a.residual) + r * C;
        const T *given = static_cast<const T*>(a.dy) + r * C, *dy = gradients.row(r);
        T* kept = static_cast<T*>(a.dz) + r * C;
        each<V>(C, [&](int64_t c, int n) FT_LAMBDA {
          fetch<false, V::N>(x + c), fetch<false, V::N>(given + c);
          if constexpr (Two) fetch<false, V::N>(residual + c);
          if constexpr (Keep) fetch<true, V::N>(kept + c);
          const V v = load_n<A>(x + c, n), mean = load_n<A>(k.mean + c, n);
          const V dz =
              gradient<G>(load_n<A>(dy + c, n), v, mean, load_n<A>(k.scale + c, n), load_n<A>(k.bias + c, n), bits, n);
          if constexpr (Keep) store_n(dz, kept + c, n);
          store_n(load_n<A>(total + c, n) + dz, total + c, n);
          store_n(V::fma(dz, v - mean, load_n<A>(total_d + c, n)), total_d + c, n);
          if constexpr (Two) {
            const V d_r = load_n<A>(residual + c, n) - load_n<A>(k_r.mean + c, n);
            store_n(V::fma(dz, d_r, load_n<A>(total_r + c, n)), total_r + c, n);
          }
        });
      }
      for (int64_t i = 0; i < kSums * C; ++i) sums[i] += double(block[i]);
    }
    delete[] block;
  }

  template <Gate G, bool Two>
  static void reduce_rows(const BnArguments& a, int64_t begin, int64_t end, double* sums) {
    a.dz ? reduce_rows<G, Two, true>(a, begin, end, sums) : reduce_rows<G, Two, false>(a, begin, end, sums);
  }

  static void row_reduce(const BnArguments& a, int64_t begin, int64_t end, double* sums) {
    a.of_residual ? reduce_rows<Gate::kMask, true>(a, begin, end, sums)
    : a.mask_in   ? reduce_rows<Gate::kMask, false>(a, begin, end, sums)
                  : reduce_rows<Gate::kOutput, false>(a, begin, end, sums);
  }

  template <Gate G, bool Two>
  static void backward_rows(const BnArguments& a, int64_t begin, int64_t end) {
    const int64_t C = a.channels;
    const Channels k(a), k_r(Two ? *a.of_residual : a);
    const bool nothing = a.vanish, constant = !a.training;
    const V zero(A(0));
    BitReader bits = mask_bits<G>(a, begin * C);
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(a.x) + r * C;
      const T* residual = static_cast<const T*>(a.residual) + r * C;
      const T* dy = kept_gradient(a) + r * C;
      T* dx = static_cast<T*>(a.dx) + r * C;
      T* dresidual = a.dresidual ? static_cast<T*>(a.dresidual) + r * C : nullptr;
      const auto store_dresidual = [&](V dz, int64_t c, int n) FT_LAMBDA {
        if constexpr (Two) dz = k_r.input(c, n).gradient(dz, load_n<A>(residual + c, n), constant);
        if (dresidual) store_n(dz, dresidual + c, n);
      };
      if (nothing) {  // dz may lie where dx will
        if (G != Gate::kOutput && dresidual)
          each<V>(C, [&](int64_t c, int n) FT_LAMBDA {
            store_dresidual(gradient<G>(load_n<A>(dy + c, n), zero, zero, zero, zero, bits, n), c, n);
          });
        each<V>(C, [&](int64_t c, int n) FT_LAMBDA { store_n(zero, dx + c, n); });
        continue;
      }
      each<V>(C, [&](int64_t c, int n) FT_LAMBDA {
        fetch<false, V::N>(x + c), fetch<false, V::N>(dy + c);
        if constexpr (Two) fetch<false, V::N>(residual + c);
        fetch<true, V::N>(dx + c);
        if (dresidual) fetch<true, V::N>(dresidual + c);
        const V v = load_n<A>(x + c, n);
        const Input input = k.input(c, n);
        const V dz = gradient<G>(load_n<A>(dy + c, n), v, input.mean, input.scale, load_n<A>(k.bias + c, n), bits, n);
        store_dresidual(dz, c, n);
        store_n(input.gradient(dz, v, constant), dx + c, n);
      });
    }
  }

  static void row_backward(const BnArguments& a, int64_t begin, int64_t end) {
    if (a.of_residual)
      a.dz ? backward_rows<Gate::kOpen, true>(a, begin, end) : backward_rows<Gate::kMask, true>(a, begin, end);
    else
      a.dz        ? backward_rows<Gate::kOpen, false>(a, begin, end)
      : a.mask_in ? backward_rows<Gate::kMask, false>(a, begin, end)
                  : backward_rows<Gate::kOutput, false>(a, begin, end);
  }

  static constexpr BnOfType table() {
    return {channels, prepare, BnStatistics<T>::of_rows, row_apply, row_apply_pooled, row_reduce, row_backward};
  }
};

}  // namespace

const BnReluKernels bn_relu_kernels = {Bn<float>::table(), Bn<double>::table(), Bn<Half>::table(),
                                       Bn<BFloat16>::table()};

}  // namespace fasttricks::cpu::FT_ISA

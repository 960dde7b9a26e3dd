// Reading an image through the average pool, and writing one through its transpose (every value spread over its
// window). With stride 1 both are plain copies, so dy and y are read and written by the same functions as x and dx.
// Like vec.h, included by csrc/cpu/isa/*.cpp only and compiled once per ISA.
#pragma once

#include "cpu/shuffle.h"
#include "math/avgpool.h"

namespace fasttricks::cpu::FT_ISA {

// `c` channels of h x w pixels seen as ho x wo windows of stride x stride pixels; T is const where it is only read.
template <class T>
struct AvgPoolImage {
  T* base;
  int64_t c, h, w, ho, wo, stride;
};

template <int Rows, int Cols, class A>
FT_INLINE Vec<A> over_count(Vec<A> v) {
  return Rows * Cols == 1 ? v : v * Vec<A>(A(1) / A(Rows * Cols));
}

// dst[0..n) = src[0..n), converted.
template <class A, class T>
FT_INLINE void copy_run(const T* src, int64_t n, A* dst) {
  constexpr int N = Vec<A>::N;
  for (; n >= N; n -= N, src += N, dst += N) Vec<A>::load(src).store(dst);
  if (n > 0) Vec<A>::load(src, int(n)).store(dst, int(n));
}

// ---- NHWC: one pixel, a run of channels ----

// dst[0..n) = mean over the window; `right` and `down` lead to its other pixels.
template <int Rows, int Cols, class T, class To>
FT_INLINE void mean_channels(const T* p, int64_t right, int64_t down, int64_t n, To* dst) {
  using A = acc_t<T>;
  constexpr int N = Vec<A>::N;
  auto mean = [&](auto load) {
    Vec<A> s = load(p);
    if constexpr (Cols == 2) s = s + load(p + right);
    if constexpr (Rows == 2) {
      Vec<A> t = load(p + down);
      if constexpr (Cols == 2) t = t + load(p + down + right);
      s = s + t;
    }
    return over_count<Rows, Cols>(s);
  };
  for (; n >= N; n -= N, p += N, dst += N) mean([](const T* q) { return Vec<A>::load(q); }).store(dst);
  if (n > 0) mean([n](const T* q) { return Vec<A>::load(q, int(n)); }).store(dst, int(n));
}

// Stores v / count to the four pixels.
template <int Rows, int Cols, class A, class T>
FT_INLINE void spread_channels(const A* v, int64_t n, T* p, int64_t right, int64_t down) {
  constexpr int N = Vec<A>::N;
  auto spread = [&](Vec<A> value, auto store) {
    const Vec<A> s = over_count<Rows, Cols>(value);
    store(s, p);
    if constexpr (Cols == 2) store(s, p + right);
    if constexpr (Rows == 2) {
      store(s, p + down);
      if constexpr (Cols == 2) store(s, p + down + right);
    }
  };
  for (; n >= N; n -= N, p += N, v += N) spread(Vec<A>::load(v), [](Vec<A> s, T* q) { s.store(q); });
  if (n > 0) spread(Vec<A>::load(v, int(n)), [n](Vec<A> s, T* q) { s.store(q, int(n)); });
}

// The corner of output pixel p's window, and how much of the window lies inside the image.
template <class T>
struct Window {
  T* corner;
  int64_t rows, cols;
};

template <class T>
FT_INLINE Window<T> window_at(const AvgPoolImage<T>& image, int64_t p) {
  const int64_t j = p % image.wo, row = p / image.wo, i = row % image.ho, n = row / image.ho;
  return {image.base + ((n * image.h + i * image.stride) * image.w + j * image.stride) * image.c,
          avgpool_extent(image.h, image.stride, i), avgpool_extent(image.w, image.stride, j)};
}

// dst[0..n) = pooled channels [c0, c0 + n) of output pixel p.
template <class T, class To>
static void read_pixel(const AvgPoolImage<const T>& image, int64_t p, int64_t c0, int64_t n, To* dst) {
  const auto window = window_at(image, p);
  const T* corner = window.corner + c0;
  const int64_t right = image.c, down = image.w * image.c;
  if (window.rows == 2)
    window.cols == 2 ? mean_channels<2, 2>(corner, right, down, n, dst)
                     : mean_channels<2, 1>(corner, right, down, n, dst);
  else
    window.cols == 2 ? mean_channels<1, 2>(corner, right, down, n, dst)
                     : mean_channels<1, 1>(corner, right, down, n, dst);
}

// Spreads v[0..n) over channels [c0, c0 + n) of the window of output pixel p.
template <class A, class T>
static void write_pixel(const AvgPoolImage<T>& image, int64_t p, int64_t c0, int64_t n, const A* v) {
  const auto window = window_at(image, p);
  T* corner = window.corner + c0;
  const int64_t right = image.c, down = image.w * image.c;
  if (window.rows == 2)
    window.cols == 2 ? spread_channels<2, 2>(v, n, corner, right, down)
                     : spread_channels<2, 1>(v, n, corner, right, down);
  else
    window.cols == 2 ? spread_channels<1, 2>(v, n, corner, right, down)
                     : spread_channels<1, 1>(v, n, corner, right, down);
}

// ---- NCHW: one channel, a run of pixels ----
//
// Rows of windows are short (7 at the end of a ResNet), so the pool is done in two steps over a whole run: along the
// columns, row by row, into `scratch` (2 values per output pixel), then along the rows, in full vectors, over values
// that are now contiguous. The spread does the reverse. A step that adds two pixels halves the sum, which is exact and
// also correct at overhanging edges.

// Splits the run of `count` output pixels of `channel` from pixel p on (counted over the batch) into rows of windows,
// and calls row(corner, rows, whole, single, done) for each: `whole` windows of two columns, then `single` (0 or 1) of
// one column.
template <class T, class Row>
FT_INLINE void for_rows(const AvgPoolImage<T>& image, int64_t channel, int64_t p, int64_t count, Row row) {
  const int64_t plane = image.ho * image.wo, q = p % plane;
  T* base = image.base + (p / plane * image.c + channel) * image.h * image.w;
  int64_t i = q / image.wo, j = q % image.wo;
  for (int64_t done = 0; done < count; j = 0) {
    const int64_t left = count - done, m = image.wo - j < left ? image.wo - j : left;
    const int64_t single = (j + m) * 2 > image.w ? 1 : 0;
    row(base + i * 2 * image.w + 2 * j, avgpool_extent(image.h, 2, i), m - single, single, done);
    done += m;
    if (++i == image.ho) i = 0, base += image.c * image.h * image.w;
  }
}

// The same for stride 1: calls run(pixels, length, done) for the part of the run in each image.
template <class T, class Run>
FT_INLINE void for_planes(const AvgPoolImage<T>& image, int64_t channel, int64_t p, int64_t count, Run run) {
  const int64_t plane = image.ho * image.wo;
  int64_t q = p % plane;
  T* base = image.base + (p / plane * image.c + channel) * plane;
  for (int64_t done = 0; done < count; q = 0, base += image.c * plane) {
    const int64_t left = count - done, m = plane - q < left ? plane - q : left;
    run(base + q, m, done);
    done += m;
  }
}

// The number of elements of scratch that a run of `count` pixels needs.
template <class A>
FT_INLINE int64_t scratch_for_run(int64_t count) {
  return 2 * count + 2 * Vec<A>::N;
}

// Passes output pixels p, p + 1, ... of one pooled channel to put(q, values), N pixels from q on at a time (q is a
// multiple of N); lanes past `count` are zeros.
template <class A, class T, class Put>
static void read_run(const AvgPoolImage<const T>& image, int64_t channel, int64_t p, int64_t count, A* scratch,
                     Put put) {
  constexpr int N = Vec<A>::N;
  if (image.stride == 1) {
    const auto put_all = [&](const auto* src) {
      int64_t q = 0;
      for (; q + N <= count; q += N) put(q, Vec<A>::load(src + q));
      if (q < count) put(q, Vec<A>::load(src + q, int(count - q)));
    };
    bool one = false;
    for_planes(image, channel, p, count, [&](const T* src, int64_t m, int64_t done) {
      one = m == count;
      one ? put_all(src) : copy_run(src, m, scratch + done);
    });
    if (!one) put_all(scratch);
    return;
  }
  const Vec<A> half(A(0.5));
  for_rows(image, channel, p, count, [&](const T* src, int64_t rows, int64_t whole, int64_t, int64_t done) {
    A* dst = scratch + 2 * done;
    int64_t n = 2 * whole;
    if (rows == 2) {
      const T* below = src + image.w;
      for (; n >= N; n -= N, src += N, below += N, dst += N)
        ((Vec<A>::load(src) + Vec<A>::load(below)) * half).store(dst);
      if (n > 0) ((Vec<A>::load(src, int(n)) + Vec<A>::load(below, int(n))) * half).store(dst);
    } else {
      copy_run(src, n, dst);
    }
  });
  for (int i = 0; i < 2 * N; ++i) scratch[2 * count + i] = A(0);
  if (image.ho > 0 && image.wo * 2 > image.w) {  // windows of one column: its value is the mean of two such
    for_rows(image, channel, p, count, [&](const T* src, int64_t rows, int64_t whole, int64_t single, int64_t done) {
      if (!single) return;
      const T* last = src + 2 * whole;
      A* dst = scratch + 2 * (done + whole);
      dst[0] = dst[1] = rows == 2 ? (load1(last) + load1(last + image.w)) * A(0.5) : load1(last);
    });
  }
  for (int64_t q = 0; q < count; q += N)
    put(q, pair_sum(Vec<A>::load(scratch + 2 * q) * half, Vec<A>::load(scratch + 2 * q + N) * half));
}

// Spreads v[0..count) over the windows of output pixels p, p + 1, ... of one channel.
template <class A, class T>
static void write_run(const AvgPoolImage<T>& image, int64_t channel, int64_t p, int64_t count, const A* v, A* scratch) {
  constexpr int N = Vec<A>::N;
  if (image.stride == 1) {
    for_planes(image, channel, p, count, [&](T* dst, int64_t m, int64_t done) {
      const A* from = v + done;
      for (; m >= N; m -= N, from += N, dst += N) Vec<A>::load(from).store(dst);
      if (m > 0) Vec<A>::load(from, int(m)).store(dst, int(m));
    });
    return;
  }
  const Vec<A> half(A(0.5));
  for (int64_t q = 0; q < count; q += N) {
    Vec<A> lo, hi;
    twice(load_n<A>(v + q, count - q < N ? count - q : N) * half, lo, hi);
    lo.store(scratch + 2 * q), hi.store(scratch + 2 * q + N);
  }
  for_rows(image, channel, p, count, [&](T* dst, int64_t rows, int64_t whole, int64_t single, int64_t done) {
    const A* from = scratch + 2 * done;
    if (single) {
      const A value = rows == 2 ? v[done + whole] * A(0.5) : v[done + whole];
      store1(dst + 2 * whole, value);
      if (rows == 2) store1(dst + 2 * whole + image.w, value);
    }
    int64_t n = 2 * whole;
    if (rows == 2) {
      T* below = dst + image.w;
      for (; n >= N; n -= N, from += N, dst += N, below += N) {
        const Vec<A> s = Vec<A>::load(from) * half;
        s.store(dst), s.store(below);
      }
      if (n > 0) {
        const Vec<A> s = Vec<A>::load(from, int(n)) * half;
        s.store(dst, int(n)), s.store(below, int(n));
      }
    } else {
      for (; n >= N; n -= N, from += N, dst += N) Vec<A>::load(from).store(dst);
      if (n > 0) Vec<A>::load(from, int(n)).store(dst, int(n));
    }
  });
}

}  // namespace fasttricks::cpu::FT_ISA

// The gradient of y as the backward pass reads it. Like vec.h, included by csrc/cpu/isa/*.cpp only and compiled once
// per ISA.
#pragma once

#include "cpu/bn_relu.h"
#include "cpu/shuffle.h"
#include "cpu/vec.h"
#include "math/avgpool.h"

namespace fasttricks::cpu::FT_ISA {

// dy or, with a second gradient, T(dy + dy2): rounded as if an op of its own had added them. If dy2 is the gradient of
// the 2x2 means of y, a pixel's share of it is dy2 / (pixels of its window), and 0 for a pixel in no window.
template <class T>
class GradientOfY {
  using A = acc_t<T>;
  using V = Vec<A>;

 public:
  // most: values of one piece or row.
  GradientOfY(const BnArguments& a, int64_t most)
      : channels_(a.channels),
        inner_(a.inner),
        dy_(static_cast<const T*>(a.dy)),
        dy2_(static_cast<const T*>(a.second.data)),
        second_(a.second) {
    if (!dy2_) return;
    sum_ = new T[size_t(most)];
    if (!second_.pooled) return;
    by_width_ = LongDivider(second_.width), by_height_ = LongDivider(second_.height);
    line_ = new A[size_t(2 * (second_.pooled_width + V::N))];
  }
  GradientOfY(const GradientOfY&) = delete;
  GradientOfY& operator=(const GradientOfY&) = delete;
  ~GradientOfY() {
    delete[] sum_;
    delete[] line_;
  }

  // NCHW: values [i, i + n) of a plane, counted over rows and channels.
  FT_INLINE const T* piece(int64_t plane, int64_t i, int64_t n) {
    const T* dy = dy_ + plane * inner_ + i;
    return dy2_ ? summed_piece(dy, plane, i, n) : dy;
  }

  // NHWC: all channels of row r.
  FT_INLINE const T* row(int64_t r) {
    const T* dy = dy_ + r * channels_;
    return dy2_ ? summed_row(dy, r) : dy;
  }

 private:
  const T* summed_piece(const T* dy, int64_t plane, int64_t i, int64_t n) {
    if (!second_.pooled) {
      add(dy, dy2_ + plane * inner_ + i, A(1), n, sum_);
      return sum_;
    }
    int64_t h = i / second_.width, w = i % second_.width;
    for (int64_t done = 0; done < n; ++h, w = 0) {
      const int64_t m = second_.width - w < n - done ? second_.width - w : n - done;
      spread(plane, h / 2);
      add(dy + done, line_ + w, A(1), m, sum_ + done);
      done += m;
    }
    return sum_;
  }

  const T* summed_row(const T* dy, int64_t r) {
    const T* dy2 = dy2_ + r * channels_;
    A share(1);
    if (second_.pooled) {
      const int64_t line = by_width_.divide(r), image = by_height_.divide(line);
      const int64_t i = (line - image * second_.height) / 2, j = (r - line * second_.width) / 2;
      if (i >= second_.pooled_height || j >= second_.pooled_width) return dy;
      dy2 = dy2_ + ((image * second_.pooled_height + i) * second_.pooled_width + j) * channels_;
      share = A(1) / A(avgpool_extent(second_.height, 2, i) * avgpool_extent(second_.width, 2, j));
    }
    add(dy, dy2, share, channels_, sum_);
    return sum_;
  }

  // to = a + b * share
  template <class B>
  static FT_INLINE void add(const T* a, const B* b, A share, int64_t size, T* to) {
    const V of_b(share);
    each<V>(size, [&](int64_t i, int n) FT_LAMBDA {
      fetch<false, V::N>(b + i);
      store_n(load_n<A>(a + i, n) + load_n<A>(b + i, n) * of_b, to + i, n);
    });
  }

  // line_ = what each pixel of an image row gets, the same in both rows of window row i.
  void spread(int64_t plane, int64_t i) {
    const int64_t height = second_.pooled_height, width = second_.pooled_width, key = plane * (height + 1) + i;
    if (key == held_) return;
    held_ = key;
    if (i >= height) {
      for (int64_t w = 0; w < second_.width; ++w) line_[w] = A(0);
      return;
    }
    const T* dy2 = dy2_ + (plane * height + i) * width;
    const A of_row = A(1) / A(avgpool_extent(second_.height, 2, i));
    const V share(of_row * A(0.5));
    each<V>(width, [&](int64_t j, int n) FT_LAMBDA {
      V lo, hi;
      twice(load_n<A>(dy2 + j, n) * share, lo, hi);
      lo.store(line_ + 2 * j), hi.store(line_ + 2 * j + V::N);
    });
    if (2 * width > second_.width) line_[second_.width - 1] = load1(dy2 + width - 1) * of_row;
    if (2 * width < second_.width) line_[second_.width - 1] = A(0);
  }

  int64_t channels_, inner_;
  const T *dy_, *dy2_;
  BnSecondGradient second_;
  LongDivider by_width_, by_height_;
  T* sum_ = nullptr;
  A* line_ = nullptr;
  int64_t held_ = -1;  // which window row line_ holds
};

}  // namespace fasttricks::cpu::FT_ISA

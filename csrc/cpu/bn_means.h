// The 2x2 means of y, from the values of y that have just been written and are still in the cache. Like vec.h, included
// by csrc/cpu/isa/*.cpp only and compiled once per ISA.
#pragma once

#include "cpu/avgpool_image.h"
#include "cpu/bn_relu.h"

namespace fasttricks::cpu::FT_ISA {

template <class T>
class MeansOfY {
  using A = acc_t<T>;
  static constexpr int64_t kRun = 2048;  // means of one run

 public:
  explicit MeansOfY(const BnArguments& a)
      : to_(static_cast<T*>(a.means.data)),
        y_{static_cast<const T*>(a.y), a.channels, a.means.height, a.means.width, a.means.pooled_height,
           a.means.pooled_width,       2},
        pairs_((a.means.height + 1) / 2) {
    if (to_ && a.inner > 1) scratch_ = new A[size_t(scratch_for_run<A>(kRun))];
  }
  MeansOfY(const MeansOfY&) = delete;
  MeansOfY& operator=(const MeansOfY&) = delete;
  ~MeansOfY() { delete[] scratch_; }

  // NCHW: the means of a channel of one image.
  FT_INLINE void of_plane(int64_t image, int64_t channel) {
    if (to_) pool_plane(image, channel);
  }

  // NHWC: image rows 2i and 2i + 1 are one pair, counted over the batch.
  FT_INLINE int64_t first_pixel(int64_t pair) const {
    const int64_t image = pair / pairs_, row = 2 * (pair - image * pairs_);
    return (image * y_.h + row) * y_.w;
  }
  void of_pair(int64_t pair) const {
    const int64_t image = pair / pairs_, i = pair - image * pairs_;
    if (i == y_.ho) return;  // the odd row that no window covers
    const int64_t first = (image * y_.ho + i) * y_.wo;
    for (int64_t p = first; p < first + y_.wo; ++p) read_pixel(y_, p, 0, y_.c, to_ + p * y_.c);
  }

 private:
  void pool_plane(int64_t image, int64_t channel) {
    const int64_t plane = y_.ho * y_.wo;
    T* to = to_ + (image * y_.c + channel) * plane;
    for (int64_t p = 0; p < plane; p += kRun) {
      const int64_t count = p + kRun < plane ? kRun : plane - p;
      read_run(y_, channel, image * plane + p, count, scratch_, [&](int64_t q, Vec<A> means) {
        store_n(means, to + p + q, count - q < Vec<A>::N ? count - q : Vec<A>::N);
      });
    }
  }

  T* to_;
  AvgPoolImage<const T> y_;
  int64_t pairs_;
  A* scratch_ = nullptr;
};

}  // namespace fasttricks::cpu::FT_ISA

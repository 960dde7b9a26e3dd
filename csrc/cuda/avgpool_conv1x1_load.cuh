// Loads the operands of avgpool_conv1x1's products into shared memory. A loader yields 16-byte vectors of a matrix
// (outer, inner) whose inner index is contiguous in memory, with zeros past its ends. If `wide`, fetch starts the loads
// of a vector into registers and settle computes the vector once they have arrived; otherwise elements are loaded one
// by one, neighbouring elements by neighbouring threads.
//
// Unless pixels are the depth of the product, each is divided into (n, i, j) only once.
#pragma once

#include "avgpool_conv1x1_plan.h"
#include "intrinsics.cuh"

namespace fasttricks::cuda {

template <typename T>
constexpr int kAvgPoolVector = AvgPoolTile<sizeof(T)>::kVector;

// Vectors as they were loaded. Those of 16-bit values are taken apart when they are settled, not before: of arrays of
// 16-bit values the compiler makes moves right after the loads, which wait for them.
template <typename T, int kCount>
struct AvgPoolRaw {
  using Vector = std::conditional_t<sizeof(T) == 2, uint4[1], T[kAvgPoolVector<T>]>;
  Vector v[kCount];

  FT_DEVICE void fetch(int k, const T* p) {
    FT_METER_LOAD(p, 16);
    const uint4 u = *reinterpret_cast<const uint4*>(p);
    memcpy(v[k], &u, 16);
  }
  FT_DEVICE void elements(int k, T (&e)[kAvgPoolVector<T>]) const {
    uint4 u;
    memcpy(&u, v[k], 16);
    if constexpr (sizeof(T) == 2) u = {hidden(u.x), hidden(u.y), hidden(u.z), hidden(u.w)};
    memcpy(e, &u, 16);
  }
};

struct AvgPoolPixel {
  int n, i, j;
};
FT_DEVICE AvgPoolPixel pixel_of(const AvgPoolShape& s, int q) {
  const unsigned row = s.by_wo.divide(unsigned(q)), n = s.by_ho.divide(row);
  return {int(n), int(row - n * unsigned(s.ho)), int(unsigned(q) - row * unsigned(s.wo))};
}
// The offset of an output pixel in an NCHW tensor of `channels`, and the corner of its window in x.
FT_DEVICE int64_t offset_in_planes(const AvgPoolShape& s, const AvgPoolPixel& at, int channels, int channel) {
  return (int64_t(at.n) * channels + channel) * s.plane() + at.i * s.wo + at.j;
}
FT_DEVICE int64_t corner_in_planes(const AvgPoolShape& s, const AvgPoolPixel& at, int channel) {
  return (int64_t(at.n) * s.c + channel) * s.h * s.w + int64_t(at.i * s.stride) * s.w + at.j * s.stride;
}
// How many rows and columns of a pixel's window lie inside the image.
FT_DEVICE int window_rows(const AvgPoolShape& s, const AvgPoolPixel& at) {
  return int(avgpool_extent(s.h, s.stride, at.i));
}
FT_DEVICE int window_columns(const AvgPoolShape& s, const AvgPoolPixel& at) {
  return int(avgpool_extent(s.w, s.stride, at.j));
}
template <typename A>
FT_DEVICE A inverse_count(int rows, int columns) {
  return (rows > 1 ? A(0.5) : A(1)) * (columns > 1 ? A(0.5) : A(1));
}

// A dense matrix: outer rows of `inner` elements. If wide, it is copied to shared memory without passing through
// registers.
template <typename T>
struct RowLoader {
  const T* base;
  int outer_size, inner_size;
  bool wide;

  FT_DEVICE bool inside(int outer, int inner) const { return outer < outer_size && inner < inner_size; }
  FT_DEVICE const T* at(int outer, int inner) const { return base + int64_t(outer) * inner_size + inner; }
  FT_DEVICE void copy(T* to, int outer, int inner) const {
    const bool needed = inside(outer, inner);
    copy_async(to, needed ? at(outer, inner) : base, needed);
  }
  FT_DEVICE T one(int outer, int inner) const { return inside(outer, inner) ? load(at(outer, inner)) : T(0); }
};

// A gradient in NCHW: outer index channels, inner index pixels.
template <typename T>
struct PlaneLoader {
  const T* base;
  AvgPoolShape s;
  int channels;
  bool wide;

  struct State {
    int64_t offset;  // of the first pixel, in channel 0
  };
  using Raw = AvgPoolRaw<T, 1>;
  using Single = State;
  FT_DEVICE State state(int pixel) const { return {offset_in_planes(s, pixel_of(s, pixel), channels, 0)}; }
  FT_DEVICE Single single(int pixel) const { return state(pixel); }
  FT_DEVICE Raw fetch(const State& state, int channel, int channel_end, int pixel, int pixel_end) const {
    Raw raw = {};
    if (channel < channel_end && pixel < pixel_end) raw.fetch(0, base + state.offset + int64_t(channel) * s.plane());
    return raw;
  }
  FT_DEVICE T one(const Single& state, int channel) const {
    return load(base + state.offset + int64_t(channel) * s.plane());
  }
  FT_DEVICE void settle(const State&, const Raw& raw, T (&v)[kAvgPoolVector<T>]) const { raw.elements(0, v); }
};

// The mean of a window's four values; those outside the image are 0.
template <typename T>
FT_DEVICE T pooled(T a, T b, T c, T d, acc_t<T> inv_count) {
  using A = acc_t<T>;
  return T(((A(a) + A(b)) + (A(c) + A(d))) * inv_count);
}

// A window of x: the offset of its corner in channel 0, and how many of its rows and columns lie inside the image.
struct AvgPoolWindow {
  int64_t corner;
  int rows, columns;
};
// The mean of a window, given the strides of its rows and columns; pairs: both columns in one access.
template <typename T>
FT_DEVICE T pooled_singly(const T* corner, const AvgPoolWindow& window, int64_t row, int64_t column, bool pairs) {
  T four[2][2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (r >= window.rows) continue;
    if (pairs) {
      load_pair(corner + r * row, four[r]);
    } else {
      four[r][0] = load(corner + r * row);
      if (window.columns > 1) four[r][1] = load(corner + r * row + column);
    }
  }
  return pooled(four[0][0], four[0][1], four[1][0], four[1][1], inverse_count<acc_t<T>>(window.rows, window.columns));
}

// Pooled x in NHWC: outer index output pixels, inner index channels.
template <typename T>
struct PooledRowLoader {
  const T* base;
  AvgPoolShape s;
  bool wide, pairs;

  struct State {
    int64_t corner;  // as in AvgPoolWindow
    int inside;      // a bit for each of the four pixels: the upper ones, the lower ones
  };
  using Single = AvgPoolWindow;
  using Raw = AvgPoolRaw<T, 4>;
  FT_DEVICE Single single(int pixel) const {
    const AvgPoolPixel at = pixel_of(s, pixel);
    return {((int64_t(at.n) * s.h + at.i * s.stride) * s.w + at.j * s.stride) * s.c, window_rows(s, at),
            window_columns(s, at)};
  }
  FT_DEVICE State state(int pixel) const {
    const Single window = single(pixel);
    const int row = window.columns > 1 ? 3 : 1;
    return {window.corner, window.rows > 1 ? row * 5 : row};
  }
  FT_DEVICE Raw fetch(const State& state, int channel, int channel_end, int pixel, int pixel_end) const {
    Raw raw = {};
    const T* const corner = base + state.corner + channel;
    const bool any = pixel < pixel_end && channel < channel_end;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (any && (state.inside >> k & 1)) raw.fetch(k, corner + (k / 2 * int64_t(s.w) + k % 2) * s.c);
    return raw;
  }
  FT_DEVICE T one(const Single& window, int channel) const {
    return pooled_singly(base + window.corner + channel, window, int64_t(s.w) * s.c, s.c, false);
  }
  FT_DEVICE void settle(const State& state, const Raw& raw, T (&v)[kAvgPoolVector<T>]) const {
    const auto inv = inverse_count<acc_t<T>>(state.inside >> 2 ? 2 : 1, state.inside & 2 ? 2 : 1);
    T four[4][kAvgPoolVector<T>];
#pragma unroll
    for (int k = 0; k < 4; ++k) raw.elements(k, four[k]);
#pragma unroll
    for (int e = 0; e < kAvgPoolVector<T>; ++e) v[e] = pooled(four[0][e], four[1][e], four[2][e], four[3][e], inv);
  }
};

// Pooled x in NCHW: outer index channels, inner index output pixels. wide: half a vector of output pixels, all in one
// row, is pooled from one vector of x in each of two rows; with stride 1 a vector is copied. pairs: one access per row
// of a window.
template <typename T>
struct PooledPlaneLoader {
  static constexpr int kHalf = kAvgPoolVector<T> / 2;
  const T* base;
  AvgPoolShape s;
  bool wide, pairs;

  struct State {
    int64_t corner[2];  // of the first window of each half, in channel 0
    int rows[2];
  };
  using Single = AvgPoolWindow;
  using Raw = AvgPoolRaw<T, 4>;
  FT_DEVICE State state(int pixel) const {
    State made;
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const AvgPoolPixel at = pixel_of(s, pixel + g * kHalf);
      made.corner[g] = corner_in_planes(s, at, 0);
      made.rows[g] = window_rows(s, at);
    }
    return made;
  }
  FT_DEVICE Single single(int pixel) const {
    const AvgPoolPixel at = pixel_of(s, pixel);
    return {corner_in_planes(s, at, 0), window_rows(s, at), window_columns(s, at)};
  }
  FT_DEVICE Raw fetch(const State& state, int channel, int channel_end, int pixel, int pixel_end) const {
    Raw raw = {};
    const int64_t plane = int64_t(channel) * s.h * s.w;
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // row k / 2 of half k % 2
      const bool wanted = s.stride == 1 ? k == 0 : k / 2 < state.rows[k % 2];
      const int first = s.stride == 1 ? pixel : pixel + k % 2 * kHalf;
      if (channel < channel_end && first < pixel_end && wanted)
        raw.fetch(k, base + state.corner[k % 2] + plane + k / 2 * s.w);
    }
    return raw;
  }
  FT_DEVICE T one(const Single& window, int channel) const {
    return pooled_singly(base + window.corner + int64_t(channel) * s.h * s.w, window, s.w, 1, pairs);
  }
  FT_DEVICE void settle(const State& state, const Raw& raw, T (&v)[kAvgPoolVector<T>]) const {
    if (s.stride == 1) return raw.elements(0, v);
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const auto inv = inverse_count<acc_t<T>>(state.rows[g], 2);
      T upper[kAvgPoolVector<T>], lower[kAvgPoolVector<T>];
      raw.elements(g, upper);
      raw.elements(2 + g, lower);
#pragma unroll
      for (int e = 0; e < kHalf; ++e)
        v[g * kHalf + e] = pooled(upper[2 * e], upper[2 * e + 1], lower[2 * e], lower[2 * e + 1], inv);
    }
  }
};

}  // namespace fasttricks::cuda

// A second gradient of y, which a backward kernel adds to the first one while it reads it.
#pragma once

#include "bn_relu_tile.cuh"

namespace fasttricks::cuda {

// Of the shape of x, or pooled: of the 2x2 means of y, whose gradient goes to the pixels of a window in equal parts.
template <typename T>
struct BnSecondGradient {
  const T* data = nullptr;                 // null: there is none
  bool pooled = false, by_pixels = false;  // by_pixels: a row of the matrix is a pixel (NHWC)
  int height = 1, width = 1, pooled_height = 1, pooled_width = 1;
  LongDivider by_height, by_width;

  bool vectors_fit() const { return (pooled && !by_pixels) || reinterpret_cast<uintptr_t>(data) % 16 == 0; }
  FT_DEVICE acc_t<T> share(int row, int column) const {
    return acc_t<T>((2 * row + 1 < height ? 0.5f : 1.0f) * (2 * column + 1 < width ? 0.5f : 1.0f));
  }

  // g of the thread's columns at element e: the sum, rounded to T.
  template <bool kVector>
  FT_DEVICE void add_to(const BnTile& tile, int64_t e, T (&g)[kBnColumns]) const {
    using A = acc_t<T>;
    if (!pooled || by_pixels) {
      A share_of_all = A(1);
      int64_t at = e;
      if (pooled) {
        const int64_t pixel = tile.s.by_channels.divide(e), line = by_width.divide(pixel),
                      image = by_height.divide(line);
        const int row = int(line - image * height) / 2, column = int(pixel - line * width) / 2;
        if (row >= pooled_height || column >= pooled_width) return;
        share_of_all = share(row, column);
        at = ((image * pooled_height + row) * pooled_width + column) * tile.s.cols + (e - pixel * tile.s.cols);
      }
      T more[kBnColumns];
      tile.template load<kVector>(data, at, more);
#pragma unroll
      for (int j = 0; j < kBnColumns; ++j) g[j] = T(A(g[j]) + A(more[j]) * share_of_all);
      return;
    }
    int64_t plane = tile.s.by_inner.divide(e);
    const int64_t in_plane = e - plane * tile.s.inner, line = by_width.divide(in_plane);
    int row = int(line), column = int(in_plane - line * width);
    A more = A(0);
    bool inside = false;  // in a window
#pragma unroll
    for (int j = 0; j < kBnColumns; ++j) {
      if (j == 0 || column % 2 == 0) {  // the next pixel has the same mean
        inside = j < tile.valid && row / 2 < pooled_height && column / 2 < pooled_width;
        if (inside)
          more = A(load(data + (plane * pooled_height + row / 2) * pooled_width + column / 2)) *
                 share(row / 2, column / 2);
      }
      if (inside && j < tile.valid) g[j] = T(A(g[j]) + more);
      if (++column < width) continue;
      column = 0;
      if (++row < height) continue;
      row = 0;
      ++plane;
    }
  }
};

}  // namespace fasttricks::cuda

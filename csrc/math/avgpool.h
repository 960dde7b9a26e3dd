// Geometry of the 2x2 average pool with stride 2 of a ResNet-D shortcut, for host and device; stride 1 is no pool.
//
//   p[i, j] = sum of x[r, s] over the window / count        r in [i * stride, min((i + 1) * stride, H)); s likewise in
//   W dx[r, s] = dp[r / stride, s / stride] / count            0 for the pixels that no window covers (floor, odd H or
//   W)
//
// count is the number of pixels inside the image, 1, 2 or 4 (count_include_pad=False): 1 / count is exact.
#pragma once

#include "math/common.h"

namespace fasttricks {

// How many windows cover `size` pixels: floor is torch's default; ceil adds the window that overhangs an odd edge.
FT_HD int64_t avgpool_out_size(int64_t size, int64_t stride, bool ceil_mode) {
  return ceil_mode ? ceil_div(size, stride) : size / stride;
}

// How many of a window's pixels along one axis lie inside the image: `stride`, or 1 at an overhanging edge.
FT_HD int64_t avgpool_extent(int64_t size, int64_t stride, int64_t window) {
  const int64_t left = size - window * stride;
  return left < stride ? left : stride;
}

// x: n x c x h x w;  weight: o x c;  y: n x o x ho x wo.  All three dense, x and y both NCHW or both NHWC.
struct AvgPoolConv1x1Sizes {
  int64_t n, c, h, w, o, ho, wo, stride;
  bool nhwc;

  // Those of the convolution alone, on the pooled tensor.
  FT_HD AvgPoolConv1x1Sizes without_pool() const { return {n, c, ho, wo, o, ho, wo, 1, nhwc}; }
};

}  // namespace fasttricks

// The launch plans and offsets of csrc/cuda/avgpool_conv1x1* for ctypes; see tests/test_cuda_avgpool_conv1x1.py.
#include "cuda/avgpool_conv1x1_plan.h"

#include <iterator>

#include "cuda/avgpool_conv1x1_load.cuh"

using namespace fasttricks;
using namespace fasttricks::cuda;

namespace {
// sizes: n, c, h, w, o, stride, ceil_mode
AvgPoolShape shape_of(const int64_t* s) {
  return {int(s[0]),
          int(s[1]),
          int(s[2]),
          int(s[3]),
          int(s[4]),
          int(avgpool_out_size(s[2], s[5], s[6] != 0)),
          int(avgpool_out_size(s[3], s[5], s[6] != 0)),
          int(s[5])};
}
}  // namespace

#pragma GCC visibility push(default)  // ctypes finds them
extern "C" {

int64_t avgpool_images_of(int64_t ho, int64_t wo) { return avgpool_images(ho, wo); }

// tiles_m, tiles_n, depth, depth_per_split, splits
void avgpool_plan_of(const int64_t* sizes, int64_t product, int64_t bytes, int64_t sm_count, int64_t* out) {
  const AvgPoolPlan p = avgpool_plan(shape_of(sizes), AvgPoolProduct(product), int(bytes), int(sm_count));
  const int64_t all[] = {p.tiles_m, p.tiles_n, p.depth, p.depth_per_split, p.splits};
  std::copy(std::begin(all), std::end(all), out);
}

// tiles_m, tiles_n, tiles_per_group, groups, shared_bytes
void avgpool_slab_plan_of(const int64_t* sizes, int64_t sm_count, int64_t shared_per_sm, int64_t shared_per_block,
                          int64_t* out) {
  const AvgPoolSlabPlan p =
      avgpool_slab_plan(shape_of(sizes), int(sm_count), int(shared_per_sm), int(shared_per_block));
  const int64_t all[] = {p.tiles_m, p.tiles_n, p.tiles_per_group, p.groups, p.shared_bytes};
  std::copy(std::begin(all), std::end(all), out);
}

int64_t avgpool_bias_splits_of(const int64_t* sizes, int64_t sm_count) {
  return avgpool_bias_splits(shape_of(sizes), int(sm_count));
}

// Offsets for one pixel of the output and one channel: the corner of its window in x (NHWC; NCHW; NCHW as the first and
// as the second half of a vector, all without the channel), and its element of dy (NHWC; NCHW).
void avgpool_offsets_of(const int64_t* sizes, int64_t pixel, int64_t channel, int64_t* out) {
  const AvgPoolShape s = shape_of(sizes);
  const int q = int(pixel), c = int(channel);
  const Half* const base = nullptr;
  const PooledPlaneLoader<Half> planes{base, s, true, true};
  const PlaneLoader<Half> gradient{base, s, s.o, true};
  const RowLoader<Half> rows{base, s.pixels(), s.o, true};
  const auto bytes = reinterpret_cast<uintptr_t>(rows.at(q, c));
  const int64_t all[] = {PooledRowLoader<Half>{base, s, true, false}.state(q).corner,
                         planes.single(q).corner,
                         planes.state(q).corner[0],
                         planes.state(q).corner[1],
                         int64_t(bytes / sizeof(Half)),
                         gradient.state(q).offset + int64_t(c) * s.plane()};
  std::copy(std::begin(all), std::end(all), out);
}
}

// Launch plan of bn_add_relu_pool: plain host arithmetic, shared by launchers and tests.
#pragma once

#include <numeric>

#include "bn_relu_plan.h"
#include "math/avgpool.h"

namespace fasttricks::cuda {

// The images of y and of the means of its 2x2 windows. Without ceil_mode a window at an odd edge has no mean.
struct BnWindows {
  int64_t height, width, pooled_height, pooled_width;
  int64_t across, down;  // windows of an image, with those that have no mean
  LongDivider by_across, by_down, by_pooled_width, by_pooled_height;

  BnWindows(int64_t height, int64_t width, bool ceil_mode)
      : height(height),
        width(width),
        pooled_height(avgpool_out_size(height, 2, ceil_mode)),
        pooled_width(avgpool_out_size(width, 2, ceil_mode)),
        across(ceil_div(width, 2)),
        down(ceil_div(height, 2)),
        by_across(across),
        by_down(down),
        by_pooled_width(pooled_width),
        by_pooled_height(pooled_height) {}
};

// NHWC: a row of the matrix is a window, of which a thread has 8 channels.
inline BnShape bn_window_shape(const BnShape& s, const BnWindows& w) {
  return {s.rows / (w.height * w.width) * w.down * w.across, s.channels, 1, s.channels};
}

// NCHW: memory is cut into units, the shortest runs that are whole groups of windows and whole vectors; a group is a
// pair of image rows, or the plane of an odd height. Block b has the units from first_unit(b) to first_unit(b + 1), as
// many at a time as its threads have elements.
struct BnPoolTiling {
  int group_size, group_rows, group_pooled_rows;
  int unit, units_at_once;
  int means;  // of a unit
  int blocks;
  int64_t units, base, extra;
  Divider by_pooled_rows, by_pooled_width;

  FT_HD int64_t first_unit(int64_t block) const { return block * base + (block < extra ? block : extra); }
};

// A thread's vectors of 8 elements that are under way together: 32 bytes of x and as many of the residual.
constexpr int bn_pool_vectors(int element_bytes) { return element_bytes == 2 ? 2 : 1; }

// Of smaller planes a block would have the parameters of more channels than there is room for.
constexpr int kBnPoolLeastPlane = 2 * kBnColumns;

// Returns whether there is one: a block can have a unit.
inline bool bn_pool_tile(const BnShape& s, const BnWindows& w, int element_bytes, int64_t most, BnPoolTiling* t) {
  const int64_t elements = s.rows * s.cols, at_once = kBnThreads * kBnColumns * bn_pool_vectors(element_bytes);
  const bool pairs = w.height % 2 == 0;
  const int64_t group = (pairs ? 2 : w.height) * w.width, unit = std::lcm(group, int64_t{kBnColumns});
  if (s.inner < kBnPoolLeastPlane || elements % kBnColumns || unit > at_once) return false;
  t->group_size = int(group);
  t->group_rows = pairs ? 2 : int(w.height);
  t->group_pooled_rows = pairs ? 1 : int(w.pooled_height);
  t->unit = int(unit);
  t->units_at_once = int(at_once / unit);
  t->means = int(unit / group * t->group_pooled_rows * w.pooled_width);
  t->units = elements / unit;
  t->blocks = int(std::clamp<int64_t>(ceil_div(t->units, t->units_at_once), 1, most));
  t->base = t->units / t->blocks;
  t->extra = t->units % t->blocks;
  t->by_pooled_rows = Divider(t->group_pooled_rows);
  t->by_pooled_width = Divider(w.pooled_width);
  return true;
}

}  // namespace fasttricks::cuda

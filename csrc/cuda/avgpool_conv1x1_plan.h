// Launch plan of avgpool_conv1x1: plain host arithmetic, shared by launchers and tests.
//
// Three products over the output's pixels q = (n, i, j), of which there are N * Ho * Wo; p is the pooled x:
//   forward   y[q][o]  = sum over c of p[q][c] * W[o][c]         rows q, columns o, depth C
//   input     dp[q][c] = sum over o of dy[q][o] * W[o][c]        rows q, columns c, depth Cout; spread over the windows
//   weight    dW[o][c] = sum over q of dy[q][o] * p[q][c]        rows o, columns c, depth q, in `splits` parts
// A block computes a tile of rows x columns. Blocks that share rows are neighbours in the grid, so that x or
// dy is still in the L2 cache when they read it again.
#pragma once

#include <algorithm>
#include <cstdint>

#include "math/avgpool.h"

namespace fasttricks::cuda {

constexpr int kAvgPoolThreads = 256;

// The tile of a block, rows x columns x depth: 16-bit types use the tensor cores, the others the general ones.
template <int kBytes>  // of an element
struct AvgPoolTile {
  static constexpr int kM = 64, kN = kBytes == 2 ? 128 : 64, kK = kBytes == 2 ? 32 : 16;
  static constexpr int kVector = 16 / kBytes;  // elements of one access
};

// The output's pixels of one launch fit 31 bits, so that divisions are short; offsets of elements are computed in 64.
struct AvgPoolShape {
  int n, c, h, w, o, ho, wo, stride;
  Divider by_wo, by_ho;

  AvgPoolShape(int n, int c, int h, int w, int o, int ho, int wo, int stride)
      : n(n), c(c), h(h), w(w), o(o), ho(ho), wo(wo), stride(stride), by_wo(wo), by_ho(ho) {}
  FT_HD int plane() const { return ho * wo; }
  FT_HD int pixels() const { return n * ho * wo; }
};
#ifndef FT_AVGPOOL_MAX_PIXELS  // a test has fewer, so that small tensors take several launches
#define FT_AVGPOOL_MAX_PIXELS ((int64_t{1} << 31) - 256)
#endif
constexpr int64_t kAvgPoolMaxPixels = FT_AVGPOOL_MAX_PIXELS;

// How many images one launch takes.
inline int64_t avgpool_images(int64_t ho, int64_t wo) { return std::max<int64_t>(1, kAvgPoolMaxPixels / (ho * wo)); }

enum class AvgPoolProduct { kForward, kInput, kWeight };

struct AvgPoolPlan {
  int tiles_m, tiles_n, depth;
  int depth_per_split;  // a multiple of the tile's depth
  int splits;           // more than 1 only for the weight's product
};

inline AvgPoolPlan avgpool_plan(const AvgPoolShape& s, AvgPoolProduct product, int bytes, int sm_count) {
  const bool forward = product == AvgPoolProduct::kForward, weight = product == AvgPoolProduct::kWeight;
  const int64_t narrow = AvgPoolTile<2>::kM, broad = bytes == 2 ? AvgPoolTile<2>::kN : AvgPoolTile<4>::kN;
  const int64_t rows = weight ? broad : narrow, columns = weight ? narrow : broad;
  const int64_t step = bytes == 2 ? AvgPoolTile<2>::kK : AvgPoolTile<4>::kK;
  const int64_t m = ceil_div(weight ? s.o : s.pixels(), rows), n = ceil_div(forward ? s.o : s.c, columns);
  const int64_t depth = forward ? s.c : weight ? s.pixels() : s.o;
  // two blocks per multiprocessor, and at least eight steps per part
  const int64_t wanted_splits = weight ? std::clamp<int64_t>(2 * sm_count / (m * n), 1, ceil_div(depth, 8 * step)) : 1;
  const int64_t each = ceil_div(ceil_div(depth, wanted_splits), step) * step;
  return {int(m), int(n), int(depth), int(each), int(ceil_div(depth, each))};
}

// The forward product of 16-bit types if a block can keep its pooled rows, with all channels, in shared memory and
// compute a group of column tiles: x is read `groups` times instead of once per tile.
struct AvgPoolSlabPlan {
  int tiles_m, tiles_n, tiles_per_group;
  int groups;  // 0: the rows do not fit
  int shared_bytes;
};

inline AvgPoolSlabPlan avgpool_slab_plan(const AvgPoolShape& s, int sm_count, int shared_per_sm, int shared_per_block) {
  using Tile = AvgPoolTile<2>;
  const int64_t m = ceil_div(s.pixels(), Tile::kM), n = ceil_div(s.o, Tile::kN);
  // the slab, and two tiles of the weight or one of the result
  const int64_t bytes = (ceil_div(s.c, Tile::kK) * Tile::kM + 2 * Tile::kN) * Tile::kK * 2;
  AvgPoolSlabPlan plan{int(m), int(n), 1, 0, int(std::min<int64_t>(bytes, shared_per_block))};
  if (bytes > shared_per_block) return plan;
  // the fewest groups that give every multiprocessor twice as many blocks as it holds at a time
  const int64_t resident = std::clamp<int64_t>(shared_per_sm / (bytes + 1024), 1, 4);
  const int64_t wanted_groups = std::clamp<int64_t>(ceil_div(2 * resident * sm_count, m), 1, n);
  plan.tiles_per_group = int(ceil_div(n, wanted_groups));
  if (plan.tiles_per_group > 1) plan.groups = int(ceil_div(n, plan.tiles_per_group));
  return plan;
}

// Partial sums of the bias's gradient: ranges of the pixels.
inline int64_t avgpool_bias_splits(const AvgPoolShape& s, int sm_count) {
  return std::clamp<int64_t>(int64_t(sm_count) * 256 / s.o, 1, std::max(1, s.pixels() / 64));
}

}  // namespace fasttricks::cuda

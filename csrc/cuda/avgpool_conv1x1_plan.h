// Launch plan of avgpool_conv1x1: plain host arithmetic, shared by launchers and tests.
//
// Three products over the output's pixels q = (n, i, j), of which there are N * Ho * Wo; p is the pooled x:
//   forward   y[q][o]  = sum over c of p[q][c] * W[o][c]         rows q, columns o, depth C
//   input     dp[q][c] = sum over o of dy[q][o] * W[o][c]        rows q, columns c, depth Cout; spread over the windows
//   weight    dW[o][c] = sum over q of dy[q][o] * p[q][c]        rows o, columns c, depth q, in `splits` parts
// A block computes a tile of rows x columns. Blocks that share rows are neighbours in the grid, so that what they read
// again of x or dy is still in the L2 cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "math/pool.h"

namespace fasttricks::cuda {

constexpr int kPoolThreads = 256;

// The tile of a block, rows x columns x depth: 16-bit types on the tensor cores, the others on the general ones.
template <int kBytes>  // of an element
struct PoolTile {
  static constexpr int kM = 64, kN = kBytes == 2 ? 128 : 64, kK = kBytes == 2 ? 32 : 16;
  static constexpr int kVector = 16 / kBytes;  // elements of one access
};

// The output's pixels of one launch fit 31 bits, so that divisions are short; offsets of elements are computed in 64.
struct PoolShape {
  int n, c, h, w, o, ho, wo, stride;

  FT_HD int plane() const { return ho * wo; }
  FT_HD int pixels() const { return n * ho * wo; }
};
#ifndef FT_POOL_MAX_PIXELS  // a test has fewer, so that small tensors take several launches
#define FT_POOL_MAX_PIXELS ((int64_t{1} << 31) - 256)
#endif
constexpr int64_t kPoolMaxPixels = FT_POOL_MAX_PIXELS;

// How many images one launch takes.
inline int64_t pool_images(int64_t ho, int64_t wo) { return std::max<int64_t>(1, kPoolMaxPixels / (ho * wo)); }

enum class PoolProduct { kForward, kInput, kWeight };

struct PoolPlan {
  int tiles_m, tiles_n, depth;
  int depth_per_split;  // a multiple of the tile's depth
  int splits;           // more than 1 of the weight's product only
};

inline PoolPlan pool_plan(const PoolShape& s, PoolProduct product, int bytes, int sm_count) {
  const bool forward = product == PoolProduct::kForward, weight = product == PoolProduct::kWeight;
  const int64_t narrow = PoolTile<2>::kM, broad = bytes == 2 ? PoolTile<2>::kN : PoolTile<4>::kN;
  const int64_t rows = weight ? broad : narrow, columns = weight ? narrow : broad;
  const int64_t step = bytes == 2 ? PoolTile<2>::kK : PoolTile<4>::kK;
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t m = up(weight ? s.o : s.pixels(), rows), n = up(forward ? s.o : s.c, columns);
  const int64_t depth = forward ? s.c : weight ? s.pixels() : s.o;
  // two blocks a multiprocessor, and no part of less than eight steps
  const int64_t wish = weight ? std::clamp<int64_t>(2 * sm_count / (m * n), 1, up(depth, 8 * step)) : 1;
  const int64_t each = up(up(depth, wish), step) * step;
  return {int(m), int(n), int(depth), int(each), int(up(depth, each))};
}

// The forward product of 16-bit types where a block keeps its pooled rows, of all channels, in shared memory and goes
// through a group of the tiles of columns: x is read `groups` times, not once for each tile.
struct PoolSlabPlan {
  int tiles_m, tiles_n, tiles_per_group;
  int groups;  // 0: not this way
  int shared_bytes;
};

inline PoolSlabPlan pool_slab_plan(const PoolShape& s, int sm_count, int shared_per_sm, int shared_per_block) {
  using Tile = PoolTile<2>;
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t m = up(s.pixels(), Tile::kM), n = up(s.o, Tile::kN);
  // the slab, and two tiles of the weight, or one of the result
  const int64_t bytes = (up(s.c, Tile::kK) * Tile::kM + 2 * Tile::kN) * Tile::kK * 2;
  PoolSlabPlan plan{int(m), int(n), 1, 0, int(std::min<int64_t>(bytes, shared_per_block))};
  if (bytes > shared_per_block) return plan;
  // as few groups as give every multiprocessor twice the blocks that it holds at a time
  const int64_t resident = std::clamp<int64_t>(shared_per_sm / (bytes + 1024), 1, 4);
  const int64_t wish = std::clamp<int64_t>(up(2 * resident * sm_count, m), 1, n);
  plan.tiles_per_group = int(up(n, wish));
  if (plan.tiles_per_group > 1) plan.groups = int(up(n, plan.tiles_per_group));
  return plan;
}

// Partial sums of the bias's gradient: ranges of the pixels.
inline int64_t pool_bias_splits(const PoolShape& s, int sm_count) {
  return std::clamp<int64_t>(int64_t(sm_count) * 256 / s.o, 1, std::max(1, s.pixels() / 64));
}

}  // namespace fasttricks::cuda

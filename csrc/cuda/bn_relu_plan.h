// Launch plan of bn_relu: plain host arithmetic, shared by launchers and tests.
//
// Both layouts are one matrix x[rows][cols] whose column j belongs to channel j / inner:
//   NHWC: rows = N*H*W, cols = C,     inner = 1
//   NCHW: rows = N,     cols = C*H*W, inner = H*W
// A block owns a tile of 8*tx columns and a range of rows; a thread owns 8 neighbouring columns (16 bytes at 16 bit)
// and every ty-th row. If rows do not start at multiples of 8 elements, the elementwise kernels treat the tensor as one
// row ("flat"), in which the channels repeat.
#pragma once

#include <algorithm>
#include <cstdint>

#include "math/common.h"

namespace fasttricks::cuda {

constexpr int kBnThreads = 256;
constexpr int kBnColumns = 8;                                          // of a thread
constexpr int kBnMaxTile = 512;                                        // columns of a block, so channels of a block too
constexpr int kBnChunk = 4;                                            // rows that a thread loads before it computes
constexpr int kBnSlabStatic = 2 * kBnThreads * kBnColumns * 4 + 1024;  // static bytes of the one-launch kernels

struct BnShape {
  int64_t rows, cols, inner;
  int channels;
};

struct BnTiling {
  int tx_log2;
  int64_t tiles;
  int64_t rows_per_split;
  int splits;
  int slots;  // most channels that one tile touches

  FT_HD int tx() const { return 1 << tx_log2; }
  FT_HD int ty() const { return kBnThreads >> tx_log2; }
  FT_HD int width() const { return kBnColumns << tx_log2; }
};

inline BnShape bn_shape(int64_t n, int channels, int64_t hw, bool channels_last) {
  if (channels_last || hw == 1) return {n * hw, channels, 1, channels};
  return {n, channels * hw, hw, channels};
}
// The same elements as one row.
inline BnShape bn_flat(const BnShape& s) { return {1, s.rows * s.cols, s.inner, s.channels}; }

inline bool bn_vectors_fit(const BnShape& s) { return s.cols % kBnColumns == 0; }

// At most max_blocks blocks if the columns allow it; each has at least one chunk of rows per thread, and min_rows.
inline BnTiling bn_tile(const BnShape& s, int64_t max_blocks, int64_t min_rows = 1) {
  BnTiling t{};
  const int64_t units = ceil_div(s.cols, kBnColumns), widest = s.inner == 1 && s.rows > 1 ? 32 : 64;
  while (t.tx() < std::min(units, widest)) ++t.tx_log2;
  t.tiles = ceil_div(units, t.tx());
  const int64_t by_work = ceil_div(s.rows, std::max(min_rows, int64_t(kBnChunk) * t.ty()));
  const int64_t splits = std::clamp<int64_t>(max_blocks / t.tiles, 1, std::min<int64_t>(by_work, 4096));
  t.rows_per_split = ceil_div(s.rows, splits);
  t.splits = int(ceil_div(s.rows, t.rows_per_split));
  t.slots = int(s.inner == 1 ? t.width() : (t.width() - 1) / s.inner + 2);
  return t;
}

// Two numbers per channel, tile and range of rows.
inline int64_t bn_partial_count(const BnTiling& t) { return int64_t(t.splits) * t.tiles * t.slots * 2; }

// Reductions want enough blocks to fill the card and few partial results; elementwise passes want many blocks.
// In NHWC each block reads the parameters of all its columns: with 128 rows, a twentieth of what it reads of a tensor.
inline int64_t bn_min_rows(const BnShape& s) { return s.inner == 1 ? 128 : 1; }
inline BnTiling bn_reduction_tiling(const BnShape& s, int sm_count) {
  return bn_tile(s, int64_t(sm_count) * 4, bn_min_rows(s));
}
inline BnTiling bn_elementwise_tiling(const BnShape& s, int sm_count) {
  return bn_tile(s, int64_t(sm_count) * 16, bn_min_rows(s));
}

// The one-launch variant, which keeps each block's part of `arrays` tensors in shared memory: possible if all
// blocks fit on the card together. static_bytes: the kernel's static shared memory.
struct BnSlabPlan {
  BnTiling tiling;
  int kept_rows;  // of a thread
  int64_t bytes;  // dynamic, of a block
};

inline BnSlabPlan bn_slab_plan(const BnShape& s, int64_t max_blocks, int element_bytes, int arrays) {
  const BnTiling t = bn_tile(s, max_blocks);
  const int64_t rows = ceil_div(t.rows_per_split, t.ty());
  return {t, int(rows), rows * kBnColumns * element_bytes * arrays * kBnThreads};
}

}  // namespace fasttricks::cuda

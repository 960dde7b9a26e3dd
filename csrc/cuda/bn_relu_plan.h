// Launch plan of bn_relu: plain host arithmetic, shared by launchers and tests.
//
// Both layouts are one matrix x[rows][cols] whose column j belongs to channel j / inner:
//   NHWC: rows = N*H*W, cols = C,     inner = 1
//   NCHW: rows = N,     cols = C*H*W, inner = H*W
// A tile has 8*tx columns; a thread owns 8 neighbouring ones (16 bytes at 16 bit) and every ty-th row. If rows do not
// start at multiples of 8 elements, the elementwise kernels treat the tensor as one row ("flat"), in which the channels
// repeat.
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
  LongDivider by_inner, by_channels;

  BnShape(int64_t rows, int64_t cols, int64_t inner, int channels)
      : rows(rows),
        cols(cols),
        inner(inner),
        channels(channels),
        by_inner(std::max<int64_t>(1, inner)),
        by_channels(std::max(1, channels)) {}  // 1: of an empty tensor
};

// The matrix is cut into tiles of columns, and each tile into units of ty rows, one row per thread. Block b has the
// units from first_unit(b) to first_unit(b + 1), counted tile after tile: its share of all units, whatever the number
// of tiles. Where it crosses from one tile to the next, it goes on with the next one's parameters and sums.
struct BnTiling {
  int tx_log2;
  int slots;             // most channels that one tile touches
  int blocks;            // no more than units
  int parts;             // most blocks that share a tile
  int64_t tiles, units;  // units of a tile
  int64_t base, extra;   // units of a block, and how many blocks have one more
  LongDivider by_units, by_base, by_longer, by_parts;

  FT_HD int tx() const { return 1 << tx_log2; }
  FT_HD int ty() const { return kBnThreads >> tx_log2; }
  FT_HD int width() const { return kBnColumns << tx_log2; }
  FT_HD int64_t first_unit(int64_t block) const { return block * base + (block < extra ? block : extra); }
  FT_HD int64_t block_of(int64_t unit) const {
    const int64_t longer = extra * (base + 1);
    return unit < longer ? by_longer.divide(unit) : extra + by_base.divide(unit - longer);
  }
};

inline BnShape bn_shape(int64_t n, int channels, int64_t hw, bool channels_last) {
  if (channels_last || hw == 1) return {n * hw, channels, 1, channels};
  return {n, channels * hw, hw, channels};
}
// The same elements as one row.
inline BnShape bn_flat(const BnShape& s) { return {1, s.rows * s.cols, s.inner, s.channels}; }

inline bool bn_vectors_fit(const BnShape& s) { return s.cols % kBnColumns == 0; }

// At most `most` blocks, with at least two units each where there are several: as many as are resident on the card
// together make one full wave.
inline BnTiling bn_tile(const BnShape& s, int64_t most) {
  BnTiling t{};
  const int64_t columns = ceil_div(s.cols, kBnColumns), widest = s.inner == 1 && s.rows > 1 ? 32 : 64;
  while (t.tx() < std::min(columns, widest)) ++t.tx_log2;
  t.tiles = ceil_div(columns, t.tx());
  t.units = ceil_div(s.rows, t.ty());
  const int64_t all = t.tiles * t.units;
  t.blocks = int(std::clamp<int64_t>(all / 2, 1, most));
  t.base = all / t.blocks;
  t.extra = all % t.blocks;
  t.parts = int(std::min<int64_t>(t.blocks, (t.units + t.base - 2) / t.base + 1));
  t.slots = int(s.inner == 1 ? t.width() : (t.width() - 1) / s.inner + 2);
  t.by_units = LongDivider(t.units);
  t.by_base = LongDivider(t.base);
  t.by_longer = LongDivider(t.base + 1);
  t.by_parts = LongDivider(t.parts);
  return t;
}

// Two numbers per channel, tile, and block that shares it.
inline int64_t bn_partial_count(const BnTiling& t) { return t.tiles * t.parts * t.slots * 2; }
// What any reduction of the tensor needs: no multiprocessor has more blocks of kBnThreads.
inline int64_t bn_most_partials(const BnShape& s, int sm_count) {
  return bn_partial_count(bn_tile(s, int64_t(sm_count) * (2048 / kBnThreads)));
}

// The one-launch variant: all blocks are on the card together, and each thread keeps its first rows of `arrays` tensors
// in `room` bytes of shared memory per block.
struct BnSlabPlan {
  BnTiling tiling;
  int64_t rows;   // of a thread, at most
  int kept_rows;  // of these
  int64_t bytes;  // dynamic, of a block
};

inline BnSlabPlan bn_slab_plan(const BnShape& s, int64_t max_blocks, int element_bytes, int arrays, int64_t room) {
  const BnTiling t = bn_tile(s, max_blocks);
  const int64_t rows = t.base + (t.extra > 0), row_bytes = int64_t(kBnThreads) * kBnColumns * element_bytes * arrays;
  const int64_t kept = std::clamp<int64_t>(room / row_bytes, 0, rows);
  return {t, rows, int(kept), kept * row_bytes};
}

// Whether one launch that keeps a part is taken. It saves the bytes of that part and two launches; it has 32 KB of
// loads per multiprocessor in flight, where three launches have 48 to 64 KB. By Little's law, at 700 ns, an H100 needs
// 18 KB (3.35 TB/s, 132 multiprocessors), so that both stream at full speed; a B200 needs 38 KB (8 TB/s, 148). Below a
// 32nd of the tensors the saving is at most 1.3% of a pass, less than what this estimate is good for. Predicted: no
// card has run it.
inline bool bn_slab_saves(const BnSlabPlan& plan) { return plan.kept_rows * int64_t{32} >= plan.rows; }

}  // namespace fasttricks::cuda

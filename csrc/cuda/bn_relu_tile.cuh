// What the kernels of bn_relu share: a block's tile of the matrix, its channels' parameters, reductions to channels.
#pragma once

#include "bn_relu_plan.h"
#include "intrinsics.cuh"
#include "math/bn.h"
#include "math/welford.h"

namespace fasttricks::cuda {

// Rows that a thread loads before it computes.
template <typename T>
constexpr int kBnChunkOf = sizeof(T) == 8 ? 2 : kBnChunk;
// Blocks of a kernel that should be resident on an SM together, which caps its registers; kHalf: for the vectorised
// kernels of 16-bit types.
template <typename T, bool kVector, int kHalf>
constexpr int kBnBlocksOf = sizeof(T) == 8   ? 1
                            : !kVector       ? 2
                            : sizeof(T) == 4 ? 2
                                             : kHalf;

// The parameters of all channels; weight and bias may be null (1 and 0).
template <typename A>
struct BnParams {
  const A* mean;
  const A* var;
  const void* weight;
  const void* bias;
  ElementType weight_type, bias_type;
  A eps;
};

template <typename A>
FT_DEVICE A load_param(const void* p, ElementType type, int64_t c) {
  switch (type) {
    case ElementType::kDouble:
      return A(load(static_cast<const double*>(p) + c));
    case ElementType::kHalf:
      return A(load(static_cast<const Half*>(p) + c));
    case ElementType::kBFloat16:
      return A(load(static_cast<const BFloat16*>(p) + c));
    default:
      return A(load(static_cast<const float*>(p) + c));
  }
}

template <typename A>
FT_DEVICE A normalized(A x, A mean, A scale, A bias) {
  return fma(x - mean, scale, bias);
}
// NaN stays NaN, as in torch.
template <typename T>
FT_DEVICE T relu(T v) {
  return acc_t<T>(v) <= acc_t<T>(0) ? T(0) : v;
}
// Whether the gradient passes where the output is v.
template <typename T>
FT_DEVICE bool passes(T v) {
  return !(acc_t<T>(v) <= acc_t<T>(0));
}
// bn_relu's mask, recomputed from x with the forward's arithmetic and rounding.
template <typename T, typename A>
FT_DEVICE unsigned passing(const T (&x)[kBnColumns], const A (&mean)[kBnColumns], const A (&scale)[kBnColumns],
                           const A (&bias)[kBnColumns]) {
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < kBnColumns; ++j)
    bits |= unsigned(passes(T(normalized(A(x[j]), mean[j], scale[j], bias[j])))) << j;
  return bits;
}

// Mean and M2 of each of a thread's columns over its rows: exact two-pass within a chunk, Chan's merge between chunks.
template <typename A>
struct ColumnMoments {
  A count = 0;
  A mean[kBnColumns] = {}, m2[kBnColumns] = {};

  template <typename T, int kRows>
  FT_DEVICE void add(const T (&v)[kRows][kBnColumns]) {
    const MergeFactors<A> factors = merge_factors(count, A(kRows));
#pragma unroll
    for (int j = 0; j < kBnColumns; ++j) {
      A m = 0, q = 0;
#pragma unroll
      for (int u = 0; u < kRows; ++u) m += A(v[u][j]);
      m *= A(1) / A(kRows);
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const A d = A(v[u][j]) - m;
        q = fma(d, d, q);
      }
      merge_into(mean[j], m2[j], m, q, factors);
    }
    count = factors.count;
  }
};

// Combines parts 0 .. count-1, which `part` yields, over kLanes lanes: means about the first part's, then M2 about the
// mean. Every lane gets the result.
template <int kLanes, typename A, typename Part>
FT_DEVICE Moments<A> combine_moments(int parts, int lane, Part part) {
  A origin = lane == 0 ? part(0).mean : A(0);
  if constexpr (kLanes > 1) origin = __shfl_sync(kAllLanes, origin, 0);
  A n = 0, sum = 0;
  for (int i = lane; i < parts; i += kLanes) {
    const Moments<A> p = part(i);
    n += p.count;
    sum = fma(p.count, p.mean - origin, sum);
  }
  n = sum_over_lanes<kLanes>(n);
  const A mean = origin + sum_over_lanes<kLanes>(sum) / n;
  A m2 = 0;
  for (int i = lane; i < parts; i += kLanes) {
    const Moments<A> p = part(i);
    const A d = p.mean - mean;
    m2 += fma(p.count * d, d, p.m2);
  }
  return {n, mean, sum_over_lanes<kLanes>(m2)};
}

// The tile and rows of this block, the columns of this thread.
struct BnTile {
  const BnShape& s;
  const BnTiling& t;
  int x, y;            // of the thread: unit of columns, first row
  int64_t col0, col1;  // of the tile
  int64_t col;         // the thread's first column
  int valid;           // how many of its columns exist
  int64_t r0, r1;      // rows of the block
  int64_t channel0;    // of the tile's first column, before it wraps (flat)
  int used;            // channels of the tile

  FT_DEVICE BnTile(const BnShape& s, const BnTiling& t) : s(s), t(t) {
    x = int(threadIdx.x) & (t.tx() - 1);
    y = int(threadIdx.x) >> t.tx_log2;
    col0 = int64_t(blockIdx.x) * t.width();
    col1 = col0 + t.width() < s.cols ? col0 + t.width() : s.cols;
    col = col0 + x * kBnColumns;
    valid = col >= s.cols ? 0 : s.cols - col < kBnColumns ? int(s.cols - col) : kBnColumns;
    r0 = int64_t(blockIdx.y) * t.rows_per_split;
    r1 = r0 + t.rows_per_split < s.rows ? r0 + t.rows_per_split : s.rows;
    channel0 = s.inner == 1 ? col0 : col0 / s.inner;
    used = int((s.inner == 1 ? col1 - 1 : (col1 - 1) / s.inner) - channel0) + 1;
  }

  // body(row, rows): the thread's rows row, row + ty, ..., as many as the integral constant says.
  template <int kRows, typename Body>
  FT_DEVICE void for_rows(Body body) const {
    if (!valid) return;
    int64_t r = r0 + y;
    if constexpr (kRows > 1)
      for (; r + int64_t(kRows - 1) * t.ty() < r1; r += int64_t(kRows) * t.ty())
        body(r, std::integral_constant<int, kRows>());
    for (; r < r1; r += t.ty()) body(r, std::integral_constant<int, 1>());
  }
  // The number of rows of the threads in line y.
  FT_DEVICE int64_t rows_of(int line) const { return r1 - r0 > line ? (r1 - r0 - line - 1) / t.ty() + 1 : 0; }

  // Offset of the thread's first column, in elements.
  FT_DEVICE int64_t offset(int64_t row) const { return row * s.cols + col; }
  // Zeros where `needed` is false.
  template <bool kVector, typename T>
  FT_DEVICE void load(const T* p, int64_t row, T (&v)[kBnColumns], bool needed = true) const {
    p += offset(row);
    if (kVector && needed) {
      cuda::load(p, v);
    } else {
#pragma unroll
      for (int j = 0; j < kBnColumns; ++j) v[j] = needed && j < valid ? cuda::load(p + j) : T(0);
    }
  }
  template <bool kVector, typename T>
  FT_DEVICE void store(T* p, int64_t row, const T (&v)[kBnColumns]) const {
    p += offset(row);
    if constexpr (kVector) {
      cuda::store(p, v);
    } else {
#pragma unroll
      for (int j = 0; j < kBnColumns; ++j)
        if (j < valid) cuda::store(p + j, v[j]);
    }
  }
  // The mask's bits of the thread's columns, in memory order: in one byte if rows start at bytes, else in one or two.
  template <bool kVector>
  FT_DEVICE unsigned load_bits(const uint8_t* mask, int64_t row) const {
    const int64_t e = offset(row);
    if constexpr (kVector) return cuda::load(mask + e / 8);
    unsigned bits = cuda::load(mask + e / 8);
    if (int(e % 8) + valid > 8) bits |= unsigned(cuda::load(mask + e / 8 + 1)) << 8;
    return bits >> (e % 8);
  }
  // The elementwise kernels' rows always start at bytes (bn_flat); the bits after the last element are 0.
  FT_DEVICE void store_bits(uint8_t* mask, int64_t row, unsigned bits) const {
    cuda::store(mask + offset(row) / 8, uint8_t(bits & ((1u << valid) - 1)));
  }

  FT_DEVICE int channel(int slot) const { return int((channel0 + slot) % s.channels); }
  // Slots of the thread's columns.
  template <typename Use>
  FT_DEVICE void for_slots(Use use) const {
    int64_t slot = x * kBnColumns, at = 0;
    if (s.inner != 1) {
      slot = col / s.inner - channel0;
      at = col - (channel0 + slot) * s.inner;
    }
#pragma unroll
    for (int j = 0; j < kBnColumns; ++j) {
      if (j < valid) use(j, int(slot));
      if (++at >= s.inner) {
        at = 0;
        ++slot;
      }
    }
  }

  // The parameters of the thread's columns, through `staged` (3 * kBnMaxTile; free again after the next barrier).
  // Returns whether every scale of the tile is zero and every statistic finite.
  template <typename A>
  FT_DEVICE bool channel_params(const BnParams<A>& p, A* staged, A (&mean)[kBnColumns], A (&scale)[kBnColumns],
                                A (&bias)[kBnColumns]) const {
    bool live = false;
    for (int k = int(threadIdx.x); k < used; k += kBnThreads) {
      const int c = channel(k);
      const A m = cuda::load(p.mean + c), v = cuda::load(p.var + c);
      const A w = p.weight ? load_param<A>(p.weight, p.weight_type, c) : A(1);
      staged[k] = m;
      staged[kBnMaxTile + k] = w * bn_rstd(v, p.eps);
      staged[2 * kBnMaxTile + k] = p.bias ? load_param<A>(p.bias, p.bias_type, c) : A(0);
      live |= staged[kBnMaxTile + k] != A(0) || !isfinite(m) || !isfinite(v);
    }
    live = __syncthreads_or(live);
    for_slots([&](int j, int slot) {
      mean[j] = staged[slot];
      scale[j] = staged[kBnMaxTile + slot];
      bias[j] = staged[2 * kBnMaxTile + slot];
    });
    return !live;
  }

  // As channel_params, with the shift and slope of bn_backward_factors; `staged` has 5 * kBnMaxTile values.
  template <typename A>
  FT_DEVICE bool gradient_params(const BnParams<A>& p, const A* dweight, const A* dbias, A inv_count, A* staged,
                                 A (&mean)[kBnColumns], A (&scale)[kBnColumns], A (&bias)[kBnColumns],
                                 A (&shift)[kBnColumns], A (&slope)[kBnColumns]) const {
    bool infinite = false;
    A* extra = staged + 3 * kBnMaxTile;
    for (int k = int(threadIdx.x); k < used; k += kBnThreads) {
      const int c = channel(k);
      const A dw = cuda::load(dweight + c), db = cuda::load(dbias + c);
      const BnBackward<A> factors = bn_backward_factors(A(1), bn_rstd(cuda::load(p.var + c), p.eps), dw, db, inv_count);
      extra[k] = factors.shift;
      extra[kBnMaxTile + k] = factors.slope;
      infinite |= !isfinite(dw) || !isfinite(db);
    }
    infinite = __syncthreads_or(infinite);
    const bool zero = channel_params(p, staged, mean, scale, bias);
    for_slots([&](int j, int slot) {
      shift[j] = extra[slot];
      slope[j] = extra[kBnMaxTile + slot];
    });
    return zero && !infinite;
  }

  // Index of this block's partial result for a channel of its tile.
  FT_DEVICE int64_t partial_slot(int k) const {
    return (int64_t(blockIdx.y) * t.tiles + int64_t(blockIdx.x)) * t.slots + k;
  }
  // Calls use(slot, lanes) for the channels of the tile: a warp per channel if it has many columns or lines, else a
  // thread.
  template <typename Use>
  FT_DEVICE void for_channels(Use use) const {
    if (s.inner >= 32 || t.ty() >= 32)
      for (int k = int(threadIdx.x) / 32; k < used; k += kBnThreads / 32) use(k, std::integral_constant<int, 32>());
    else
      for (int k = int(threadIdx.x); k < used; k += kBnThreads) use(k, std::integral_constant<int, 1>());
  }
  // The columns of slot k, counted from the tile's first.
  FT_DEVICE int first_column(int k) const {
    const int64_t c = (channel0 + k) * s.inner;
    return c > col0 ? int(c - col0) : 0;
  }
  FT_DEVICE int last_column(int k) const {
    const int64_t c = (channel0 + k + 1) * s.inner;
    return int((c < col1 ? c : col1) - col0);
  }

  // Calls write(slot, mean, M2) for each channel of the tile.
  template <typename A, typename Write>
  FT_DEVICE void moments_per_channel(const ColumnMoments<A>& own, A* means, A* m2s, Write write) const {
#pragma unroll
    for (int j = 0; j < kBnColumns; ++j) {
      means[y * t.width() + x * kBnColumns + j] = own.mean[j];
      m2s[y * t.width() + x * kBnColumns + j] = own.m2[j];
    }
    __syncthreads();
    for_channels([&](int k, auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      const int lane = int(threadIdx.x) % kLanes, first = first_column(k), columns = last_column(k) - first;
      const Moments<A> m = combine_moments<kLanes, A>(columns * t.ty(), lane, [&](int i) {
        const int line = i / columns, at = line * t.width() + first + i % columns;
        return Moments<A>{A(rows_of(line)), means[at], m2s[at]};
      });
      if (lane == 0) write(partial_slot(k), m.mean, m.m2);
    });
  }
  // write(slot, a, b): sums over each channel of the tile. The arrays may still be read as parameters by other threads.
  template <typename A, typename Write>
  FT_DEVICE void sums_per_channel(const A (&a)[kBnColumns], const A (&b)[kBnColumns], A* first_sums, A* second_sums,
                                  Write write) const {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kBnColumns; ++j) {
      first_sums[y * t.width() + x * kBnColumns + j] = a[j];
      second_sums[y * t.width() + x * kBnColumns + j] = b[j];
    }
    __syncthreads();
    for_channels([&](int k, auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      const int lane = int(threadIdx.x) % kLanes, first = first_column(k), columns = last_column(k) - first;
      A sum_a = 0, sum_b = 0;
      for (int i = lane; i < columns * t.ty(); i += kLanes) {
        const int at = i / columns * t.width() + first + i % columns;
        sum_a += first_sums[at];
        sum_b += second_sums[at];
      }
      sum_a = sum_over_lanes<kLanes>(sum_a);
      sum_b = sum_over_lanes<kLanes>(sum_b);
      if (lane == 0) write(partial_slot(k), sum_a, sum_b);
    });
  }
};

// The partial results of one channel: from every range of rows, from every tile that has columns of it.
struct ChannelParts {
  const BnShape& s;
  const BnTiling& t;
  int c;
  int64_t first_tile;
  int tiles, first_slot;

  FT_DEVICE ChannelParts(const BnShape& s, const BnTiling& t, int c) : s(s), t(t), c(c) {
    first_tile = c * s.inner / t.width();
    tiles = int(((c + 1) * s.inner - 1) / t.width() - first_tile) + 1;
    first_slot = int(c - first_tile * t.width() / s.inner);
  }
  FT_DEVICE int count() const { return t.splits * tiles; }
  // Tiles after the channel's first one begin in it.
  FT_DEVICE int64_t slot(int i) const {
    const int split = i / tiles, tile = i - split * tiles;
    return (split * t.tiles + first_tile + tile) * t.slots + (tile == 0 ? first_slot : 0);
  }
  FT_DEVICE int64_t elements(int i) const {
    const int split = i / tiles;
    const int64_t r0 = split * t.rows_per_split, col0 = (first_tile + i - split * tiles) * t.width();
    const int64_t rows = r0 + t.rows_per_split < s.rows ? t.rows_per_split : s.rows - r0;
    const int64_t from = c * s.inner > col0 ? c * s.inner : col0;
    const int64_t to = (c + 1) * s.inner < col0 + t.width() ? (c + 1) * s.inner : col0 + t.width();
    return rows * (to - from);
  }
};

template <typename A>
FT_DEVICE void finalize_moments(const A* partial, const BnShape& s, const BnTiling& t, int c, int lane, A* mean,
                                A* var) {
  const ChannelParts parts(s, t, c);
  const Moments<A> m = combine_moments<32, A>(parts.count(), lane, [&](int i) {
    const int64_t at = 2 * parts.slot(i);
    return Moments<A>{A(parts.elements(i)), load_shared_between_blocks(partial + at),
                      load_shared_between_blocks(partial + at + 1)};
  });
  if (lane != 0) return;
  store(mean + c, m.mean);
  store(var + c, m.m2 / m.count);
}

template <typename A>
FT_DEVICE void finalize_sums(const A* partial, const BnShape& s, const BnTiling& t, int c, int lane, const A* var,
                             A eps, A* dweight, A* dbias) {
  const ChannelParts parts(s, t, c);
  A sum_dz = 0, sum_dz_x = 0;
  for (int i = lane; i < parts.count(); i += 32) {
    sum_dz += load_shared_between_blocks(partial + 2 * parts.slot(i));
    sum_dz_x += load_shared_between_blocks(partial + 2 * parts.slot(i) + 1);
  }
  sum_dz = sum_over_lanes<32>(sum_dz);
  sum_dz_x = sum_over_lanes<32>(sum_dz_x);
  if (lane != 0) return;
  store(dbias + c, sum_dz);
  store(dweight + c, sum_dz_x * bn_rstd(load(var + c), eps));
}

}  // namespace fasttricks::cuda

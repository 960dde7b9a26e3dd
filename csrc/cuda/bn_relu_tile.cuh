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

// The backward kernels of bn_relu, which recompute the mask, hold 40 numbers for their columns: of 16-bit types two of
// their blocks with up to eight loads under way have more bytes in flight than three with four.
template <typename T, bool kVector, bool kResidual>
constexpr int kBnGradientChunk = kBnChunkOf<T> / (kVector && !kResidual && sizeof(T) == 2 ? 1 : 2);

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

// Merges the lanes' moments; lane 0 gets the result.
template <typename A>
FT_DEVICE Moments<A> merge_over_lanes(Moments<A> m) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2)
    m = merge(m, Moments<A>{__shfl_xor_sync(kAllLanes, m.count, bit), __shfl_xor_sync(kAllLanes, m.mean, bit),
                            __shfl_xor_sync(kAllLanes, m.m2, bit)});
  return m;
}

// Where the value of a column, or of a channel, lies in shared memory: those of neighbours, and of every eighth one,
// are in different banks.
FT_DEVICE int place(int index) { return index + index / 32; }
constexpr int kBnStaged = kBnMaxTile + kBnMaxTile / 32;  // places of a tile

// The part of a tile that this block has, the columns of this thread. A block goes through several, one after another:
//   for (BnTile tile(s, t); tile.more(); tile.next())
// Everything follows from the tile's number. What is needed after the rows is computed again (`again`): kept, it would
// cost the loop over the rows ten registers.
struct BnTile {
  const BnShape& s;
  const BnTiling& t;
  int tile;
  int x, y;      // of the thread: unit of columns, first row
  bool any;      // whether the block has a part of the tile
  int64_t col;   // the thread's first column
  int valid;     // how many of its columns exist
  int64_t r0;    // first row of the part
  int rows;      // of the part
  int64_t col0;  // of the tile

  FT_DEVICE BnTile(const BnShape& s, const BnTiling& t) : s(s), t(t) {
    tile = int(t.by_units.divide(t.first_unit(blockIdx.x)));
    begin();
  }
  FT_DEVICE bool more() const { return any; }
  // All threads have done with the shared memory of the part before.
  FT_DEVICE void next() {
    __syncthreads();
    tile = hidden(tile) + 1;
    begin();
  }
  FT_DEVICE BnTile again() const {
    BnTile same(*this);
    same.tile = hidden(tile);
    same.begin();
    return same;
  }
  FT_DEVICE void begin() {
    const int block = hidden(int(blockIdx.x));
    const int64_t above = tile * t.units, first = t.first_unit(block) - above, end = t.first_unit(block + 1) - above;
    any = first < end && end > 0;
    const int thread = hidden(int(threadIdx.x));
    x = thread & (t.tx() - 1);
    y = thread >> t.tx_log2;
    col0 = int64_t(tile) * t.width();
    col = col0 + x * kBnColumns;
    valid = col >= s.cols ? 0 : s.cols - col < kBnColumns ? int(s.cols - col) : kBnColumns;
    r0 = first > 0 ? first * t.ty() : 0;
    rows = int((end < t.units ? end * t.ty() : s.rows) - r0);
  }
  FT_DEVICE int64_t col1() const { return col0 + t.width() < s.cols ? col0 + t.width() : s.cols; }
  // Channel of the tile's first column, before it wraps (flat); how many channels the tile touches.
  FT_DEVICE int64_t channel0() const { return s.by_inner.divide(col0); }
  FT_DEVICE int used() const { return int(s.by_inner.divide(col1() - 1) - channel0()) + 1; }

  // body(at, rows): the offset of the thread's columns in a row, and how many rows, as an integral constant; they are
  // step() elements apart.
  template <int kRows, typename Body>
  FT_DEVICE void for_rows(Body body) const {
    if (!valid) return;
    int64_t at = (r0 + y) * s.cols + col;
    int left = (rows - y + t.ty() - 1) >> (8 - t.tx_log2);
    if constexpr (kRows > 1)
      for (; left >= kRows; left -= kRows, at += kRows * step()) body(at, std::integral_constant<int, kRows>());
    for (; left > 0; --left, at += step()) body(at, std::integral_constant<int, 1>());
  }
  FT_DEVICE int64_t step() const { return s.cols << (8 - t.tx_log2); }
  // How many of the part's rows are `line` plus a multiple of 2^log2.
  FT_DEVICE int rows_of(int line, int log2) const { return (rows - line + (1 << log2) - 1) >> log2; }

  // Zeros where `needed` is false.
  template <bool kVector, typename T>
  FT_DEVICE void load(const T* p, int64_t at, T (&v)[kBnColumns], bool needed = true) const {
    p += at;
    if constexpr (kVector) {
      memset(v, 0, sizeof v);
      if (needed) cuda::load(p, v);
    } else {
#pragma unroll
      for (int j = 0; j < kBnColumns; ++j) v[j] = needed && j < valid ? cuda::load(p + j) : T(0);
    }
  }
  template <bool kVector, typename T>
  FT_DEVICE void store(T* p, int64_t at, const T (&v)[kBnColumns]) const {
    p += at;
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
  FT_DEVICE unsigned load_bits(const uint8_t* mask, int64_t e) const {
    if constexpr (kVector) return cuda::load(mask + e / 8);
    unsigned bits = cuda::load(mask + e / 8);
    if (int(e % 8) + valid > 8) bits |= unsigned(cuda::load(mask + e / 8 + 1)) << 8;
    return bits >> (e % 8);
  }
  // The elementwise kernels' rows always start at bytes (bn_flat); the bits after the last element are 0.
  FT_DEVICE void store_bits(uint8_t* mask, int64_t at, unsigned bits) const {
    cuda::store(mask + at / 8, uint8_t(bits & ((1u << valid) - 1)));
  }

  FT_DEVICE int channel(int slot) const { return int(s.by_channels.remainder(channel0() + slot)); }
  // Slots of the thread's columns.
  template <typename Use>
  FT_DEVICE void for_slots(Use use) const {
    int64_t slot = s.by_inner.divide(col), at = col - slot * s.inner;
    slot -= channel0();
#pragma unroll
    for (int j = 0; j < kBnColumns; ++j) {
      if (j < valid) use(j, int(slot));
      if (++at >= s.inner) {
        at = 0;
        ++slot;
      }
    }
  }

  // The parameters of the thread's columns, through `staged` (3 * kBnStaged; free again after the next barrier).
  // Returns whether every scale of the tile is zero and every statistic finite.
  template <typename A>
  FT_DEVICE bool channel_params(const BnParams<A>& p, A* staged, A (&mean)[kBnColumns], A (&scale)[kBnColumns],
                                A (&bias)[kBnColumns]) const {
    bool live = false;
    for (int k = int(threadIdx.x); k < used(); k += kBnThreads) {
      const int c = channel(k);
      const A m = cuda::load(p.mean + c), v = cuda::load(p.var + c);
      const A w = p.weight ? load_param<A>(p.weight, p.weight_type, c) : A(1);
      const A scale = w * bn_rstd(v, p.eps);
      store_shared(staged + place(k), m);
      store_shared(staged + kBnStaged + place(k), scale);
      store_shared(staged + 2 * kBnStaged + place(k), p.bias ? load_param<A>(p.bias, p.bias_type, c) : A(0));
      live |= scale != A(0) || !isfinite(m) || !isfinite(v);
    }
    live = __syncthreads_or(live);
    for_slots([&](int j, int slot) {
      mean[j] = load_shared(staged + place(slot));
      scale[j] = load_shared(staged + kBnStaged + place(slot));
      bias[j] = load_shared(staged + 2 * kBnStaged + place(slot));
    });
    return !live;
  }

  // As channel_params, with the shift and slope of bn_backward_factors; `staged` has 5 * kBnStaged values.
  template <typename A>
  FT_DEVICE bool gradient_params(const BnParams<A>& p, const A* dweight, const A* dbias, A inv_count, A* staged,
                                 A (&mean)[kBnColumns], A (&scale)[kBnColumns], A (&bias)[kBnColumns],
                                 A (&shift)[kBnColumns], A (&slope)[kBnColumns]) const {
    bool infinite = false;
    A* extra = staged + 3 * kBnStaged;
    for (int k = int(threadIdx.x); k < used(); k += kBnThreads) {
      const int c = channel(k);
      const A dw = cuda::load(dweight + c), db = cuda::load(dbias + c);
      const BnBackward<A> factors = bn_backward_factors(A(1), bn_rstd(cuda::load(p.var + c), p.eps), dw, db, inv_count);
      store_shared(extra + place(k), factors.shift);
      store_shared(extra + kBnStaged + place(k), factors.slope);
      infinite |= !isfinite(dw) || !isfinite(db);
    }
    infinite = __syncthreads_or(infinite);
    const bool zero = channel_params(p, staged, mean, scale, bias);
    for_slots([&](int j, int slot) {
      shift[j] = load_shared(extra + place(slot));
      slope[j] = load_shared(extra + kBnStaged + place(slot));
    });
    return zero && !infinite;
  }

  // Index of the part's partial result for a channel of its tile.
  FT_DEVICE int64_t partial_slot(int k) const {
    return (int64_t(tile) * t.parts + (int64_t(blockIdx.x) - t.block_of(tile * t.units))) * t.slots + k;
  }
  // The columns of slot k, counted from the tile's first.
  FT_DEVICE int first_column(int k) const {
    const int64_t c = (channel0() + k) * s.inner;
    return c > col0 ? int(c - col0) : 0;
  }
  FT_DEVICE int last_column(int k) const {
    const int64_t c = (channel0() + k + 1) * s.inner;
    return int((c < col1() ? c : col1()) - col0);
  }

  // Halves the lines until the first one has the results of all. Values lie where neighbouring threads have
  // neighbouring words: column j of a thread at j * kBnThreads + thread. put: stores the thread's columns; take(thread,
  // line, lines): merges the columns of another thread, whose rows are every lines-th one from `line` on.
  template <typename Put, typename Take>
  FT_DEVICE void fold_lines(Put put, Take take) const {
#pragma unroll 1
    for (int log2 = 7 - t.tx_log2; log2 >= 0; --log2) {
      const int half = 1 << log2;
      if (y >> log2 == 1) put();
      __syncthreads();
      if (y < half) take(int(threadIdx.x) + (half << t.tx_log2), y + half, log2 + 1);
    }
  }
  // Calls use(slot, lanes) for the channels of the tile: a warp per channel if it has many columns, else a thread.
  template <typename Use>
  FT_DEVICE void for_channels(Use use) const {
    if (s.inner >= 32)
      for (int k = int(threadIdx.x) / 32; k < used(); k += kBnThreads / 32) use(k, std::integral_constant<int, 32>());
    else
      for (int k = int(threadIdx.x); k < used(); k += kBnThreads) use(k, std::integral_constant<int, 1>());
  }

  // The results of the tile's channels, from those of the columns in the first line's threads: a pair of numbers each.
  // combine(lanes, first, last, a, b) makes a channel's from its columns', which lie at place(column).
  template <typename A, typename Combine>
  FT_DEVICE void store_channels(const A (&a)[kBnColumns], const A (&b)[kBnColumns], A* first, A* second, A* partial,
                                Combine combine) const {
    if (s.inner == 1) {
      if (y != 0 || !valid) return;
      A* const to = partial + 2 * partial_slot(x * kBnColumns);
#pragma unroll
      for (int j = 0; j < kBnColumns; j += 2) {
        const A pairs[4] = {a[j], b[j], a[j + 1], b[j + 1]};
        cuda::store(to + 2 * j, pairs);
      }
      return;
    }
    __syncthreads();
    if (y == 0) {
#pragma unroll
      for (int j = 0; j < kBnColumns; ++j) {
        store_shared(first + place(x * kBnColumns + j), a[j]);
        store_shared(second + place(x * kBnColumns + j), b[j]);
      }
    }
    __syncthreads();
    for_channels([&](int k, auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      A made[2];
      combine(lanes, first_column(k), last_column(k), made);
      if (int(threadIdx.x) % kLanes == 0) store_pair(partial + 2 * partial_slot(k), made);
    });
  }

  // partial: mean and M2 of each channel of the part.
  template <typename A>
  FT_DEVICE void store_moments(ColumnMoments<A>& own, A* means, A* m2s, A* partial) const {
    const int thread = int(threadIdx.x);
    fold_lines(
        [&] {
#pragma unroll
          for (int j = 0; j < kBnColumns; ++j) {
            store_shared(means + j * kBnThreads + thread, own.mean[j]);
            store_shared(m2s + j * kBnThreads + thread, own.m2[j]);
          }
        },
        [&](int other, int line, int log2) {
          const int others = rows_of(line, log2);
          if (others <= 0) return;
          const MergeFactors<A> factors = merge_factors(A(rows_of(y, log2)), A(others));
#pragma unroll
          for (int j = 0; j < kBnColumns; ++j)
            merge_into(own.mean[j], own.m2[j], load_shared(means + j * kBnThreads + other),
                       load_shared(m2s + j * kBnThreads + other), factors);
        });
    // columns have the same number of rows: the mean is that of the means
    store_channels(own.mean, own.m2, means, m2s, partial, [&](auto lanes, int first, int last, A(&made)[2]) {
      constexpr int kLanes = decltype(lanes)::value;
      const int lane = thread % kLanes;
      const A origin = load_shared(means + place(first)), columns = A(last - first);
      A sum = 0, m2 = 0;
      for (int i = first + lane; i < last; i += kLanes) sum += load_shared(means + place(i)) - origin;
      made[0] = origin + sum_over_lanes<kLanes>(sum) / columns;
      for (int i = first + lane; i < last; i += kLanes) {
        const A d = load_shared(means + place(i)) - made[0];
        m2 += fma(A(rows) * d, d, load_shared(m2s + place(i)));
      }
      made[1] = sum_over_lanes<kLanes>(m2);
    });
  }
  // partial: both sums over each channel of the part. The arrays may still be read as parameters by other threads.
  template <typename A>
  FT_DEVICE void store_sums(A (&a)[kBnColumns], A (&b)[kBnColumns], A* first_sums, A* second_sums, A* partial) const {
    const int thread = int(threadIdx.x);
    __syncthreads();
    fold_lines(
        [&] {
#pragma unroll
          for (int j = 0; j < kBnColumns; ++j) {
            store_shared(first_sums + j * kBnThreads + thread, a[j]);
            store_shared(second_sums + j * kBnThreads + thread, b[j]);
          }
        },
        [&](int other, int, int) {
#pragma unroll
          for (int j = 0; j < kBnColumns; ++j) {
            a[j] += load_shared(first_sums + j * kBnThreads + other);
            b[j] += load_shared(second_sums + j * kBnThreads + other);
          }
        });
    store_channels(a, b, first_sums, second_sums, partial, [&](auto lanes, int first, int last, A(&made)[2]) {
      constexpr int kLanes = decltype(lanes)::value;
      A sum_a = 0, sum_b = 0;
      for (int i = first + thread % kLanes; i < last; i += kLanes) {
        sum_a += load_shared(first_sums + place(i));
        sum_b += load_shared(second_sums + place(i));
      }
      made[0] = sum_over_lanes<kLanes>(sum_a);
      made[1] = sum_over_lanes<kLanes>(sum_b);
    });
  }
};

// The partial results of one channel: of every block that shares a tile with columns of it.
struct ChannelParts {
  const BnShape& s;
  const BnTiling& t;
  int64_t column0, column1;  // of the channel
  int64_t first_tile;
  int count, first_slot;

  FT_DEVICE ChannelParts(const BnShape& s, const BnTiling& t, int c) : s(s), t(t) {
    const int width_log2 = t.tx_log2 + 3;
    column0 = c * s.inner;
    column1 = column0 + s.inner;
    first_tile = column0 >> width_log2;
    count = (int((column1 - 1) >> width_log2) - int(first_tile) + 1) * t.parts;
    first_slot = int(c - s.by_inner.divide(first_tile << width_log2));
  }
  // Tiles after the channel's first one begin in it.
  FT_DEVICE int64_t slot(int i) const {
    const int64_t tile = t.by_parts.divide(i);
    return (first_tile * t.parts + i) * t.slots + (tile == 0 ? first_slot : 0);
  }
  // How many elements; 0 where fewer blocks share the tile.
  FT_DEVICE int64_t elements(int i) const {
    const int64_t nth = t.by_parts.divide(i), tile = first_tile + nth, above = tile * t.units;
    const int64_t block = t.block_of(above) + (i - nth * t.parts);
    const int64_t from_unit = t.first_unit(block) - above, to_unit = t.first_unit(block + 1) - above;
    const int64_t r0 = from_unit > 0 ? from_unit * t.ty() : 0;
    const int64_t r1 = to_unit * t.ty() < s.rows ? to_unit * t.ty() : s.rows;
    if (block >= t.blocks || r0 >= r1) return 0;
    const int64_t col0 = tile * t.width(), col1 = col0 + t.width();
    return (r1 - r0) * ((column1 < col1 ? column1 : col1) - (column0 > col0 ? column0 : col0));
  }
  // Calls use(elements, pair) for the parts of a lane; the loads of several are under way together.
  template <typename A, typename Use>
  FT_DEVICE void for_each(const A* partial, int lane, Use use) const {
    constexpr int kAhead = 4;
    for (int first = lane; first < count; first += 32 * kAhead) {
      A pairs[kAhead][2] = {};
      int64_t n[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int i = first + 32 * k;
        n[k] = i < count ? elements(i) : 0;
        if (n[k]) load_pair_shared_between_blocks(partial + 2 * slot(i), pairs[k]);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (n[k]) use(n[k], pairs[k]);
    }
  }
};

template <typename A>
FT_DEVICE void finalize_moments(const A* partial, const BnShape& s, const BnTiling& t, int c, int lane, A* mean,
                                A* var) {
  Moments<A> m{0, 0, 0};
  ChannelParts(s, t, c).for_each(partial, lane, [&](int64_t elements, const A(&pair)[2]) {
    m = merge(m, Moments<A>{A(elements), pair[0], pair[1]});
  });
  m = merge_over_lanes(m);
  if (lane != 0) return;
  store(mean + c, m.mean);
  store(var + c, m.m2 / m.count);
}

template <typename A>
FT_DEVICE void finalize_sums(const A* partial, const BnShape& s, const BnTiling& t, int c, int lane, const A* var,
                             A eps, A* dweight, A* dbias) {
  A sum_dz = 0, sum_dz_x = 0;
  ChannelParts(s, t, c).for_each(partial, lane, [&](int64_t, const A(&pair)[2]) {
    sum_dz += pair[0];
    sum_dz_x += pair[1];
  });
  sum_dz = sum_over_lanes<32>(sum_dz);
  sum_dz_x = sum_over_lanes<32>(sum_dz_x);
  if (lane != 0) return;
  store(dbias + c, sum_dz);
  store(dweight + c, sum_dz_x * bn_rstd(load(var + c), eps));
}

}  // namespace fasttricks::cuda

// Kernels of avgpool_conv1x1: the three products, and the sums of their parts. avgpool_conv1x1_plan.h says which tile
// and part of the depth a block computes; csrc/math/avgpool.h has the formulas. The pooled x exists in registers and
// shared memory only; of 16-bit types it is rounded there, as the tensor cores take it.
#pragma once

#include "avgpool_conv1x1_tile.cuh"

namespace fasttricks::cuda {

// Which accesses may be 16 bytes wide: the channels' or planes' sizes and the pointers allow it.
struct AvgPoolWide {
  bool x, gradient, weight;  // gradient: y or dy
  bool pairs;                // of NCHW: a row of a window is one access, of two columns, where x is not wide
};

// The tile of a product that a block has: tiles of one row of tiles are neighbours.
struct AvgPoolBlock {
  int row0, column0;
  template <typename T>
  FT_DEVICE static AvgPoolBlock of(const AvgPoolPlan& plan, T) {
    return {int(blockIdx.x) / plan.tiles_n * AvgPoolTile<sizeof(T)>::kM,
            int(blockIdx.x) % plan.tiles_n * AvgPoolTile<sizeof(T)>::kN};
  }
};

template <typename T, bool kNhwc>
using AvgPoolXLoader = std::conditional_t<kNhwc, PooledRowLoader<T>, PooledPlaneLoader<T>>;
template <typename T, bool kNhwc>
using AvgPoolGradientLoader = std::conditional_t<kNhwc, RowLoader<T>, PlaneLoader<T>>;

template <bool kNhwc, typename T>
FT_DEVICE AvgPoolXLoader<T, kNhwc> x_loader(const T* x, const AvgPoolShape& s, const AvgPoolWide& wide) {
  return {x, s, wide.x, wide.pairs};
}
template <bool kNhwc, typename T>
FT_DEVICE AvgPoolGradientLoader<T, kNhwc> gradient_loader(const T* dy, const AvgPoolShape& s, const AvgPoolWide& wide) {
  if constexpr (kNhwc)
    return {dy, s.pixels(), s.o, wide.gradient};
  else
    return {dy, s, s.o, wide.gradient};
}

// The rounded tile of the result in shared memory, as lines of channels (NHWC) or of pixels (NCHW).
template <typename T, bool kNhwc>
struct AvgPoolResult {
  using Tile = AvgPoolTile<sizeof(T)>;
  static constexpr int kV = kAvgPoolVector<T>;
  static constexpr int kLines = kNhwc ? Tile::kM : Tile::kN, kLength = kNhwc ? Tile::kN : Tile::kM;
  using Lines = AvgPoolLines<T, kLength>;
  static constexpr int kSize = kLines * Lines::kLine;
  static_assert(kSize * int(sizeof(T)) <= kAvgPoolSharedBytes<T>);
  T* values;

  template <typename Sums>
  FT_DEVICE AvgPoolResult(const Sums& sums, T* memory) : values(memory) {
    sums.for_each([&](int row, int column, auto value) {
      store_shared(values + (kNhwc ? Lines::place(row, column) : Lines::place(column, row)), T(value));
    });
    __syncthreads();
  }
  // Calls use(line, first, vector) for all vectors.
  template <typename Use>
  FT_DEVICE void for_vectors(Use use) const {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < kLines * kLength / kV; i += kAvgPoolThreads) {
      const int line = i / (kLength / kV), first = i % (kLength / kV) * kV;
      T v[kV];
      const uint4 u = load_shared(reinterpret_cast<const uint4*>(values + Lines::place(line, first)));
      memcpy(v, &u, 16);
      use(line, first, v);
    }
  }
  // Calls use(line, value) for this thread's element of every line. Neighbouring threads have neighbouring elements.
  FT_DEVICE static int index() { return int(threadIdx.x) % kLength; }
  template <typename Use>
  FT_DEVICE void for_lines(Use use) const {
#pragma unroll 1
    for (int line = int(threadIdx.x) / kLength; line < kLines; line += kAvgPoolThreads / kLength)
      use(line, values[Lines::place(line, index())]);
  }
};

// The operands of y = p W^T + bias, and where its sums start.
template <typename T, bool kNhwc>
struct AvgPoolForward {
  using Tile = AvgPoolTile<sizeof(T)>;
  using A = AvgPoolOperand<T, AvgPoolXLoader<T, kNhwc>, Tile::kM, kNhwc, kNhwc>;
  using B = AvgPoolOperand<T, RowLoader<T>, Tile::kN, true, false>;
  using Sums = AvgPoolSumsOf<T, A, B>;

  FT_DEVICE static void start(Sums& sums, const T* bias, const AvgPoolShape& s, int column0) {
    if (bias)
      sums.start([&](int column) {
        const int o = column0 + column;
        return o < s.o ? acc_t<T>(load(bias + o)) : acc_t<T>(0);
      });
  }

  FT_DEVICE static void finish(const AvgPoolResult<T, kNhwc>& result, const AvgPoolShape& s, const AvgPoolBlock& block,
                               const AvgPoolWide& wide, T* y) {
    if (wide.gradient) {
      result.for_vectors([&](int line, int first, const T(&v)[kAvgPoolVector<T>]) {
        const int q = block.row0 + (kNhwc ? line : first), o = block.column0 + (kNhwc ? first : line);
        if (q >= s.pixels() || o >= s.o) return;
        store(y + (kNhwc ? int64_t(q) * s.o + o : offset_in_planes(s, pixel_of(s, q), s.o, o)), v);
      });
      return;
    }
    AvgPoolPixel at;
    if constexpr (!kNhwc) at = pixel_of(s, block.row0 + result.index());
    result.for_lines([&](int line, T value) {
      const int q = block.row0 + (kNhwc ? line : result.index()), o = block.column0 + (kNhwc ? result.index() : line);
      if (q >= s.pixels() || o >= s.o) return;
      store(y + (kNhwc ? int64_t(q) * s.o + o : offset_in_planes(s, at, s.o, o)), value);
    });
  }
};

template <typename T, bool kNhwc>
__global__ void __launch_bounds__(kAvgPoolThreads, sizeof(T) == 8 ? 1 : 2)
    avgpool_conv1x1_forward(const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
                            AvgPoolShape s, AvgPoolPlan plan, AvgPoolWide wide, T* __restrict__ y) {
  FT_DYNAMIC_SHARED(memory);
  using Forward = AvgPoolForward<T, kNhwc>;
  const AvgPoolBlock block = AvgPoolBlock::of(plan, T());
  const auto left = x_loader<kNhwc>(x, s, wide);
  const RowLoader<T> right{weight, s.o, s.c, wide.weight};
  typename Forward::A a(left, block.row0, s.pixels(), s.c);
  typename Forward::B b(right, block.column0, s.o, s.c);
  typename Forward::Sums sums;
  Forward::start(sums, bias, s, block.column0);
  multiply_tiles<T>(a, b, 0, s.c, memory, sums);
  const AvgPoolResult<T, kNhwc> result(sums, reinterpret_cast<T*>(memory));
  Forward::finish(result, s, block, wide, y);
}

// The same product. A block reads and pools its rows once, keeps them in shared memory, and computes several tiles of
// columns.
template <typename T, bool kNhwc>
__global__ void __launch_bounds__(kAvgPoolThreads, 2)
    avgpool_conv1x1_forward_slab(const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
                                 AvgPoolShape s, AvgPoolSlabPlan plan, AvgPoolWide wide, T* __restrict__ y) {
  FT_DYNAMIC_SHARED(memory);
  using Forward = AvgPoolForward<T, kNhwc>;
  using Tile = AvgPoolTile<sizeof(T)>;
  static_assert(AvgPoolResult<T, kNhwc>::kSize <= 2 * Forward::B::kSize);
  const int row0 = int(blockIdx.x) / plan.groups * Tile::kM;
  const int tile0 = int(blockIdx.x) % plan.groups * plan.tiles_per_group, rest = plan.tiles_n - tile0;
  T* const slab = reinterpret_cast<T*>(memory);
  T* const tiles = slab + (s.c + Tile::kK - 1) / Tile::kK * Forward::A::kSize;
  const auto left = x_loader<kNhwc>(x, s, wide);
  const RowLoader<T> right{weight, s.o, s.c, wide.weight};
  {
    typename Forward::A a(left, row0, s.pixels(), s.c);
    fill_slab<T>(a, s.c, slab);
  }
#pragma unroll 1
  for (int t = 0; t < plan.tiles_per_group && t < rest; ++t) {
    const AvgPoolBlock block{row0, (tile0 + t) * Tile::kN};
    typename Forward::B b(right, block.column0, s.o, s.c);
    typename Forward::Sums sums;
    Forward::start(sums, bias, s, block.column0);
    multiply_slab<T, typename Forward::A>(slab, b, s.c, tiles, sums);
    const AvgPoolResult<T, kNhwc> result(sums, tiles);
    Forward::finish(result, s, block, wide, y);
    __syncthreads();  // the result has been read
  }
}

// Calls use(row, column, inside) for the pixels of x that belong to output pixel `at`: those of its window, and those
// at the edge that no window covers (inside is false).
template <typename Use>
FT_DEVICE void for_spread(const AvgPoolShape& s, const AvgPoolPixel& at, Use use) {
  const int row0 = at.i * s.stride, column0 = at.j * s.stride;
  const int row1 = at.i + 1 == s.ho ? s.h : row0 + s.stride, column1 = at.j + 1 == s.wo ? s.w : column0 + s.stride;
#pragma unroll 1
  for (int row = row0; row < row1; ++row)
#pragma unroll 1
    for (int column = column0; column < column1; ++column)
      use(row, column, row < row0 + s.stride && column < column0 + s.stride);
}

// dx = W^T dy / count in every pixel of a window, 0 in pixels that no window covers.
template <typename T, bool kNhwc>
__global__ void __launch_bounds__(kAvgPoolThreads, sizeof(T) == 8 ? 1 : 2)
    avgpool_conv1x1_input(const T* __restrict__ dy, const T* __restrict__ weight, AvgPoolShape s, AvgPoolPlan plan,
                          AvgPoolWide wide, T* __restrict__ dx) {
  FT_DYNAMIC_SHARED(memory);
  using Tile = AvgPoolTile<sizeof(T)>;
  using Acc = acc_t<T>;
  constexpr int kV = kAvgPoolVector<T>, kHalf = kV / 2;
  const AvgPoolBlock block = AvgPoolBlock::of(plan, T());
  const auto left = gradient_loader<kNhwc>(dy, s, wide);
  const RowLoader<T> right{weight, s.o, s.c, wide.weight};
  using A = AvgPoolOperand<T, AvgPoolGradientLoader<T, kNhwc>, Tile::kM, kNhwc, kNhwc>;
  using B = AvgPoolOperand<T, RowLoader<T>, Tile::kN, false, false>;
  A a(left, block.row0, s.pixels(), s.o);
  B b(right, block.column0, s.c, s.o);
  AvgPoolSumsOf<T, A, B> sums;
  multiply_tiles<T>(a, b, 0, s.o, memory, sums);

  const AvgPoolResult<T, kNhwc> result(sums, reinterpret_cast<T*>(memory));
  const auto inverse = [&](const AvgPoolPixel& at) {
    return inverse_count<Acc>(window_rows(s, at), window_columns(s, at));
  };
  const auto in_rows = [&](const AvgPoolPixel& at, int row, int column, int c) {
    return dx + ((int64_t(at.n) * s.h + row) * s.w + column) * s.c + c;
  };
  if (!wide.x) {
    AvgPoolPixel at;
    Acc inv(0);
    if constexpr (!kNhwc) {
      at = pixel_of(s, block.row0 + result.index());
      inv = inverse(at);
    }
    result.for_lines([&](int line, T value) {
      const int q = block.row0 + (kNhwc ? line : result.index()), c = block.column0 + (kNhwc ? result.index() : line);
      if (q >= s.pixels() || c >= s.c) return;
      if constexpr (kNhwc) {
        at = pixel_of(s, q);
        inv = inverse(at);
      }
      const T spread = T(Acc(value) * inv);
      if constexpr (kNhwc) {
        for_spread(s, at, [&](int row, int column, bool inside) {
          store(in_rows(at, row, column, c), inside ? spread : T(0));
        });
      } else {
        T* const plane = dx + (int64_t(at.n) * s.c + c) * s.h * s.w;
        if (wide.pairs) {
          const int row1 = at.i + 1 == s.ho ? s.h : at.i * 2 + 2;
#pragma unroll 1
          for (int row = at.i * 2; row < row1; ++row) {
            const T value = row < at.i * 2 + 2 ? spread : T(0), two[2] = {value, value};
            store_pair(plane + int64_t(row) * s.w + at.j * 2, two);
          }
        } else {
          for_spread(s, at, [&](int row, int column, bool inside) {
            store(plane + int64_t(row) * s.w + column, inside ? spread : T(0));
          });
        }
      }
    });
    return;
  }
  result.for_vectors([&](int line, int first, T(&v)[kV]) {
    const int q = block.row0 + (kNhwc ? line : first), c = block.column0 + (kNhwc ? first : line);
    if (q >= s.pixels() || c >= s.c) return;
    AvgPoolPixel at = pixel_of(s, q);
    const T none[kV] = {};
    if constexpr (kNhwc) {
      const Acc inv = inverse(at);
#pragma unroll
      for (int e = 0; e < kV; ++e) v[e] = T(Acc(v[e]) * inv);
      for_spread(s, at, [&](int row, int column, bool inside) {
        inside ? store(in_rows(at, row, column, c), v) : store(in_rows(at, row, column, c), none);
      });
    } else if (s.stride == 1) {
      store(dx + corner_in_planes(s, at, c), v);
    } else {  // half a vector of pixels is a vector of x in each row
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        if (q + g * kHalf >= s.pixels()) return;
        at = pixel_of(s, q + g * kHalf);
        const Acc inv = inverse(at);
        T twice[kV];
#pragma unroll
        for (int e = 0; e < kV; ++e) twice[e] = T(Acc(v[g * kHalf + e / 2]) * inv);
        T* const to = dx + corner_in_planes(s, at, c);
        const int rows = at.i + 1 == s.ho ? s.h - at.i * 2 : 2;
        for (int row = 0; row < rows; ++row)
          row < 2 ? store(to + row * int64_t(s.w), twice) : store(to + row * int64_t(s.w), none);
      }
    }
  });
}

// partial[split] = dy^T p over the split's pixels.
template <typename T, bool kNhwc>
__global__ void __launch_bounds__(kAvgPoolThreads, sizeof(T) == 8 ? 1 : 2)
    avgpool_conv1x1_weight(const T* __restrict__ dy, const T* __restrict__ x, AvgPoolShape s, AvgPoolPlan plan,
                           AvgPoolWide wide, acc_t<T>* __restrict__ partial) {
  FT_DYNAMIC_SHARED(memory);
  using Tile = AvgPoolTile<sizeof(T)>;
  using Acc = acc_t<T>;
  // more rows than columns: an element of x is four times an element of dy
  const AvgPoolBlock block{int(blockIdx.x) / plan.tiles_n * Tile::kN, int(blockIdx.x) % plan.tiles_n * Tile::kM};
  const auto left = gradient_loader<kNhwc>(dy, s, wide);
  const auto right = x_loader<kNhwc>(x, s, wide);
  using A = AvgPoolOperand<T, AvgPoolGradientLoader<T, kNhwc>, Tile::kN, !kNhwc, kNhwc>;
  using B = AvgPoolOperand<T, AvgPoolXLoader<T, kNhwc>, Tile::kM, !kNhwc, kNhwc>;
  A a(left, block.row0, s.o, s.pixels());
  B b(right, block.column0, s.c, s.pixels());
  AvgPoolSumsOf<T, A, B> sums;
  const int begin = int(blockIdx.y) * plan.depth_per_split, rest = plan.depth - begin;
  const int end = begin + (rest < plan.depth_per_split ? rest : plan.depth_per_split);
  multiply_tiles<T>(a, b, begin, end, memory, sums);

  sums.for_fours([&](int row, int column, const Acc(&v)[4]) {
    const int o = block.row0 + row, c = block.column0 + column;
    if (o >= s.o || c >= s.c) return;
    Acc* const to = partial + (int64_t(blockIdx.y) * s.o + o) * s.c + c;
    if (s.c % 4 == 0) return store(to, v);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (c + e < s.c) store(to + e, v[e]);
  });
}

// out[i] = sum of partial[k][i] over the splits, in their order.
template <typename T>
__global__ void __launch_bounds__(kAvgPoolThreads)
    avgpool_sum_splits(const acc_t<T>* __restrict__ partial, int64_t splits, int64_t numel, T* __restrict__ out) {
  using Acc = acc_t<T>;
  const int64_t i = (int64_t(blockIdx.x) * kAvgPoolThreads + int64_t(threadIdx.x)) * kAvgPoolVector<T>;
  if (i >= numel) return;
  Acc sums[kAvgPoolVector<T>] = {};
  const bool wide = numel % kAvgPoolVector<T> == 0 && (reinterpret_cast<uintptr_t>(out) & 15) == 0;
  for (int64_t k = 0; k < splits; ++k) {
    Acc v[kAvgPoolVector<T>];
    if (wide) {
      load(partial + k * numel + i, v);
    } else {
#pragma unroll
      for (int e = 0; e < kAvgPoolVector<T>; ++e) v[e] = i + e < numel ? load(partial + k * numel + i + e) : Acc(0);
    }
#pragma unroll
    for (int e = 0; e < kAvgPoolVector<T>; ++e) sums[e] += v[e];
  }
  T rounded[kAvgPoolVector<T>];
#pragma unroll
  for (int e = 0; e < kAvgPoolVector<T>; ++e) rounded[e] = T(sums[e]);
  if (wide) return store(out + i, rounded);
#pragma unroll
  for (int e = 0; e < kAvgPoolVector<T>; ++e)
    if (i + e < numel) store(out + i + e, rounded[e]);
}

// partial[split][o] = sum of dy over the split's pixels. NCHW: one warp per channel, since pixels
// are neighbours in memory; NHWC: one thread per channel, since channels are. lanes: threads that share a channel.
template <typename T>
__global__ void __launch_bounds__(kAvgPoolThreads)
    avgpool_bias(const T* __restrict__ dy, AvgPoolShape s, bool nhwc, int splits, acc_t<T>* __restrict__ partial) {
  const int lanes = nhwc ? 1 : 32, lane = int(threadIdx.x) % lanes;
  const int o = int(blockIdx.x) * (kAvgPoolThreads / lanes) + int(threadIdx.x) / lanes;
  const int each = (s.pixels() + splits - 1) / splits, begin = int(blockIdx.y) * each;
  const int end = s.pixels() - begin < each ? s.pixels() : begin + each;
  acc_t<T> sum = 0;
  constexpr int kPart = 64;  // values that a thread sums separately: there is no wider type to sum in
  if (o < s.o)
    for (unsigned first = unsigned(begin + lane); first < unsigned(end); first += unsigned(kPart * lanes)) {
      acc_t<T> part = 0;
      for (unsigned q = first; q < unsigned(end) && q < first + unsigned(kPart * lanes); q += unsigned(lanes))
        part += acc_t<T>(load(dy + (nhwc ? int64_t(q) * s.o + o : offset_in_planes(s, pixel_of(s, int(q)), s.o, o))));
      sum += part;
    }
  if (!nhwc) sum = sum_over_lanes<32>(sum);
  if (o < s.o && lane == 0) store(partial + int64_t(blockIdx.y) * s.o + o, sum);
}

}  // namespace fasttricks::cuda

// Kernels of bn_relu and bn_add_relu: statistics, apply, backward reduction, backward apply. bn_relu_plan.h says which
// columns and rows a thread has; csrc/math/bn.h has the formulas.
//
// Reductions leave two numbers per channel, tile, and block that shares the tile; bn_finalize_* combines them in a
// fixed order. No float atomics: the same input gives the same bits.
#pragma once

#include "bn_relu_plan.h"
#include "bn_relu_tile.cuh"
#include "bn_second_gradient.cuh"
#include "math/bn.h"

namespace fasttricks::cuda {

// partial = (mean, M2) of the block's elements of each channel. keep(row of x) is called for each row.
template <typename T, bool kVector, typename Keep>
FT_DEVICE void reduce_moments(const T* __restrict__ x, const BnShape& s, const BnTiling& t,
                              acc_t<T>* __restrict__ partial, acc_t<T>* means, acc_t<T>* m2s, Keep keep) {
#pragma unroll 1
  for (BnTile tile(s, t); tile.more(); tile.next()) {
    ColumnMoments<acc_t<T>> sums;
    tile.for_rows<kBnChunkOf<T>>([&](int64_t at, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      T v[kRows][kBnColumns];
#pragma unroll
      for (int u = 0; u < kRows; ++u) tile.template load<kVector>(x, at + u * tile.step(), v[u]);
#pragma unroll
      for (int u = 0; u < kRows; ++u) keep(v[u]);
      sums.template add<T, kRows>(v);
    });
    tile.again().store_moments(sums, means, m2s, partial);
  }
}

template <typename T, bool kVector>
__global__ void __launch_bounds__(kBnThreads, kBnBlocksOf<T, kVector, 4>)
    bn_stats(const T* __restrict__ x, BnShape s, BnTiling t, acc_t<T>* __restrict__ partial) {
  FT_SHARED(acc_t<T>, means, kBnThreads * kBnColumns);
  FT_SHARED(acc_t<T>, m2s, kBnThreads * kBnColumns);
  reduce_moments<T, kVector>(x, s, t, partial, means, m2s, [](const T(&)[kBnColumns]) {});
}

// mean and biased variance of every channel; one warp per channel.
template <typename A>
__global__ void __launch_bounds__(kBnThreads)
    bn_finalize_stats(const A* __restrict__ partial, BnShape s, BnTiling t, A* __restrict__ mean, A* __restrict__ var) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int c = int(blockIdx.x) * (kBnThreads / 32) + warp;
  if (c < s.channels) finalize_moments(partial, s, t, c, lane, mean, var);
}

// dz of a row: dy where the forward's output passes.
template <typename T>
FT_DEVICE void keep_passing(unsigned bits, T (&g)[kBnColumns]) {
#pragma unroll
  for (int j = 0; j < kBnColumns; ++j) g[j] = bits >> j & 1 ? g[j] : T(0);
}

// partial = (sum dz, sum dz * (x - mean)) of the block's elements of each channel; dz = dy where the forward's output
// passes. join(tile, e, row of dy, row of x, bits) may change a row of dy before its mask is applied, or use both.
template <typename T, bool kVector, bool kResidual, int kChunk, typename Join>
FT_DEVICE void reduce_gradients(const T* __restrict__ dy, const T* __restrict__ x, const uint8_t* __restrict__ mask,
                                const BnParams<acc_t<T>>& p, const BnShape& s, const BnTiling& t,
                                acc_t<T>* __restrict__ partial, acc_t<T>* first, acc_t<T>* second, Join join) {
  using A = acc_t<T>;
#pragma unroll 1
  for (BnTile tile(s, t); tile.more(); tile.next()) {
    A mean[kBnColumns], scale[kBnColumns], bias[kBnColumns];
    tile.channel_params(p, first, mean, scale, bias);
    A sum_dz[kBnColumns] = {}, sum_dz_x[kBnColumns] = {};
    tile.for_rows<kChunk>([&](int64_t at, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      T g[kRows][kBnColumns], v[kRows][kBnColumns];
      unsigned bits[kRows];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t e = at + u * tile.step();
        tile.template load<kVector>(dy, e, g[u]);
        tile.template load<kVector>(x, e, v[u]);
        if constexpr (kResidual) bits[u] = tile.template load_bits<kVector>(mask, e);
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        if constexpr (!kResidual) bits[u] = passing<T>(v[u], mean, scale, bias);
        join(tile, at + u * tile.step(), g[u], v[u], bits[u]);
#pragma unroll
        for (int j = 0; j < kBnColumns; ++j) {
          const A dz = bits[u] >> j & 1 ? A(g[u][j]) : A(0);
          sum_dz[j] += dz;
          sum_dz_x[j] += dz * (A(v[u][j]) - mean[j]);
        }
      }
    });
    tile.again().store_sums(sum_dz, sum_dz_x, first, second, partial);
  }
}

template <typename T, bool kVector, bool kResidual>
__global__ void __launch_bounds__(kBnThreads, kBnBlocksOf<T, kVector, kResidual ? 3 : 2>)
    bn_backward_reduce(const T* __restrict__ dy, const T* __restrict__ x, const uint8_t* __restrict__ mask,
                       BnParams<acc_t<T>> p, BnShape s, BnTiling t, acc_t<T>* __restrict__ partial) {
  FT_SHARED(acc_t<T>, first, kBnThreads * kBnColumns);
  FT_SHARED(acc_t<T>, second, kBnThreads * kBnColumns);
  reduce_gradients<T, kVector, kResidual, kBnGradientChunk<T, kVector, kResidual>>(
      dy, x, mask, p, s, t, partial, first, second,
      [](const BnTile&, int64_t, T(&)[kBnColumns], const T(&)[kBnColumns], unsigned) {});
}

// bn_backward_reduce with two gradients of y; dz, of their sum, is also written.
template <typename T, bool kVector, bool kResidual>
__global__ void __launch_bounds__(kBnThreads, kBnBlocksOf<T, kVector, 2>)
    bn_backward_reduce_two(const T* __restrict__ dy, FT_PARAMETER(BnSecondGradient<T>) other, const T* __restrict__ x,
                           const uint8_t* __restrict__ mask, BnParams<acc_t<T>> p, BnShape s, BnTiling t,
                           acc_t<T>* __restrict__ partial, T* __restrict__ dz) {
  FT_SHARED(acc_t<T>, first, kBnThreads * kBnColumns);
  FT_SHARED(acc_t<T>, second, kBnThreads * kBnColumns);
  reduce_gradients<T, kVector, kResidual, kBnChunkOf<T> / 2>(
      dy, x, mask, p, s, t, partial, first, second,
      [&](const BnTile& tile, int64_t e, T(&g)[kBnColumns], const T(&)[kBnColumns], unsigned bits) {
        other.template add_to<kVector>(tile, e, g);
        keep_passing(bits, g);
        tile.template store<kVector>(dz, e, g);
      });
}

// dbias = sum dz, dweight = rstd * sum dz * (x - mean); one warp per channel.
template <typename A>
__global__ void __launch_bounds__(kBnThreads)
    bn_finalize_backward(const A* __restrict__ partial, BnShape s, BnTiling t, const A* __restrict__ var, A eps,
                         A* __restrict__ dweight, A* __restrict__ dbias) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int c = int(blockIdx.x) * (kBnThreads / 32) + warp;
  if (c < s.channels) finalize_sums(partial, s, t, c, lane, var, eps, dweight, dbias);
}

// y of a row from x, over the residual in z; returns the mask's bits.
template <bool kResidual, typename T, typename A>
FT_DEVICE unsigned apply_row(const T (&v)[kBnColumns], const A (&mean)[kBnColumns], const A (&scale)[kBnColumns],
                             const A (&bias)[kBnColumns], bool skip_x, T (&z)[kBnColumns]) {
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < kBnColumns; ++j) {
    A pre = skip_x ? bias[j] : normalized(A(v[j]), mean[j], scale[j], bias[j]);
    if constexpr (kResidual) pre += A(z[j]);
    const T out = relu(T(pre));
    bits |= unsigned(passes(out)) << j;
    z[j] = out;
  }
  return bits;
}

// y = relu((x - mean) * weight * rstd + bias [+ residual]), and the mask's bits of bn_add_relu.
// from_x: mean and var are x's own, so that a channel with finite statistics has finite values only, and where weight =
// 0 the normalised value is 0 whatever x: a tile whose scales are all zero does not read x.
template <typename T, bool kVector, bool kResidual>
__global__ void __launch_bounds__(kBnThreads, kBnBlocksOf<T, kVector, 3>)
    bn_apply(const T* __restrict__ x, const T* __restrict__ residual, BnParams<acc_t<T>> p, bool from_x, BnShape s,
             BnTiling t, T* __restrict__ y, uint8_t* __restrict__ mask) {
  using A = acc_t<T>;
  FT_SHARED(A, staged, 3 * kBnStaged);
#pragma unroll 1
  for (BnTile tile(s, t); tile.more(); tile.next()) {
    A mean[kBnColumns], scale[kBnColumns], bias[kBnColumns];
    const bool skip_x = tile.channel_params(p, staged, mean, scale, bias) && from_x;
    tile.for_rows<kBnChunkOf<T> / (kResidual ? 2 : 1)>([&](int64_t at, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      T v[kRows][kBnColumns], z[kRows][kBnColumns];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t e = at + u * tile.step();
        tile.template load<kVector>(x, e, v[u], !skip_x);
        if constexpr (kResidual) tile.template load<kVector>(residual, e, z[u]);
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const unsigned bits = apply_row<kResidual>(v[u], mean, scale, bias, skip_x, z[u]);
        const int64_t e = at + u * tile.step();
        tile.template store<kVector>(y, e, z[u]);
        if constexpr (kResidual) tile.store_bits(mask, e, bits);
      }
    });
  }
}

// dx of a row over its x in v.
template <typename T, typename A>
FT_DEVICE void gradient_row(const T (&dz)[kBnColumns], const A (&mean)[kBnColumns], const A (&scale)[kBnColumns],
                            const A (&shift)[kBnColumns], const A (&slope)[kBnColumns], bool batch_terms, bool zero,
                            T (&v)[kBnColumns]) {
#pragma unroll
  for (int j = 0; j < kBnColumns; ++j) {
    A grad = A(dz[j]);
    if (batch_terms) grad = grad - shift[j] + (A(v[j]) - mean[j]) * slope[j];
    v[j] = zero ? T(0) : T(scale[j] * grad);
  }
}

// dx = scale * (dz - dbias/M - (x - mean) * rstd * dweight/M); dresidual = dz. inv_count = 1/M; 0 where the statistics
// are constants (eval): then dx = scale * dz, and only the mask needs x. A tile whose scales are all zero and whose
// sums are finite writes dx = 0 without reading x. kResidual without a mask: dy is dz already.
template <typename T, bool kVector, bool kResidual>
__global__ void __launch_bounds__(kBnThreads, kBnBlocksOf<T, kVector, kResidual ? 3 : 2>)
    bn_backward_apply(const T* __restrict__ dy, const T* __restrict__ x, const uint8_t* __restrict__ mask,
                      BnParams<acc_t<T>> p, const acc_t<T>* __restrict__ dweight, const acc_t<T>* __restrict__ dbias,
                      acc_t<T> inv_count, BnShape s, BnTiling t, T* __restrict__ dx, T* __restrict__ dresidual) {
  using A = acc_t<T>;
  FT_SHARED(A, staged, 5 * kBnStaged);
#pragma unroll 1
  for (BnTile tile(s, t); tile.more(); tile.next()) {
    A mean[kBnColumns], scale[kBnColumns], bias[kBnColumns], shift[kBnColumns], slope[kBnColumns];
    const bool zero = tile.gradient_params(p, dweight, dbias, inv_count, staged, mean, scale, bias, shift, slope);
    const bool batch_terms = inv_count != A(0);
    const bool read_x = !zero && (batch_terms || !kResidual), read_dy = !zero || (kResidual && dresidual);
    tile.for_rows<kBnGradientChunk<T, kVector, kResidual>>([&](int64_t at, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      T g[kRows][kBnColumns], v[kRows][kBnColumns];
      unsigned bits[kRows];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t e = at + u * tile.step();
        tile.template load<kVector>(dy, e, g[u], read_dy);
        tile.template load<kVector>(x, e, v[u], read_x);
        if constexpr (kResidual) bits[u] = !mask ? 0xff : read_dy ? tile.template load_bits<kVector>(mask, e) : 0;
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        if constexpr (!kResidual) bits[u] = zero ? 0 : passing<T>(v[u], mean, scale, bias);
        keep_passing(bits[u], g[u]);
        gradient_row(g[u], mean, scale, shift, slope, batch_terms, zero, v[u]);
        const int64_t e = at + u * tile.step();
        tile.template store<kVector>(dx, e, v[u]);
        if constexpr (kResidual)
          if (dresidual) tile.template store<kVector>(dresidual, e, g[u]);
      }
    });
  }
}

// One running statistic and what updates it.
struct BnRunning {
  void* running;
  const void* now;
  int64_t stride, now_stride;
  ElementType type, now_type;
};
struct BnUpdate {
  BnRunning mean, var;
  const double* count;  // values per channel; null: `values`
  int64_t values;
  int64_t* batches;  // the number of batches; may be null
  bool cumulative;   // every batch has the same weight; momentum is ignored
  double momentum;
};

template <typename R, typename A>
FT_DEVICE void update_running(const BnRunning& r, int c, double factor, double momentum) {
  R* at = static_cast<R*>(r.running) + c * r.stride;
  const double now = load_param<double>(r.now, r.now_type, c * r.now_stride) * factor;
  store(at, R(bn_update(A(load(at)), A(now), A(momentum))));
}
FT_DEVICE void update_running(const BnRunning& r, int c, double factor, double momentum) {
  switch (r.type) {
    case ElementType::kFloat:
      return update_running<float, float>(r, c, factor, momentum);
    case ElementType::kDouble:
      return update_running<double, double>(r, c, factor, momentum);
    case ElementType::kHalf:
      return update_running<Half, float>(r, c, factor, momentum);
    case ElementType::kBFloat16:
      return update_running<BFloat16, float>(r, c, factor, momentum);
  }
}

// Updates the running statistics and the number of batches; one block, so that every thread reads that number before it
// changes. A template, since several sources include it.
inline constexpr int kBnUpdateThreads = 512;
template <int kThreads>
__global__ void __launch_bounds__(kThreads) bn_update_stats(FT_PARAMETER(BnUpdate) u, int channels) {
  const int64_t batches = u.batches ? load(u.batches) + 1 : 1;
  const double momentum = bn_momentum(u.cumulative, u.momentum, batches);
  const double count = u.count ? load(u.count) : double(u.values);
  __syncthreads();
  if (u.batches && threadIdx.x == 0) store(u.batches, batches);
  if (count == 0) return;
  for (int c = int(threadIdx.x); c < channels; c += kThreads) {
    update_running(u.mean, c, 1.0, momentum);
    update_running(u.var, c, bn_unbiased_factor(count), momentum);
  }
}

}  // namespace fasttricks::cuda

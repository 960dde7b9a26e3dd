// Kernels of bn_add_bn_relu: apply, backward reduction, backward apply. The statistics are those of bn_relu.cuh.
// csrc/math/bn.h has the formulas; p is the BatchNorm of x, q that of the residual.
#pragma once

#include "bn_relu.cuh"

namespace fasttricks::cuda {

// The parameters of both in the thread's columns; the bias is the sum of both. `staged` is as in channel_params.
template <typename A>
struct PairParams {
  A mean[kBnColumns], scale[kBnColumns], bias[kBnColumns], other_mean[kBnColumns], other_scale[kBnColumns];
  bool skip_x;

  // from_x: as in bn_apply.
  FT_DEVICE PairParams(const BnTile& tile, const BnParams<A>& p, const BnParams<A>& q, bool from_x, A* staged) {
    A other_bias[kBnColumns];
    skip_x = tile.channel_params(p, staged, mean, scale, bias) && from_x;
    __syncthreads();
    tile.channel_params(q, staged, other_mean, other_scale, other_bias);
#pragma unroll
    for (int j = 0; j < kBnColumns; ++j) bias[j] += other_bias[j];
  }

  // y of a row from x, over the residual in z; returns the mask's bits.
  template <typename T>
  FT_DEVICE unsigned apply(const T (&v)[kBnColumns], T (&z)[kBnColumns]) const {
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < kBnColumns; ++j) {
      const A main = skip_x ? bias[j] : normalized(A(v[j]), mean[j], scale[j], bias[j]);
      const T out = relu(T(normalized(A(z[j]), other_mean[j], other_scale[j], main)));
      bits |= unsigned(passes(out)) << j;
      z[j] = out;
    }
    return bits;
  }
};

// y = relu((x - mean) * weight * rstd + bias + the same of the residual), and the mask's bits.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kBnThreads, kBnBlocksOf<T, kVector, 2>)
    bn_add_bn_apply(const T* __restrict__ x, const T* __restrict__ residual, BnParams<acc_t<T>> p, BnParams<acc_t<T>> q,
                    bool from_x, BnShape s, BnTiling t, T* __restrict__ y, uint8_t* __restrict__ mask) {
  using A = acc_t<T>;
  FT_SHARED(A, staged, 3 * kBnStaged);
#pragma unroll 1
  for (BnTile tile(s, t); tile.more(); tile.next()) {
    const PairParams<A> of(tile, p, q, from_x, staged);
    tile.for_rows<kBnChunkOf<T> / 2>([&](int64_t at, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      T v[kRows][kBnColumns], z[kRows][kBnColumns];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        tile.template load<kVector>(x, at + u * tile.step(), v[u], !of.skip_x);
        tile.template load<kVector>(residual, at + u * tile.step(), z[u]);
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const unsigned bits = of.apply(v[u], z[u]);
        tile.template store<kVector>(y, at + u * tile.step(), z[u]);
        tile.store_bits(mask, at + u * tile.step(), bits);
      }
    });
  }
}

// Rows of three tensors that a thread loads before it computes, next to 40 numbers for its columns.
template <typename T, bool kVector>
constexpr int kBnPairChunk = kVector && sizeof(T) == 2 ? 2 : 1;

// partial = (sum dz, sum dz * (x - mean)) of the block's elements of each channel, other_partial = (0, sum dz *
// (residual - its mean)). dz: of dy, or of its sum with a second gradient of y. keep(tile, e, rows of dz, x and the
// residual) is called for each row.
template <typename T, bool kVector, typename Keep>
FT_DEVICE void reduce_pair_gradients(const T* __restrict__ dy, const BnSecondGradient<T>& other,
                                     const T* __restrict__ x, const T* __restrict__ residual,
                                     const uint8_t* __restrict__ mask, const BnParams<acc_t<T>>& p,
                                     const BnParams<acc_t<T>>& q, const BnShape& s, const BnTiling& t,
                                     acc_t<T>* __restrict__ partial, acc_t<T>* __restrict__ other_partial,
                                     acc_t<T>* first, acc_t<T>* second, Keep keep) {
  using A = acc_t<T>;
#pragma unroll 1
  for (BnTile tile(s, t); tile.more(); tile.next()) {
    A mean[kBnColumns], other_mean[kBnColumns], scale[kBnColumns], bias[kBnColumns];
    tile.channel_params(p, first, mean, scale, bias);
    __syncthreads();
    tile.channel_params(q, first, other_mean, scale, bias);
    A sum_dz[kBnColumns] = {}, sum_dz_x[kBnColumns] = {}, sum_dz_z[kBnColumns] = {};
    tile.for_rows<kBnPairChunk<T, kVector>>([&](int64_t at, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      T g[kRows][kBnColumns], v[kRows][kBnColumns], z[kRows][kBnColumns];
      unsigned bits[kRows];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t e = at + u * tile.step();
        tile.template load<kVector>(dy, e, g[u]);
        tile.template load<kVector>(x, e, v[u]);
        tile.template load<kVector>(residual, e, z[u]);
        bits[u] = tile.template load_bits<kVector>(mask, e);
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t e = at + u * tile.step();
        if (other.data) other.template add_to<kVector>(tile, e, g[u]);
        keep_passing(bits[u], g[u]);
        keep(tile, e, g[u], v[u], z[u]);
#pragma unroll
        for (int j = 0; j < kBnColumns; ++j) {
          sum_dz[j] += A(g[u][j]);
          sum_dz_x[j] += A(g[u][j]) * (A(v[u][j]) - mean[j]);
          sum_dz_z[j] += A(g[u][j]) * (A(z[u][j]) - other_mean[j]);
        }
      }
    });
    A none[kBnColumns] = {};
    tile.again().store_sums(sum_dz, sum_dz_x, first, second, partial);
    tile.again().store_sums(none, sum_dz_z, first, second, other_partial);
  }
}

// dz, if not null, is also written.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kBnThreads, kBnBlocksOf<T, kVector, 2>)
    bn_add_bn_reduce(const T* __restrict__ dy, FT_PARAMETER(BnSecondGradient<T>) other, const T* __restrict__ x,
                     const T* __restrict__ residual, const uint8_t* __restrict__ mask, BnParams<acc_t<T>> p,
                     BnParams<acc_t<T>> q, BnShape s, BnTiling t, acc_t<T>* __restrict__ partial,
                     acc_t<T>* __restrict__ other_partial, T* __restrict__ dz) {
  FT_SHARED(acc_t<T>, first, kBnThreads * kBnColumns);
  FT_SHARED(acc_t<T>, second, kBnThreads * kBnColumns);
  reduce_pair_gradients<T, kVector>(
      dy, other, x, residual, mask, p, q, s, t, partial, other_partial, first, second,
      [&](const BnTile& tile, int64_t e, const T(&g)[kBnColumns], const T(&)[kBnColumns], const T(&)[kBnColumns]) {
        if (dz) tile.template store<kVector>(dz, e, g);
      });
}

// dbias = sum dz, of both; dweight and dresidual_weight as in finalize_sums.
template <typename A>
FT_DEVICE void finalize_pair_sums(const A* partial, const A* other_partial, const BnShape& s, const BnTiling& t, int c,
                                  int lane, const BnParams<A>& p, const BnParams<A>& q, A* dweight, A* dresidual_weight,
                                  A* dbias) {
  const ChannelParts parts(s, t, c);
  A sum_dz = 0, sum_dz_x = 0, sum_dz_z = 0;
  parts.for_each(partial, lane, [&](int64_t, const A(&pair)[2]) {
    sum_dz += pair[0];
    sum_dz_x += pair[1];
  });
  parts.for_each(other_partial, lane, [&](int64_t, const A(&pair)[2]) { sum_dz_z += pair[1]; });
  sum_dz = sum_over_lanes<32>(sum_dz);
  sum_dz_x = sum_over_lanes<32>(sum_dz_x);
  sum_dz_z = sum_over_lanes<32>(sum_dz_z);
  if (lane != 0) return;
  store(dbias + c, sum_dz);
  store(dweight + c, sum_dz_x * bn_rstd(load(p.var + c), p.eps));
  store(dresidual_weight + c, sum_dz_z * bn_rstd(load(q.var + c), q.eps));
}

// One warp per channel.
template <typename A>
__global__ void __launch_bounds__(kBnThreads)
    bn_add_bn_finalize(const A* __restrict__ partial, const A* __restrict__ other_partial, BnShape s, BnTiling t,
                       BnParams<A> p, BnParams<A> q, A* __restrict__ dweight, A* __restrict__ dresidual_weight,
                       A* __restrict__ dbias) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int c = int(blockIdx.x) * (kBnThreads / 32) + warp;
  if (c < s.channels) finalize_pair_sums(partial, other_partial, s, t, c, lane, p, q, dweight, dresidual_weight, dbias);
}

// dx and dresidual, each as in bn_backward_apply: dz is read once for both. mask null: dy is dz already, and may lie
// where dresidual goes: a thread writes what it alone has read.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kBnThreads, kBnBlocksOf<T, kVector, 2>)
    bn_add_bn_gradients(const T* dy, const T* __restrict__ x, const T* __restrict__ residual,
                        const uint8_t* __restrict__ mask, BnParams<acc_t<T>> p, BnParams<acc_t<T>> q,
                        const acc_t<T>* __restrict__ dweight, const acc_t<T>* __restrict__ dresidual_weight,
                        const acc_t<T>* __restrict__ dbias, acc_t<T> inv_count, BnShape s, BnTiling t,
                        T* __restrict__ dx, T* dresidual) {
  using A = acc_t<T>;
  FT_SHARED(A, staged, 5 * kBnStaged);
  const bool batch_terms = inv_count != A(0);
#pragma unroll 1
  for (BnTile tile(s, t); tile.more(); tile.next()) {
    A mean[kBnColumns], scale[kBnColumns], shift[kBnColumns], slope[kBnColumns], unused[kBnColumns];
    A other_mean[kBnColumns], other_scale[kBnColumns], other_slope[kBnColumns];
    const bool zero = tile.gradient_params(p, dweight, dbias, inv_count, staged, mean, scale, unused, shift, slope);
    __syncthreads();
    const bool other_zero = tile.gradient_params(q, dresidual_weight, dbias, inv_count, staged, other_mean, other_scale,
                                                 unused, shift, other_slope);
    const bool read_dy = !zero || !other_zero;
    tile.for_rows<kBnChunkOf<T> / 2>([&](int64_t at, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      T g[kRows][kBnColumns], v[kRows][kBnColumns], z[kRows][kBnColumns];
      unsigned bits[kRows];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t e = at + u * tile.step();
        tile.template load<kVector>(dy, e, g[u], read_dy);
        tile.template load<kVector>(x, e, v[u], !zero && batch_terms);
        tile.template load<kVector>(residual, e, z[u], !other_zero && batch_terms);
        bits[u] = !mask ? 0xff : read_dy ? tile.template load_bits<kVector>(mask, e) : 0;
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        keep_passing(bits[u], g[u]);
        gradient_row(g[u], mean, scale, shift, slope, batch_terms, zero, v[u]);
        gradient_row(g[u], other_mean, other_scale, shift, other_slope, batch_terms, other_zero, z[u]);
        const int64_t e = at + u * tile.step();
        tile.template store<kVector>(dx, e, v[u]);
        tile.template store<kVector>(dresidual, e, z[u]);
      }
    });
  }
}

}  // namespace fasttricks::cuda

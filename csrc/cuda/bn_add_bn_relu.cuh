// Kernels of bn_add_bn_relu: apply, backward reduction, backward apply. The statistics are those of bn_relu.cuh.
// csrc/math/bn.h has the formulas; p is the BatchNorm of x, q that of the residual.
#pragma once

#include "bn_relu.cuh"

namespace fasttricks::cuda {

// y = relu((x - mean) * weight * rstd + bias + the same of the residual), and the mask's bits. from_x: as in bn_apply.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kBnThreads, kBnBlocksOf<T, kVector, 2>)
    bn_add_bn_apply(const T* __restrict__ x, const T* __restrict__ residual, BnParams<acc_t<T>> p, BnParams<acc_t<T>> q,
                    bool from_x, BnShape s, BnTiling t, T* __restrict__ y, uint8_t* __restrict__ mask) {
  using A = acc_t<T>;
  FT_SHARED(A, staged, 3 * kBnStaged);
#pragma unroll 1
  for (BnTile tile(s, t); tile.more(); tile.next()) {
    A mean[kBnColumns], scale[kBnColumns], bias[kBnColumns];
    A other_mean[kBnColumns], other_scale[kBnColumns], other_bias[kBnColumns];
    const bool skip_x = tile.channel_params(p, staged, mean, scale, bias) && from_x;
    __syncthreads();
    tile.channel_params(q, staged, other_mean, other_scale, other_bias);
#pragma unroll
    for (int j = 0; j < kBnColumns; ++j) bias[j] += other_bias[j];
    tile.for_rows<kBnChunkOf<T> / 2>([&](int64_t at, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      T v[kRows][kBnColumns], z[kRows][kBnColumns];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        tile.template load<kVector>(x, at + u * tile.step(), v[u], !skip_x);
        tile.template load<kVector>(residual, at + u * tile.step(), z[u]);
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        unsigned bits = 0;
#pragma unroll
        for (int j = 0; j < kBnColumns; ++j) {
          const A main = skip_x ? bias[j] : normalized(A(v[u][j]), mean[j], scale[j], bias[j]);
          const T out = relu(T(normalized(A(z[u][j]), other_mean[j], other_scale[j], main)));
          bits |= unsigned(passes(out)) << j;
          z[u][j] = out;
        }
        tile.template store<kVector>(y, at + u * tile.step(), z[u]);
        tile.store_bits(mask, at + u * tile.step(), bits);
      }
    });
  }
}

// partial = (sum dz, sum dz * (x - mean)) of the block's elements of each channel, other_partial = (0, sum dz *
// (residual - its mean)). dz: of dy, or of its sum with a second gradient of y; then dz is also written.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kBnThreads, kBnBlocksOf<T, kVector, 2>)
    bn_add_bn_reduce(const T* __restrict__ dy, FT_PARAMETER(BnSecondGradient<T>) other, const T* __restrict__ x,
                     const T* __restrict__ residual, const uint8_t* __restrict__ mask, BnParams<acc_t<T>> p,
                     BnParams<acc_t<T>> q, BnShape s, BnTiling t, acc_t<T>* __restrict__ partial,
                     acc_t<T>* __restrict__ other_partial, T* __restrict__ dz) {
  using A = acc_t<T>;
  FT_SHARED(A, first, kBnThreads * kBnColumns);
  FT_SHARED(A, second, kBnThreads * kBnColumns);
#pragma unroll 1
  for (BnTile tile(s, t); tile.more(); tile.next()) {
    A mean[kBnColumns], other_mean[kBnColumns], scale[kBnColumns], bias[kBnColumns];
    tile.channel_params(p, first, mean, scale, bias);
    __syncthreads();
    tile.channel_params(q, first, other_mean, scale, bias);
    A sum_dz[kBnColumns] = {}, sum_dz_x[kBnColumns] = {}, sum_dz_z[kBnColumns] = {};
    tile.for_rows<1>([&](int64_t e, auto) {
      T g[kBnColumns], v[kBnColumns], z[kBnColumns];
      tile.template load<kVector>(dy, e, g);
      tile.template load<kVector>(x, e, v);
      tile.template load<kVector>(residual, e, z);
      const unsigned bits = tile.template load_bits<kVector>(mask, e);
      if (other.data) other.template add_to<kVector>(tile, e, g);
      keep_passing(bits, g);
      if (dz) tile.template store<kVector>(dz, e, g);
#pragma unroll
      for (int j = 0; j < kBnColumns; ++j) {
        sum_dz[j] += A(g[j]);
        sum_dz_x[j] += A(g[j]) * (A(v[j]) - mean[j]);
        sum_dz_z[j] += A(g[j]) * (A(z[j]) - other_mean[j]);
      }
    });
    A none[kBnColumns] = {};
    tile.again().store_sums(sum_dz, sum_dz_x, first, second, partial);
    tile.again().store_sums(none, sum_dz_z, first, second, other_partial);
  }
}

// dbias = sum dz, of both; dweight and dresidual_weight as in bn_finalize_backward. One warp per channel.
template <typename A>
__global__ void __launch_bounds__(kBnThreads)
    bn_add_bn_finalize(const A* __restrict__ partial, const A* __restrict__ other_partial, BnShape s, BnTiling t,
                       BnParams<A> p, BnParams<A> q, A* __restrict__ dweight, A* __restrict__ dresidual_weight,
                       A* __restrict__ dbias) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int c = int(blockIdx.x) * (kBnThreads / 32) + warp;
  if (c >= s.channels) return;
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

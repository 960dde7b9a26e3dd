// bn_relu and bn_add_relu in one cooperative launch that keeps rows in shared memory from the reduction to the last
// pass.
#pragma once

#include "bn_relu.cuh"

namespace fasttricks::cuda {

// Rows that a thread keeps for itself: no other thread reads them, so no barrier is needed.
template <typename T>
struct BnSlab {
  static constexpr int kVectors = int(kBnColumns * sizeof(T) / 16);
  uint4* vectors;

  FT_DEVICE void put(int row, const T (&v)[kBnColumns]) const {
    uint4 u[kVectors];
    memcpy(u, v, sizeof u);
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      store_shared(vectors + (row * kVectors + i) * kBnThreads + int(threadIdx.x), u[i]);
  }
  FT_DEVICE void get(int row, T (&v)[kBnColumns]) const {
    uint4 u[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      u[i] = load_shared(vectors + (row * kVectors + i) * kBnThreads + int(threadIdx.x));
    memcpy(v, u, sizeof u);
  }
};

// Calls use(channel, lane) once per channel over the whole grid, with one warp per channel.
template <typename Use>
FT_DEVICE void for_channels_of_grid(const BnShape& s, Use use) {
  const int warps = kBnThreads / 32, blocks = int(gridDim.x);
  for (int c = int(blockIdx.x) * warps + int(threadIdx.x) / 32; c < s.channels; c += blocks * warps)
    use(c, int(threadIdx.x) % 32);
}

// bn_stats, bn_finalize_stats and bn_apply in one cooperative launch. p.mean and p.var are `mean` and `var`.
template <typename T, bool kResidual>
__global__ void __launch_bounds__(kBnThreads, 2)
    bn_forward_slab(const T* __restrict__ x, const T* __restrict__ residual, BnParams<acc_t<T>> p, BnShape s,
                    BnTiling t, acc_t<T>* partial, acc_t<T>* mean_out, acc_t<T>* var_out, T* __restrict__ y,
                    uint8_t* __restrict__ mask) {
  using A = acc_t<T>;
  FT_SHARED(A, first, 2 * kBnThreads * kBnColumns);
  A* const second = first + kBnThreads * kBnColumns;
  FT_DYNAMIC_SHARED(memory);
  const BnSlab<T> slab{reinterpret_cast<uint4*>(memory)};
  int kept = 0;
#pragma unroll 1
  for (BnTile tile(s, t); tile.more(); tile.next()) {
    ColumnMoments<A> sums;
    tile.for_rows<kBnChunkOf<T>>([&](int64_t at, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      T v[kRows][kBnColumns];
#pragma unroll
      for (int u = 0; u < kRows; ++u) tile.template load<true>(x, at + u * tile.step(), v[u]);
#pragma unroll
      for (int u = 0; u < kRows; ++u) slab.put(kept + u, v[u]);
      kept += kRows;
      sums.template add<T, kRows>(v);
    });
    tile.again().store_moments(sums, first, second, partial);
  }
  FT_GRID_BARRIER();
  for_channels_of_grid(s, [&](int c, int lane) { finalize_moments(partial, s, t, c, lane, mean_out, var_out); });
  FT_GRID_BARRIER();

  int row = 0;
#pragma unroll 1
  for (BnTile tile(s, t); tile.more(); tile.next()) {
    A mean[kBnColumns], scale[kBnColumns], bias[kBnColumns];
    const bool skip_x = tile.channel_params(p, first, mean, scale, bias);
    tile.for_rows<kBnChunkOf<T> / 2>([&](int64_t at, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      T z[kRows][kBnColumns];
      if constexpr (kResidual)
#pragma unroll
        for (int u = 0; u < kRows; ++u) tile.template load<true>(residual, at + u * tile.step(), z[u]);
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        T v[kBnColumns];
        slab.get(row++, v);
        const unsigned bits = apply_row<kResidual>(v, mean, scale, bias, skip_x, z[u]);
        tile.template store<true>(y, at + u * tile.step(), z[u]);
        if constexpr (kResidual) tile.store_bits(mask, at + u * tile.step(), bits);
      }
    });
  }
}

// bn_backward_reduce, bn_finalize_backward and bn_backward_apply in one cooperative launch: dz and x are kept.
template <typename T, bool kResidual>
__global__ void __launch_bounds__(kBnThreads, 2)
    bn_backward_slab(const T* __restrict__ dy, const T* __restrict__ x, const uint8_t* __restrict__ mask,
                     BnParams<acc_t<T>> p, BnShape s, BnTiling t, int kept_rows, acc_t<T>* partial, acc_t<T>* dweight,
                     acc_t<T>* dbias, acc_t<T> inv_count, T* __restrict__ dx, T* __restrict__ dresidual) {
  using A = acc_t<T>;
  FT_SHARED(A, first, 2 * kBnThreads * kBnColumns);
  A* const second = first + kBnThreads * kBnColumns;
  FT_DYNAMIC_SHARED(memory);
  const BnSlab<T> x_slab{reinterpret_cast<uint4*>(memory)};
  const BnSlab<T> dz_slab{x_slab.vectors + kept_rows * BnSlab<T>::kVectors * kBnThreads};
  int kept = 0;
#pragma unroll 1
  for (BnTile tile(s, t); tile.more(); tile.next()) {
    A mean[kBnColumns], scale[kBnColumns], bias[kBnColumns];
    tile.channel_params(p, first, mean, scale, bias);
    A sum_dz[kBnColumns] = {}, sum_dz_x[kBnColumns] = {};
    tile.for_rows<kBnChunkOf<T> / 2>([&](int64_t at, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      T g[kRows][kBnColumns], v[kRows][kBnColumns];
      unsigned bits[kRows];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t e = at + u * tile.step();
        tile.template load<true>(dy, e, g[u]);
        tile.template load<true>(x, e, v[u]);
        if constexpr (kResidual) bits[u] = tile.template load_bits<true>(mask, e);
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        if constexpr (!kResidual) bits[u] = passing<T>(v[u], mean, scale, bias);
        keep_passing(bits[u], g[u]);
        dz_slab.put(kept, g[u]);
        x_slab.put(kept++, v[u]);
#pragma unroll
        for (int j = 0; j < kBnColumns; ++j) {
          sum_dz[j] += A(g[u][j]);
          sum_dz_x[j] += A(g[u][j]) * (A(v[u][j]) - mean[j]);
        }
      }
    });
    tile.again().store_sums(sum_dz, sum_dz_x, first, second, partial);
  }
  FT_GRID_BARRIER();
  for_channels_of_grid(s,
                       [&](int c, int lane) { finalize_sums(partial, s, t, c, lane, p.var, p.eps, dweight, dbias); });
  FT_GRID_BARRIER();

  int row = 0;
#pragma unroll 1
  for (BnTile tile(s, t); tile.more(); tile.next()) {
    A mean[kBnColumns], scale[kBnColumns], bias[kBnColumns], shift[kBnColumns], slope[kBnColumns];
    const bool zero = tile.gradient_params(p, dweight, dbias, inv_count, first, mean, scale, bias, shift, slope);
    tile.for_rows<1>([&](int64_t at, auto) {
      T g[kBnColumns], v[kBnColumns];
      dz_slab.get(row, g);
      x_slab.get(row++, v);
      gradient_row(g, mean, scale, shift, slope, inv_count != A(0), zero, v);
      tile.template store<true>(dx, at, v);
      if constexpr (kResidual)
        if (dresidual) tile.template store<true>(dresidual, at, g);
    });
  }
}

}  // namespace fasttricks::cuda

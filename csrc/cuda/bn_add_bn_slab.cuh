// bn_add_bn_relu in one cooperative launch, as bn_slab.cuh has bn_relu.
#pragma once

#include "bn_add_bn_relu.cuh"
#include "bn_slab.cuh"

namespace fasttricks::cuda {

// Where the statistics of one input go.
template <typename A>
struct BnStatistics {
  A *partial, *mean, *var;
};

// bn_stats and bn_finalize_stats of both inputs, bn_add_bn_apply: x and the residual are kept. p and q have the means
// and variances that are written here.
template <typename T>
__global__ void __launch_bounds__(kBnThreads, 2)
    bn_add_bn_forward_slab(const T* __restrict__ x, const T* __restrict__ residual, BnParams<acc_t<T>> p,
                           BnParams<acc_t<T>> q, BnShape s, BnTiling t, int kept_rows, BnStatistics<acc_t<T>> of_x,
                           BnStatistics<acc_t<T>> of_residual, T* __restrict__ y, uint8_t* __restrict__ mask) {
  using A = acc_t<T>;
  FT_SHARED(A, first, 2 * kBnThreads * kBnColumns);
  A* const second = first + kBnThreads * kBnColumns;
  FT_DYNAMIC_SHARED(memory);
  const BnSlab<T> x_slab{reinterpret_cast<uint4*>(memory), kept_rows}, z_slab = x_slab.after();
  int row = 0;
  // one input after the other: as many bytes as both together, and the registers of one
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const BnSlab<T> slab = i ? z_slab : x_slab;
    row = 0;
    reduce_moments<T, true>(i ? residual : x, s, t, i ? of_residual.partial : of_x.partial, first, second,
                            [&](const T(&v)[kBnColumns]) { slab.put(row++, v); });
  }
  FT_GRID_BARRIER();
  for_channels_of_grid(s, [&](int c, int lane) {
    finalize_moments(of_x.partial, s, t, c, lane, of_x.mean, of_x.var);
    finalize_moments(of_residual.partial, s, t, c, lane, of_residual.mean, of_residual.var);
  });
  FT_GRID_BARRIER();

#pragma unroll 1
  for (BnTileBackwards tile(s, t); tile.more(); tile.next()) {
    const PairParams<A> of(tile, p, q, true, first);
    tile.for_rows<kBnChunkOf<T> / 2>([&](int64_t at, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      T v[kRows][kBnColumns], z[kRows][kBnColumns];
      row -= kRows;
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t e = at + u * tile.step();
        const bool kept = x_slab.has(row + kRows - 1 - u);
        load_row_last(x, e, v[u], !kept && !of.skip_x);
        load_row_last(residual, e, z[u], !kept);
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t e = at + u * tile.step();
        x_slab.get(row + kRows - 1 - u, v[u]);
        z_slab.get(row + kRows - 1 - u, z[u]);
        const unsigned bits = of.apply(v[u], z[u]);
        tile.template store<true>(y, e, z[u]);
        tile.store_bits(mask, e, bits);
      }
    });
  }
}

// bn_add_bn_reduce, bn_add_bn_finalize and bn_add_bn_gradients: x, the residual and dz are kept. With a second gradient
// of y the rows of dz that are not kept are written where dresidual goes, and loaded from there.
template <typename T>
__global__ void __launch_bounds__(kBnThreads, 2)
    bn_add_bn_backward_slab(const T* __restrict__ dy, FT_PARAMETER(BnSecondGradient<T>) other, const T* __restrict__ x,
                            const T* __restrict__ residual, const uint8_t* __restrict__ mask, BnParams<acc_t<T>> p,
                            BnParams<acc_t<T>> q, BnShape s, BnTiling t, int kept_rows, acc_t<T>* partial,
                            acc_t<T>* other_partial, acc_t<T>* dweight, acc_t<T>* dresidual_weight, acc_t<T>* dbias,
                            acc_t<T> inv_count, T* __restrict__ dx, T* dresidual) {
  using A = acc_t<T>;
  FT_SHARED(A, first, 2 * kBnThreads * kBnColumns);
  A* const second = first + kBnThreads * kBnColumns;
  FT_DYNAMIC_SHARED(memory);
  const BnSlab<T> x_slab{reinterpret_cast<uint4*>(memory), kept_rows}, z_slab = x_slab.after(),
                                                                       dz_slab = z_slab.after();
  int row = 0;
  reduce_pair_gradients<T, true>(
      dy, other, x, residual, mask, p, q, s, t, partial, other_partial, first, second,
      [&](const BnTile& tile, int64_t e, const T(&g)[kBnColumns], const T(&v)[kBnColumns], const T(&z)[kBnColumns]) {
        if (other.data && !dz_slab.has(row)) tile.template store<true>(dresidual, e, g);
        x_slab.put(row, v);
        z_slab.put(row, z);
        dz_slab.put(row++, g);
      });
  FT_GRID_BARRIER();
  for_channels_of_grid(s, [&](int c, int lane) {
    finalize_pair_sums(partial, other_partial, s, t, c, lane, p, q, dweight, dresidual_weight, dbias);
  });
  FT_GRID_BARRIER();

  const T* const again = other.data ? dresidual : dy;
  const bool batch_terms = inv_count != A(0);
#pragma unroll 1
  for (BnTileBackwards tile(s, t); tile.more(); tile.next()) {
    A mean[kBnColumns], scale[kBnColumns], shift[kBnColumns], slope[kBnColumns], unused[kBnColumns];
    A other_mean[kBnColumns], other_scale[kBnColumns], other_slope[kBnColumns];
    const bool zero = tile.gradient_params(p, dweight, dbias, inv_count, first, mean, scale, unused, shift, slope);
    __syncthreads();
    const bool other_zero = tile.gradient_params(q, dresidual_weight, dbias, inv_count, first, other_mean, other_scale,
                                                 unused, shift, other_slope);
    const bool read_dz = !zero || !other_zero, read_mask = read_dz && !other.data;
    tile.for_rows<kBnPairChunk<T, true>>([&](int64_t at, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      T g[kRows][kBnColumns], v[kRows][kBnColumns], z[kRows][kBnColumns];
      unsigned bits[kRows];
      row -= kRows;
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t e = at + u * tile.step();
        const bool kept = x_slab.has(row + kRows - 1 - u);
        load_row_last(again, e, g[u], !kept && read_dz);
        load_row_last(x, e, v[u], !kept && !zero && batch_terms);
        load_row_last(residual, e, z[u], !kept && !other_zero && batch_terms);
        bits[u] = !kept && read_mask ? tile.template load_bits<true>(mask, e) : 0xff;
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        dz_slab.get(row + kRows - 1 - u, g[u]);
        x_slab.get(row + kRows - 1 - u, v[u]);
        z_slab.get(row + kRows - 1 - u, z[u]);
        keep_passing(bits[u], g[u]);
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t e = at + u * tile.step();
        gradient_row(g[u], mean, scale, shift, slope, batch_terms, zero, v[u]);
        tile.template store<true>(dx, e, v[u]);
        gradient_row(g[u], other_mean, other_scale, shift, other_slope, batch_terms, other_zero, z[u]);
        tile.template store<true>(dresidual, e, z[u]);
      }
    });
  }
}

}  // namespace fasttricks::cuda

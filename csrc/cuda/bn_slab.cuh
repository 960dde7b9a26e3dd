// bn_relu and bn_add_relu in one cooperative launch (bn_add_bn_slab.cuh: bn_add_bn_relu). A thread keeps its first rows
// in shared memory from the reduction to the last pass, and loads the others again there, from the last one to the
// first: what L2 still has comes first.
#pragma once

#include "bn_relu.cuh"

namespace fasttricks::cuda {

// The rows below `rows` that a thread keeps for itself: no other thread reads them, so no barrier is needed.
template <typename T>
struct BnSlab {
  static constexpr int kVectors = int(kBnColumns * sizeof(T) / 16);
  uint4* vectors;
  int rows;

  FT_DEVICE bool has(int row) const { return row < rows; }
  // The slab of another tensor, in the memory after this one.
  FT_DEVICE BnSlab after() const { return {vectors + rows * kVectors * kBnThreads, rows}; }
  FT_DEVICE void put(int row, const T (&v)[kBnColumns]) const {
    if (!has(row)) return;
    uint4 u[kVectors];
    memcpy(u, v, sizeof u);
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      store_shared(vectors + (row * kVectors + i) * kBnThreads + int(threadIdx.x), u[i]);
  }
  // Leaves v as it is if the row is not kept.
  FT_DEVICE void get(int row, T (&v)[kBnColumns]) const {
    if (!has(row)) return;
    uint4 u[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      u[i] = load_shared(vectors + (row * kVectors + i) * kBnThreads + int(threadIdx.x));
    memcpy(v, u, sizeof u);
  }
};

// A block's tiles from the last one to the first, and the rows of each from the last one to the first.
struct BnTileBackwards : BnTile {
  FT_DEVICE BnTileBackwards(const BnShape& s, const BnTiling& t) : BnTile(s, t) {
    tile = int(t.by_units.divide(t.first_unit(int64_t(blockIdx.x) + 1) - 1));
    begin();
  }
  FT_DEVICE void next() {
    __syncthreads();
    tile = hidden(tile) - 1;
    begin();
    any = t.first_unit(hidden(int(blockIdx.x))) < (int64_t(tile) + 1) * t.units;
  }
  FT_DEVICE int64_t step() const { return -BnTile::step(); }
  template <int kRows, typename Body>
  FT_DEVICE void for_rows(Body body) const {
    if (!valid) return;
    int left = (rows - y + t.ty() - 1) >> (8 - t.tx_log2);
    int64_t at = (r0 + y) * s.cols + col - (left - 1) * step();
    if constexpr (kRows > 1)
      for (; left >= kRows; left -= kRows, at += kRows * step()) body(at, std::integral_constant<int, kRows>());
    for (; left > 0; --left, at += step()) body(at, std::integral_constant<int, 1>());
  }
};

// Zeros where `needed` is false.
template <typename T>
FT_DEVICE void load_row_last(const T* p, int64_t at, T (&v)[kBnColumns], bool needed) {
  memset(v, 0, sizeof v);
  if (needed) load_last(p + at, v);
}

// Calls use(channel, lane) once per channel over the whole grid, with one warp per channel.
template <typename Use>
FT_DEVICE void for_channels_of_grid(const BnShape& s, Use use) {
  const int warps = kBnThreads / 32, blocks = int(gridDim.x);
  for (int c = int(blockIdx.x) * warps + int(threadIdx.x) / 32; c < s.channels; c += blocks * warps)
    use(c, int(threadIdx.x) % 32);
}

// bn_stats, bn_finalize_stats and bn_apply in one launch. p.mean and p.var are `mean_out` and `var_out`.
template <typename T, bool kResidual>
__global__ void __launch_bounds__(kBnThreads, 2)
    bn_forward_slab(const T* __restrict__ x, const T* __restrict__ residual, BnParams<acc_t<T>> p, BnShape s,
                    BnTiling t, int kept_rows, acc_t<T>* partial, acc_t<T>* mean_out, acc_t<T>* var_out,
                    T* __restrict__ y, uint8_t* __restrict__ mask) {
  using A = acc_t<T>;
  FT_SHARED(A, first, 2 * kBnThreads * kBnColumns);
  A* const second = first + kBnThreads * kBnColumns;
  FT_DYNAMIC_SHARED(memory);
  const BnSlab<T> slab{reinterpret_cast<uint4*>(memory), kept_rows};
  int row = 0;
  reduce_moments<T, true>(x, s, t, partial, first, second, [&](const T(&v)[kBnColumns]) { slab.put(row++, v); });
  FT_GRID_BARRIER();
  for_channels_of_grid(s, [&](int c, int lane) { finalize_moments(partial, s, t, c, lane, mean_out, var_out); });
  FT_GRID_BARRIER();

#pragma unroll 1
  for (BnTileBackwards tile(s, t); tile.more(); tile.next()) {
    A mean[kBnColumns], scale[kBnColumns], bias[kBnColumns];
    const bool skip_x = tile.channel_params(p, first, mean, scale, bias);
    tile.for_rows<kBnChunkOf<T> / (kResidual ? 2 : 1)>([&](int64_t at, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      T v[kRows][kBnColumns], z[kRows][kBnColumns];
      row -= kRows;
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t e = at + u * tile.step();
        load_row_last(x, e, v[u], !skip_x && !slab.has(row + kRows - 1 - u));
        if constexpr (kResidual) load_row_last(residual, e, z[u], true);
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t e = at + u * tile.step();
        slab.get(row + kRows - 1 - u, v[u]);
        const unsigned bits = apply_row<kResidual>(v[u], mean, scale, bias, skip_x, z[u]);
        tile.template store<true>(y, e, z[u]);
        if constexpr (kResidual) tile.store_bits(mask, e, bits);
      }
    });
  }
}

// bn_backward_reduce, bn_finalize_backward and bn_backward_apply in one launch: dz and x are kept.
// kTwo: add(tile, e, row of dy) adds the second gradient; of dz, which is loaded again in place of dy, the rows that
// are not kept are written, all of them if `need_dz`. Else dz, if not null, is written by the last pass.
template <typename T, bool kResidual, bool kTwo, typename Add>
FT_DEVICE void backward_slab(const T* __restrict__ dy, const T* __restrict__ x, const uint8_t* __restrict__ mask,
                             const BnParams<acc_t<T>>& p, const BnShape& s, const BnTiling& t, int kept_rows,
                             acc_t<T>* partial, acc_t<T>* dweight, acc_t<T>* dbias, acc_t<T> inv_count,
                             T* __restrict__ dx, T* dz, bool need_dz, acc_t<T>* first, unsigned char* memory, Add add) {
  using A = acc_t<T>;
  A* const second = first + kBnThreads * kBnColumns;
  const BnSlab<T> x_slab{reinterpret_cast<uint4*>(memory), kept_rows}, dz_slab = x_slab.after();
  int row = 0;
  reduce_gradients<T, true, kResidual, kBnChunkOf<T> / 2>(
      dy, x, mask, p, s, t, partial, first, second,
      [&](const BnTile& tile, int64_t e, T(&g)[kBnColumns], const T(&v)[kBnColumns], unsigned bits) {
        add(tile, e, g);
        keep_passing(bits, g);
        if constexpr (kTwo)
          if (need_dz || !dz_slab.has(row)) tile.template store<true>(dz, e, g);
        dz_slab.put(row, g);
        x_slab.put(row++, v);
      });
  FT_GRID_BARRIER();
  for_channels_of_grid(s,
                       [&](int c, int lane) { finalize_sums(partial, s, t, c, lane, p.var, p.eps, dweight, dbias); });
  FT_GRID_BARRIER();

  const T* const again = kTwo ? dz : dy;
  const bool write_dz = !kTwo && kResidual && need_dz, batch_terms = inv_count != A(0);
#pragma unroll 1
  for (BnTileBackwards tile(s, t); tile.more(); tile.next()) {
    A mean[kBnColumns], scale[kBnColumns], bias[kBnColumns], shift[kBnColumns], slope[kBnColumns];
    const bool zero = tile.gradient_params(p, dweight, dbias, inv_count, first, mean, scale, bias, shift, slope);
    const bool read_x = !zero && (batch_terms || !(kResidual || kTwo)), read_dz = !zero || write_dz;
    tile.for_rows<kBnChunkOf<T> / 2>([&](int64_t at, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      T g[kRows][kBnColumns], v[kRows][kBnColumns];
      [[maybe_unused]] unsigned bits[kRows];
      row -= kRows;
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t e = at + u * tile.step();
        const bool kept = x_slab.has(row + kRows - 1 - u);
        load_row_last(again, e, g[u], !kept && read_dz);
        load_row_last(x, e, v[u], !kept && read_x);
        if constexpr (kResidual && !kTwo) bits[u] = !kept && read_dz ? tile.template load_bits<true>(mask, e) : 0xff;
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t e = at + u * tile.step();
        dz_slab.get(row + kRows - 1 - u, g[u]);
        x_slab.get(row + kRows - 1 - u, v[u]);
        if constexpr (!kTwo) {
          if constexpr (!kResidual) bits[u] = passing<T>(v[u], mean, scale, bias);
          keep_passing(bits[u], g[u]);
        }
        gradient_row(g[u], mean, scale, shift, slope, batch_terms, zero, v[u]);
        tile.template store<true>(dx, e, v[u]);
        if constexpr (kResidual && !kTwo)
          if (write_dz) tile.template store<true>(dz, e, g[u]);
      }
    });
  }
}

template <typename T, bool kResidual>
__global__ void __launch_bounds__(kBnThreads, 2)
    bn_backward_slab(const T* __restrict__ dy, const T* __restrict__ x, const uint8_t* __restrict__ mask,
                     BnParams<acc_t<T>> p, BnShape s, BnTiling t, int kept_rows, acc_t<T>* partial, acc_t<T>* dweight,
                     acc_t<T>* dbias, acc_t<T> inv_count, T* __restrict__ dx, T* __restrict__ dresidual) {
  FT_SHARED(acc_t<T>, first, 2 * kBnThreads * kBnColumns);
  FT_DYNAMIC_SHARED(memory);
  backward_slab<T, kResidual, false>(dy, x, mask, p, s, t, kept_rows, partial, dweight, dbias, inv_count, dx, dresidual,
                                     dresidual != nullptr, &first[0], memory,
                                     [](const BnTile&, int64_t, T(&)[kBnColumns]) {});
}

// With two gradients of y. dz is workspace unless need_dz.
template <typename T, bool kResidual>
__global__ void __launch_bounds__(kBnThreads, 2)
    bn_backward_slab_two(const T* __restrict__ dy, FT_PARAMETER(BnSecondGradient<T>) other, const T* __restrict__ x,
                         const uint8_t* __restrict__ mask, BnParams<acc_t<T>> p, BnShape s, BnTiling t, int kept_rows,
                         acc_t<T>* partial, acc_t<T>* dweight, acc_t<T>* dbias, acc_t<T> inv_count, T* __restrict__ dx,
                         T* dz, bool need_dz) {
  FT_SHARED(acc_t<T>, first, 2 * kBnThreads * kBnColumns);
  FT_DYNAMIC_SHARED(memory);
  backward_slab<T, kResidual, true>(
      dy, x, mask, p, s, t, kept_rows, partial, dweight, dbias, inv_count, dx, dz, need_dz, &first[0], memory,
      [&](const BnTile& tile, int64_t e, T(&g)[kBnColumns]) { other.template add_to<true>(tile, e, g); });
}

}  // namespace fasttricks::cuda

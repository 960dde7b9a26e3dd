// Kernels of bn_add_relu_pool, which write y = relu((x - mean) * weight * rstd + bias + residual), the mask's bits and
// the means of the 2x2 windows of y: of its rounded values, over the pixels inside the image. The statistics are those
// of bn_relu.cuh, and from_x is as in bn_apply.
#pragma once

#include "bn_add_relu_pool_plan.h"
#include "bn_relu.cuh"

namespace fasttricks::cuda {

// 1 / the pixels of a window that has a second column and a second row, or not.
template <typename A>
FT_DEVICE A window_share(bool right, bool below) {
  return A((right ? 0.5f : 1.0f) * (below ? 0.5f : 1.0f));
}

// The mean of a window; value(row, column) is one of its pixels.
template <typename T, typename Value>
FT_DEVICE T window_mean(bool right, bool below, Value value) {
  using A = acc_t<T>;
  A sum = A(value(0, 0));
  if (right) sum += A(value(0, 1));
  if (below) sum += A(value(1, 0));
  if (below && right) sum += A(value(1, 1));
  return T(sum * window_share<A>(right, below));
}

// NHWC with vectors: a thread has 8 channels of the pixels of a window, a row of s.
template <typename T>
__global__ void __launch_bounds__(kBnThreads, kBnBlocksOf<T, true, 2>)
    bn_apply_pool_pixels(const T* __restrict__ x, const T* __restrict__ residual, BnParams<acc_t<T>> p, bool from_x,
                         BnShape s, BnWindows w, BnTiling t, T* __restrict__ y, uint8_t* __restrict__ mask,
                         T* __restrict__ pooled) {
  using A = acc_t<T>;
  constexpr int kPixels = sizeof(T) == 8 ? 2 : 4;  // under way together
  FT_SHARED(A, staged, 3 * kBnStaged);
#pragma unroll 1
  for (BnTile tile(s, t); tile.more(); tile.next()) {
    A mean[kBnColumns], scale[kBnColumns], bias[kBnColumns];
    const bool skip_x = tile.channel_params(p, staged, mean, scale, bias) && from_x;
    tile.for_rows<1>([&](int64_t at, auto) {
      const int64_t window = s.by_channels.divide(at), line = w.by_across.divide(window),
                    channel = at - window * s.cols;
      const int64_t image = w.by_down.divide(line), row = line - image * w.down, column = window - line * w.across;
      const int64_t first = ((image * w.height + 2 * row) * w.width + 2 * column) * s.cols + channel;
      const bool right = 2 * column + 1 < w.width, below = 2 * row + 1 < w.height;
      A sum[kBnColumns] = {};
#pragma unroll
      for (int begin = 0; begin < 4; begin += kPixels) {
        T v[kPixels][kBnColumns], z[kPixels][kBnColumns];
        const auto inside = [&](int k) { return (k % 2 == 0 || right) && (k < 2 || below); };
        const auto offset = [&](int k) { return first + (k % 2 + (k < 2 ? 0 : w.width)) * s.cols; };
#pragma unroll
        for (int u = 0; u < kPixels; ++u) {
          tile.template load<true>(x, offset(begin + u), v[u], inside(begin + u) && !skip_x);
          tile.template load<true>(residual, offset(begin + u), z[u], inside(begin + u));
        }
#pragma unroll
        for (int u = 0; u < kPixels; ++u) {
          if (!inside(begin + u)) continue;
          const unsigned bits = apply_row<true>(v[u], mean, scale, bias, skip_x, z[u]);
          tile.template store<true>(y, offset(begin + u), z[u]);
          tile.store_bits(mask, offset(begin + u), bits);
#pragma unroll
          for (int j = 0; j < kBnColumns; ++j) sum[j] += A(z[u][j]);
        }
      }
      if (row >= w.pooled_height || column >= w.pooled_width) return;
      T means[kBnColumns];
#pragma unroll
      for (int j = 0; j < kBnColumns; ++j) means[j] = T(sum[j] * window_share<A>(right, below));
      const int64_t to = (image * w.pooled_height + row) * w.pooled_width + column;
      tile.template store<true>(pooled, to * s.cols + channel, means);
    });
  }
}

// y of 8 neighbours in z, of which the first `until` have the numbers `a`, the others `b`: mean, scale and bias;
// returns the mask's bits.
template <typename T, typename A>
FT_DEVICE unsigned apply_neighbours(const T (&v)[kBnColumns], const A (&a)[3], const A (&b)[3], int until, bool skip_x,
                                    T (&z)[kBnColumns]) {
  A mean[kBnColumns], scale[kBnColumns], bias[kBnColumns];
#pragma unroll
  for (int j = 0; j < kBnColumns; ++j) {
    mean[j] = j < until ? a[0] : b[0];
    scale[j] = j < until ? a[1] : b[1];
    bias[j] = j < until ? a[2] : b[2];
  }
  return apply_row<true>(v, mean, scale, bias, skip_x, z);
}

// The parameters of the planes that a block has at once, in shared memory: mean, scale, bias, and 0 if the statistics
// are finite and the scale is 0.
template <typename A, int kPlanes>
FT_DEVICE void stage_planes(const BnParams<A>& p, const BnShape& s, int64_t plane, int planes, A* staged) {
  for (int k = int(threadIdx.x); k < planes; k += kBnThreads) {
    const int c = int(s.by_channels.remainder(plane + k));
    const A mean = load(p.mean + c), var = load(p.var + c);
    const A scale = (p.weight ? load_param<A>(p.weight, p.weight_type, c) : A(1)) * bn_rstd(var, p.eps);
    store_shared(staged + k, mean);
    store_shared(staged + kPlanes + k, scale);
    store_shared(staged + 2 * kPlanes + k, p.bias ? load_param<A>(p.bias, p.bias_type, c) : A(0));
    store_shared(staged + 3 * kPlanes + k, A(scale != A(0) || !isfinite(mean) || !isfinite(var)));
  }
}

// NCHW with vectors: a thread has neighbours in memory. The rounded y of the block's units passes through shared
// memory. It has two halves: a thread may write one while others still read the other, so one barrier is enough.
template <typename T>
__global__ void __launch_bounds__(kBnThreads, sizeof(T) == 8 ? 2 : 3)
    bn_apply_pool_lines(const T* __restrict__ x, const T* __restrict__ residual, BnParams<acc_t<T>> p, bool from_x,
                        BnShape s, BnWindows w, BnPoolTiling t, T* __restrict__ y, uint8_t* __restrict__ mask,
                        T* __restrict__ pooled) {
  using A = acc_t<T>;
  constexpr int kVectors = bn_pool_vectors(sizeof(T)), kStep = kBnThreads * kBnColumns, kAtOnce = kStep * kVectors;
  constexpr int kWords = int(kBnColumns * sizeof(T) / sizeof(uint4));
  constexpr int kPlanes = kAtOnce / kBnPoolLeastPlane + 2;
  FT_SHARED(T, staged, 2 * kAtOnce);
  FT_SHARED(A, numbers, 2 * 4 * kPlanes);
  const int64_t end = t.first_unit(blockIdx.x + 1);
  const auto last_plane = [&](int64_t unit) {
    return s.by_inner.divide((end - unit < t.units_at_once ? end : unit + t.units_at_once) * t.unit - 1);
  };
  int64_t unit = t.first_unit(blockIdx.x), plane0 = s.by_inner.divide(unit * t.unit);
  stage_planes<A, kPlanes>(p, s, plane0, int(last_plane(unit) - plane0) + 1, numbers);
  __syncthreads();
#pragma unroll 1
  for (int half = 0; unit < end; half ^= 1) {
    const int units = end - unit < t.units_at_once ? int(end - unit) : t.units_at_once, count = units * t.unit;
    const int own = int(threadIdx.x) * kBnColumns;
    const int64_t first = unit * t.unit + own;
    T* const kept = staged + half * kAtOnce;
    uint4 x_words[kVectors][kWords] = {}, residual_words[kVectors][kWords] = {};
    int until[kVectors], slot[kVectors];  // until: how many of the 8 belong to the first plane
    bool skip_x[kVectors];
    const A* const of_planes = numbers + half * 4 * kPlanes;
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int64_t e = first + u * kStep, plane = s.by_inner.divide(e), left = (plane + 1) * s.inner - e;
      until[u] = left < kBnColumns ? int(left) : kBnColumns;
      slot[u] = own + u * kStep < count ? int(plane - plane0) : 0;
      const A* const of_a = of_planes + 3 * kPlanes + slot[u];
      skip_x[u] = from_x & (load_shared(of_a) + load_shared(of_a + (until[u] < kBnColumns)) == A(0));
    }
    // words are made values later, and no branch comes between the loads: all are under way together
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const bool inside = own + u * kStep < count;
      if (inside) load(reinterpret_cast<const uint4*>(residual + first + u * kStep), residual_words[u]);
      if (inside & !skip_x[u]) load(reinterpret_cast<const uint4*>(x + first + u * kStep), x_words[u]);
    }
    const int64_t next = unit + units;
    if (next < end) {
      const int64_t next_plane = s.by_inner.divide(next * t.unit);
      const int planes = int(last_plane(next) - next_plane) + 1;
      stage_planes<A, kPlanes>(p, s, next_plane, planes, numbers + (half ^ 1) * 4 * kPlanes);
      plane0 = next_plane;
    }
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      if (own + u * kStep >= count) continue;
      const int64_t e = first + u * kStep;
      A a[3], b[3];
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        a[i] = load_shared(of_planes + i * kPlanes + slot[u]);
        b[i] = load_shared(of_planes + i * kPlanes + slot[u] + (until[u] < kBnColumns));
      }
      T v[kBnColumns], z[kBnColumns];
      memcpy(v, x_words[u], sizeof v);
      memcpy(z, residual_words[u], sizeof z);
      const unsigned bits = apply_neighbours(v, a, b, until[u], skip_x[u], z);
      store(y + e, z);
      store(mask + e / 8, uint8_t(bits));
      memcpy(residual_words[u], z, sizeof z);
      uint4* const to = reinterpret_cast<uint4*>(kept + own + u * kStep);
#pragma unroll
      for (int i = 0; i < kWords; ++i) store_shared(to + i, residual_words[u][i]);
    }
    __syncthreads();
    T* const means = pooled + unit * t.means;
    for (int i = int(threadIdx.x); i < units * t.means; i += kBnThreads) {
      const int line = int(t.by_pooled_width.divide(uint32_t(i))), column = i - line * int(w.pooled_width);
      const int group = int(t.by_pooled_rows.divide(uint32_t(line))), row = line - group * t.group_pooled_rows;
      const T* const at = kept + group * t.group_size + 2 * row * int(w.width) + 2 * column;
      const bool right = 2 * column + 1 < w.width, below = 2 * row + 1 < t.group_rows;
      store(means + i, window_mean<T>(right, below, [&](int r, int c) { return load_shared(at + r * w.width + c); }));
    }
    unit = next;
  }
}

// The means alone, from y: for shapes and pointers that the other kernels do not take. A pixel of s.inner == 1 (NHWC)
// has all channels.
template <typename T>
__global__ void __launch_bounds__(kBnThreads)
    bn_pool_means(const T* __restrict__ y, BnShape s, BnWindows w, int64_t count, T* __restrict__ pooled) {
  const int64_t step = int64_t(gridDim.x) * kBnThreads, pixel = s.inner == 1 ? s.channels : 1;
  for (int64_t i = int64_t(blockIdx.x) * kBnThreads + int(threadIdx.x); i < count; i += step) {
    const int64_t mean = s.inner == 1 ? s.by_channels.divide(i) : i, line = w.by_pooled_width.divide(mean);
    const int64_t plane = w.by_pooled_height.divide(line), row = line - plane * w.pooled_height;
    const int64_t column = mean - line * w.pooled_width;
    const T* const at = y + ((plane * w.height + 2 * row) * w.width + 2 * column) * pixel + (i - mean * pixel);
    const bool right = 2 * column + 1 < w.width, below = 2 * row + 1 < w.height;
    store(pooled + i, window_mean<T>(right, below, [&](int r, int c) { return load(at + (r * w.width + c) * pixel); }));
  }
}

}  // namespace fasttricks::cuda

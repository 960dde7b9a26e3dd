// Host side of avgpool_conv1x1 on raw pointers: which kernels run, with which grids.
#pragma once

#include "avgpool_conv1x1.cuh"
#include "launch.cuh"

namespace fasttricks::cuda {

inline bool avgpool_aligned(const void* p, size_t bytes = 16) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// x (or dx), y (or dy) and the weight may be read and written 16 bytes at a time; pointers that are not used are null.
template <typename T>
AvgPoolWide avgpool_wide(const AvgPoolShape& s, bool nhwc, const void* x, const void* gradient, const void* weight) {
  constexpr int kV = kAvgPoolVector<T>;
  const bool planes = s.stride == 1 ? s.h * s.w % kV == 0 : s.w % kV == 0 && s.wo % (kV / 2) == 0;
  return {(nhwc ? s.c % kV == 0 : planes) && avgpool_aligned(x),
          (nhwc ? s.o % kV == 0 : s.plane() % kV == 0) && avgpool_aligned(gradient),
          s.c % kV == 0 && avgpool_aligned(weight),
          !nhwc && s.stride == 2 && s.w % 2 == 0 && avgpool_aligned(x, 2 * sizeof(T))};
}

inline dim3 avgpool_grid(const AvgPoolPlan& p) {
  return dim3(unsigned(p.tiles_m) * unsigned(p.tiles_n), unsigned(p.splits));
}

template <typename T>
void avgpool_forward_run(const T* x, const T* weight, const T* bias, const AvgPoolShape& s, bool nhwc, const Device& d,
                         T* y, cudaStream_t stream) {
  const AvgPoolWide wide = avgpool_wide<T>(s, nhwc, x, y, weight);
  if constexpr (sizeof(T) == 2) {
    const AvgPoolSlabPlan slab = avgpool_slab_plan(s, d.sm_count, d.shared_per_sm, d.shared_per_block);
    if (slab.groups > 0) {
      const auto kernel = nhwc ? &avgpool_conv1x1_forward_slab<T, true> : &avgpool_conv1x1_forward_slab<T, false>;
      return launch(kernel, dim3(unsigned(slab.tiles_m) * unsigned(slab.groups)), kAvgPoolThreads,
                    size_t(slab.shared_bytes), stream, x, weight, bias, s, slab, wide, y);
    }
  }
  const AvgPoolPlan plan = avgpool_plan(s, AvgPoolProduct::kForward, sizeof(T), d.sm_count);
  const auto kernel = nhwc ? &avgpool_conv1x1_forward<T, true> : &avgpool_conv1x1_forward<T, false>;
  launch(kernel, avgpool_grid(plan), kAvgPoolThreads, kAvgPoolSharedBytes<T>, stream, x, weight, bias, s, plan, wide,
         y);
}

template <typename T>
void avgpool_input_run(const T* dy, const T* weight, const AvgPoolShape& s, bool nhwc, const Device& d, T* dx,
                       cudaStream_t stream) {
  const AvgPoolPlan plan = avgpool_plan(s, AvgPoolProduct::kInput, sizeof(T), d.sm_count);
  const auto kernel = nhwc ? &avgpool_conv1x1_input<T, true> : &avgpool_conv1x1_input<T, false>;
  launch(kernel, avgpool_grid(plan), kAvgPoolThreads, kAvgPoolSharedBytes<T>, stream, dy, weight, s, plan,
         avgpool_wide<T>(s, nhwc, dx, dy, weight), dx);
}

template <typename T>
void avgpool_sum_splits_run(const acc_t<T>* partial, int64_t splits, int64_t numel, T* out, cudaStream_t stream) {
  const int64_t each = int64_t(kAvgPoolThreads) * kAvgPoolVector<T>;
  launch(&avgpool_sum_splits<T>, dim3(unsigned(ceil_div(numel, each))), kAvgPoolThreads, 0, stream, partial, splits,
         numel, out);
}

// `partial` has plan.splits * Cout * C values, to be summed.
template <typename T>
void avgpool_weight_run(const T* dy, const T* x, const AvgPoolShape& s, bool nhwc, const AvgPoolPlan& plan,
                        acc_t<T>* partial, cudaStream_t stream) {
  const auto kernel = nhwc ? &avgpool_conv1x1_weight<T, true> : &avgpool_conv1x1_weight<T, false>;
  launch(kernel, avgpool_grid(plan), kAvgPoolThreads, kAvgPoolSharedBytes<T>, stream, dy, x, s, plan,
         avgpool_wide<T>(s, nhwc, x, dy, nullptr), partial);
}

// `partial` has splits * Cout values, to be summed.
template <typename T>
void avgpool_bias_run(const T* dy, const AvgPoolShape& s, bool nhwc, int64_t splits, acc_t<T>* partial,
                      cudaStream_t stream) {
  const int64_t channels = nhwc ? kAvgPoolThreads : kAvgPoolThreads / 32;
  launch(&avgpool_bias<T>, dim3(unsigned(ceil_div(s.o, channels)), unsigned(splits)), kAvgPoolThreads, 0, stream, dy, s,
         nhwc, int(splits), partial);
}

}  // namespace fasttricks::cuda

// Host side of bn_add_relu_pool on raw pointers: which kernels run, with which grids. Used by the launchers and by the
// emulator.
#pragma once

#include "bn_add_relu_pool.cuh"
#include "bn_relu_run.cuh"

namespace fasttricks::cuda {

// y, the mask and the means from given statistics.
template <typename T>
void bn_apply_pool_run(const T* x, const T* residual, const BnParams<acc_t<T>>& p, bool from_x, const BnShape& s,
                       const BnWindows& w, const Device& d, T* y, uint8_t* mask, T* pooled, cudaStream_t stream) {
  const bool aligned = aligned16({x, residual, y, pooled});
  if (s.inner == 1 && bn_vectors_fit(s) && aligned) {
    const BnShape shape = bn_window_shape(s, w);
    const BnTiling t = bn_wave(&bn_apply_pool_pixels<T>, shape, d);
    launch(&bn_apply_pool_pixels<T>, dim3(unsigned(t.blocks)), kBnThreads, 0, stream, x, residual, p, from_x, shape, w,
           t, y, mask, pooled);
    return;
  }
  const auto lines = &bn_apply_pool_lines<T>;
  BnPoolTiling t;
  if (s.inner > 1 && aligned &&
      bn_pool_tile(s, w, sizeof(T), int64_t(d.sm_count) * std::max(1, resident_blocks(lines, kBnThreads, 0, d)), &t)) {
    launch(lines, dim3(unsigned(t.blocks)), kBnThreads, 0, stream, x, residual, p, from_x, s, w, t, y, mask, pooled);
    return;
  }
  bn_apply_run(x, residual, p, from_x, s, d, y, mask, stream);
  const int64_t count = s.rows * s.cols / (w.height * w.width) * w.pooled_height * w.pooled_width;
  const int64_t most = int64_t(d.sm_count) * std::max(1, resident_blocks(&bn_pool_means<T>, kBnThreads, 0, d));
  launch(&bn_pool_means<T>, dim3(unsigned(std::min(most, ceil_div(count, kBnThreads)))), kBnThreads, 0, stream,
         static_cast<const T*>(y), s, w, count, pooled);
}

}  // namespace fasttricks::cuda

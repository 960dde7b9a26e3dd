// Host side of bn_add_bn_relu on raw pointers: which kernels run, with which grids. Used by the launchers and by the
// emulator. The statistics of both inputs are bn_stats_run's.
#pragma once

#include "bn_add_bn_relu.cuh"
#include "bn_relu_run.cuh"

namespace fasttricks::cuda {

// y and the mask from the statistics of both; p is the BatchNorm of x, q that of the residual.
template <typename T>
void bn_add_bn_apply_run(const T* x, const T* residual, const BnParams<acc_t<T>>& p, const BnParams<acc_t<T>>& q,
                         bool from_x, const BnShape& s, const Device& d, T* y, uint8_t* mask, cudaStream_t stream) {
  const bool vector = bn_vectors_fit(s) && aligned16({x, residual, y});
  const BnShape shape = vector ? s : bn_flat(s);
  const auto kernel = vector ? &bn_add_bn_apply<T, true> : &bn_add_bn_apply<T, false>;
  const BnTiling t = bn_wave(kernel, shape, d);
  launch(kernel, dim3(unsigned(t.blocks)), kBnThreads, 0, stream, x, residual, p, q, from_x, shape, t, y, mask);
}

// One reduction for all sums, then dx and dresidual in one pass. count: values of a channel; 0 where the statistics are
// constants. Each partial has bn_most_partials(...) values.
template <typename T>
void bn_add_bn_backward_run(const T* dy, const BnSecondGradient<T>& extra, const T* x, const T* residual,
                            const uint8_t* mask, const BnParams<acc_t<T>>& p, const BnParams<acc_t<T>>& q,
                            int64_t count, const BnShape& s, const Device& d, acc_t<T>* partial,
                            acc_t<T>* other_partial, acc_t<T>* dweight, acc_t<T>* dresidual_weight, acc_t<T>* dbias,
                            T* dx, T* dresidual, cudaStream_t stream) {
  using A = acc_t<T>;
  // dz may be where dresidual will be: every element is read before its gradient is written
  T* const dz = extra.data ? dresidual : nullptr;
  const bool vector = bn_vectors_fit(s) && extra.vectors_fit() && aligned16({dy, x, residual, dz});
  const auto reduce = vector ? &bn_add_bn_reduce<T, true> : &bn_add_bn_reduce<T, false>;
  const BnTiling t = bn_wave(reduce, s, d);
  launch(reduce, dim3(unsigned(t.blocks)), kBnThreads, 0, stream, dy, extra, x, residual, mask, p, q, s, t, partial,
         other_partial, dz);
  launch(&bn_add_bn_finalize<A>, dim3(unsigned(ceil_div(s.channels, kBnThreads / 32))), kBnThreads, 0, stream,
         static_cast<const A*>(partial), static_cast<const A*>(other_partial), s, t, p, q, dweight, dresidual_weight,
         dbias);
  if (dz) dy = dz, mask = nullptr;
  const A inv_count = count ? A(1) / A(count) : A(0);
  const bool wide = bn_vectors_fit(s) && aligned16({dy, x, residual, dx, dresidual});
  const BnShape shape = wide ? s : bn_flat(s);
  const auto gradients = wide ? &bn_add_bn_gradients<T, true> : &bn_add_bn_gradients<T, false>;
  const BnTiling tiling = bn_wave(gradients, shape, d);
  launch(gradients, dim3(unsigned(tiling.blocks)), kBnThreads, 0, stream, dy, x, residual, mask, p, q, dweight,
         dresidual_weight, dbias, inv_count, shape, tiling, dx, dresidual);
}

}  // namespace fasttricks::cuda

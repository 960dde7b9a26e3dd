// Host side of bn_add_bn_relu on raw pointers: which kernels run, with which grids. Used by the launchers and by the
// emulator.
#pragma once

#include "bn_add_bn_slab.cuh"
#include "bn_relu_run.cuh"

namespace fasttricks::cuda {

// y, the mask and the statistics of both in one launch; p is the BatchNorm of x, q that of the residual. Returns
// whether there is one; else bn_stats_run of each and bn_add_bn_apply_run do it.
template <typename T>
bool bn_add_bn_forward_slab_run(const T* x, const T* residual, const BnParams<acc_t<T>>& p, const BnParams<acc_t<T>>& q,
                                const BnShape& s, const Device& d, const BnStatistics<acc_t<T>>& of_x,
                                const BnStatistics<acc_t<T>>& of_residual, T* y, uint8_t* mask, cudaStream_t stream) {
  if constexpr (sizeof(T) < 8) {
    const auto kernel = &bn_add_bn_forward_slab<T>;
    BnSlabPlan plan;
    if (bn_vectors_fit(s) && aligned16({x, residual, y}) && bn_slab_fits(kernel, s, d, sizeof(T), 2, &plan)) {
      const BnTiling& t = plan.tiling;
      return launch_cooperative(kernel, dim3(unsigned(t.blocks)), kBnThreads, size_t(plan.bytes), stream, x, residual,
                                p, q, s, t, plan.kept_rows, of_x, of_residual, y, mask);
    }
  }
  return false;
}

// y and the mask from the statistics of both.
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
  const A inv_count = count ? A(1) / A(count) : A(0);
  const bool vectors_fit = bn_vectors_fit(s) && extra.vectors_fit();
  if constexpr (sizeof(T) < 8) {
    const auto kernel = &bn_add_bn_backward_slab<T>;
    BnSlabPlan plan;
    if (vectors_fit && aligned16({dy, x, residual, dx, dresidual}) && bn_slab_fits(kernel, s, d, sizeof(T), 3, &plan)) {
      const BnTiling& t = plan.tiling;
      if (launch_cooperative(kernel, dim3(unsigned(t.blocks)), kBnThreads, size_t(plan.bytes), stream, dy, extra, x,
                             residual, mask, p, q, s, t, plan.kept_rows, partial, other_partial, dweight,
                             dresidual_weight, dbias, inv_count, dx, dresidual))
        return;
    }
  }
  // dz may be where dresidual will be: every element is read before its gradient is written
  T* const dz = extra.data ? dresidual : nullptr;
  const bool vector = vectors_fit && aligned16({dy, x, residual, dz});
  const auto reduce = vector ? &bn_add_bn_reduce<T, true> : &bn_add_bn_reduce<T, false>;
  const BnTiling t = bn_wave(reduce, s, d);
  launch(reduce, dim3(unsigned(t.blocks)), kBnThreads, 0, stream, dy, extra, x, residual, mask, p, q, s, t, partial,
         other_partial, dz);
  launch(&bn_add_bn_finalize<A>, dim3(unsigned(ceil_div(s.channels, kBnThreads / 32))), kBnThreads, 0, stream,
         static_cast<const A*>(partial), static_cast<const A*>(other_partial), s, t, p, q, dweight, dresidual_weight,
         dbias);
  if (dz) dy = dz, mask = nullptr;
  const bool wide = bn_vectors_fit(s) && aligned16({dy, x, residual, dx, dresidual});
  const BnShape shape = wide ? s : bn_flat(s);
  const auto gradients = wide ? &bn_add_bn_gradients<T, true> : &bn_add_bn_gradients<T, false>;
  const BnTiling tiling = bn_wave(gradients, shape, d);
  launch(gradients, dim3(unsigned(tiling.blocks)), kBnThreads, 0, stream, dy, x, residual, mask, p, q, dweight,
         dresidual_weight, dbias, inv_count, shape, tiling, dx, dresidual);
}

}  // namespace fasttricks::cuda

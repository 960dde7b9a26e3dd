// Host side of bn_relu on raw pointers: which kernels run, with which grids. Used by the launchers and by the emulator.
#pragma once

#include "bn_slab.cuh"
#include "launch.cuh"

namespace fasttricks::cuda {

inline bool aligned16(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  return bits % 16 == 0;
}

// One full wave: as many blocks as the card holds of this kernel, which share the tensor evenly.
template <typename Kernel>
BnTiling bn_wave(Kernel kernel, const BnShape& s, const Device& d) {
  return bn_tile(s, int64_t(d.sm_count) * std::max(1, resident_blocks(kernel, kBnThreads, 0, d)));
}

// mean and biased variance; `partial` has bn_most_partials(...) values.
template <typename T>
void bn_stats_run(const T* x, const BnShape& s, const Device& d, acc_t<T>* partial, acc_t<T>* mean, acc_t<T>* var,
                  cudaStream_t stream) {
  const auto kernel = bn_vectors_fit(s) && aligned16({x}) ? &bn_stats<T, true> : &bn_stats<T, false>;
  const BnTiling t = bn_wave(kernel, s, d);
  launch(kernel, dim3(unsigned(t.blocks)), kBnThreads, 0, stream, x, s, t, partial);
  launch(&bn_finalize_stats<acc_t<T>>, dim3(unsigned(ceil_div(s.channels, kBnThreads / 32))), kBnThreads, 0, stream,
         static_cast<const acc_t<T>*>(partial), s, t, mean, var);
}

// residual and mask: both or neither.
template <typename T>
void bn_apply_run(const T* x, const T* residual, const BnParams<acc_t<T>>& p, bool from_x, const BnShape& s,
                  const Device& d, T* y, uint8_t* mask, cudaStream_t stream) {
  const bool vector = bn_vectors_fit(s) && aligned16({x, residual, y});
  const BnShape shape = vector ? s : bn_flat(s);
  const auto kernel = residual ? vector ? &bn_apply<T, true, true> : &bn_apply<T, false, true>
                      : vector ? &bn_apply<T, true, false>
                               : &bn_apply<T, false, false>;
  const BnTiling t = bn_wave(kernel, shape, d);
  launch(kernel, dim3(unsigned(t.blocks)), kBnThreads, 0, stream, x, residual, p, from_x, shape, t, y, mask);
}

template <typename A>
void bn_finalize_backward_run(const A* partial, const BnShape& s, const BnTiling& t, const BnParams<A>& p, A* dweight,
                              A* dbias, cudaStream_t stream) {
  launch(&bn_finalize_backward<A>, dim3(unsigned(ceil_div(s.channels, kBnThreads / 32))), kBnThreads, 0, stream,
         partial, s, t, p.var, p.eps, dweight, dbias);
}

// mask given: bn_add_relu; `partial` as in bn_stats_run.
template <typename T>
void bn_backward_reduce_run(const T* dy, const T* x, const uint8_t* mask, const BnParams<acc_t<T>>& p, const BnShape& s,
                            const Device& d, acc_t<T>* partial, acc_t<T>* dweight, acc_t<T>* dbias,
                            cudaStream_t stream) {
  const bool vector = bn_vectors_fit(s) && aligned16({dy, x});
  const auto kernel = mask     ? vector ? &bn_backward_reduce<T, true, true> : &bn_backward_reduce<T, false, true>
                      : vector ? &bn_backward_reduce<T, true, false>
                               : &bn_backward_reduce<T, false, false>;
  const BnTiling t = bn_wave(kernel, s, d);
  launch(kernel, dim3(unsigned(t.blocks)), kBnThreads, 0, stream, dy, x, mask, p, s, t, partial);
  bn_finalize_backward_run<acc_t<T>>(partial, s, t, p, dweight, dbias, stream);
}

// count: values of a channel over all replicas; 0 where the statistics are constants. dresidual may be null.
// masked: dy is dz already, and mask is null.
template <typename T>
void bn_backward_apply_run(const T* dy, const T* x, const uint8_t* mask, const BnParams<acc_t<T>>& p,
                           const acc_t<T>* dweight, const acc_t<T>* dbias, int64_t count, const BnShape& s,
                           const Device& d, T* dx, T* dresidual, cudaStream_t stream, bool masked = false) {
  using A = acc_t<T>;
  const bool vector = bn_vectors_fit(s) && aligned16({dy, x, dx, dresidual});
  const BnShape shape = vector ? s : bn_flat(s);
  const A inv_count = count ? A(1) / A(count) : A(0);
  const auto kernel = mask || masked ? vector ? &bn_backward_apply<T, true, true> : &bn_backward_apply<T, false, true>
                      : vector       ? &bn_backward_apply<T, true, false>
                                     : &bn_backward_apply<T, false, false>;
  const BnTiling t = bn_wave(kernel, shape, d);
  launch(kernel, dim3(unsigned(t.blocks)), kBnThreads, 0, stream, dy, x, mask, p, dweight, dbias, inv_count, shape, t,
         dx, dresidual);
}

// Whether a one-launch kernel is taken. It keeps everything, with two blocks per multiprocessor or one; else a part,
// with two: one block has 16 KB more to keep in, but half the bytes in flight.
template <typename Kernel>
bool bn_slab_fits(Kernel kernel, const BnShape& s, const Device& d, int element_bytes, int arrays, BnSlabPlan* plan) {
  const auto fits = [&](int blocks, bool everything) {
    const int64_t room = std::min(d.shared_per_block, d.shared_per_sm / blocks) - kBnSlabStatic;
    *plan = bn_slab_plan(s, int64_t(d.sm_count) * blocks, element_bytes, arrays, room);
    if (everything ? plan->kept_rows < plan->rows : !bn_slab_saves(*plan)) return false;
    return blocks <= resident_blocks(kernel, kBnThreads, size_t(plan->bytes), d);
  };
  return fits(2, true) || fits(1, true) || fits(2, false);
}

// y, mask and the statistics of x; residual and mask: both or neither. `partial` holds what bn_stats_run needs.
template <typename T>
void bn_forward_run(const T* x, const T* residual, const BnParams<acc_t<T>>& p, const BnShape& s, const Device& d,
                    acc_t<T>* partial, acc_t<T>* mean, acc_t<T>* var, T* y, uint8_t* mask, cudaStream_t stream) {
  if constexpr (sizeof(T) < 8) {
    const auto kernel = residual ? &bn_forward_slab<T, true> : &bn_forward_slab<T, false>;
    BnSlabPlan plan;
    if (bn_vectors_fit(s) && aligned16({x, residual, y}) && bn_slab_fits(kernel, s, d, sizeof(T), 1, &plan)) {
      const BnTiling& t = plan.tiling;
      if (launch_cooperative(kernel, dim3(unsigned(t.blocks)), kBnThreads, size_t(plan.bytes), stream, x, residual, p,
                             s, t, plan.kept_rows, partial, mean, var, y, mask))
        return;
    }
  }
  bn_stats_run(x, s, d, partial, mean, var, stream);
  bn_apply_run(x, residual, p, true, s, d, y, mask, stream);
}

// dweight, dbias, dx and dresidual (may be null); count as in bn_backward_apply_run.
template <typename T>
void bn_backward_run(const T* dy, const T* x, const uint8_t* mask, const BnParams<acc_t<T>>& p, const BnShape& s,
                     const Device& d, acc_t<T>* partial, acc_t<T>* dweight, acc_t<T>* dbias, int64_t count, T* dx,
                     T* dresidual, cudaStream_t stream) {
  if constexpr (sizeof(T) < 8) {
    const auto kernel = mask ? &bn_backward_slab<T, true> : &bn_backward_slab<T, false>;
    BnSlabPlan plan;
    if (bn_vectors_fit(s) && aligned16({dy, x, dx, dresidual}) && bn_slab_fits(kernel, s, d, sizeof(T), 2, &plan)) {
      const BnTiling& t = plan.tiling;
      const acc_t<T> inv_count = count ? acc_t<T>(1) / acc_t<T>(count) : acc_t<T>(0);
      if (launch_cooperative(kernel, dim3(unsigned(t.blocks)), kBnThreads, size_t(plan.bytes), stream, dy, x, mask, p,
                             s, t, plan.kept_rows, partial, dweight, dbias, inv_count, dx, dresidual))
        return;
    }
  }
  bn_backward_reduce_run(dy, x, mask, p, s, d, partial, dweight, dbias, stream);
  bn_backward_apply_run<T>(dy, x, mask, p, dweight, dbias, count, s, d, dx, dresidual, stream);
}

// As bn_backward_run, with two gradients of y. dz has the shape of x: dresidual if need_dz, else workspace.
template <typename T>
void bn_backward_two_run(const T* dy, const BnSecondGradient<T>& other, const T* x, const uint8_t* mask,
                         const BnParams<acc_t<T>>& p, const BnShape& s, const Device& d, acc_t<T>* partial,
                         acc_t<T>* dweight, acc_t<T>* dbias, int64_t count, T* dx, T* dz, bool need_dz,
                         cudaStream_t stream) {
  if constexpr (sizeof(T) < 8) {
    const auto one = mask ? &bn_backward_slab_two<T, true> : &bn_backward_slab_two<T, false>;
    BnSlabPlan plan;
    if (bn_vectors_fit(s) && other.vectors_fit() && aligned16({dy, x, dx, dz}) &&
        bn_slab_fits(one, s, d, sizeof(T), 2, &plan)) {
      const BnTiling& t = plan.tiling;
      const acc_t<T> inv_count = count ? acc_t<T>(1) / acc_t<T>(count) : acc_t<T>(0);
      if (launch_cooperative(one, dim3(unsigned(t.blocks)), kBnThreads, size_t(plan.bytes), stream, dy, other, x, mask,
                             p, s, t, plan.kept_rows, partial, dweight, dbias, inv_count, dx, dz, need_dz))
        return;
    }
  }
  const bool vector = bn_vectors_fit(s) && other.vectors_fit() && aligned16({dy, x, dz});
  const auto kernel = mask ? vector ? &bn_backward_reduce_two<T, true, true> : &bn_backward_reduce_two<T, false, true>
                      : vector ? &bn_backward_reduce_two<T, true, false>
                               : &bn_backward_reduce_two<T, false, false>;
  const BnTiling t = bn_wave(kernel, s, d);
  launch(kernel, dim3(unsigned(t.blocks)), kBnThreads, 0, stream, dy, other, x, mask, p, s, t, partial, dz);
  bn_finalize_backward_run<acc_t<T>>(partial, s, t, p, dweight, dbias, stream);
  bn_backward_apply_run<T>(dz, x, nullptr, p, dweight, dbias, count, s, d, dx, nullptr, stream, true);
}

inline void bn_update_stats_run(const BnUpdate& update, int channels, cudaStream_t stream) {
  launch(&bn_update_stats<kBnUpdateThreads>, dim3(1), kBnUpdateThreads, 0, stream, update, channels);
}

}  // namespace fasttricks::cuda

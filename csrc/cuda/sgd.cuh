// Kernels of sgd_check and sgd_step; csrc/math/sgd.h has the formulas, sgd_table.h what the kernels are given.
//
// A block works on up to kSgdBlock values of one tensor; a thread on 8 neighbouring values at a time (16 bytes at 16
// bit).
#pragma once

#include "intrinsics.cuh"
#include "sgd_table.h"

namespace fasttricks::cuda {

constexpr int kSgdThreads = 256;
constexpr int kSgdValues = 8;  // of a thread at a time

FT_DEVICE bool is_finite(float v) { return isfinite(v); }
FT_DEVICE bool is_finite(double v) { return isfinite(v); }

// Calls use(first value, count) for the runs of up to 8 values, out of the block's n, that belong to this thread.
template <typename Use>
FT_DEVICE void for_values(int64_t n, Use use) {
#pragma unroll 1
  for (int64_t i = int64_t(threadIdx.x) * kSgdValues; i < n; i += kSgdThreads * kSgdValues)
    use(i, n - i < kSgdValues ? int(n - i) : kSgdValues);
}
// Zeros after the first `count`. wide: the pointer allows 16-byte accesses.
template <typename T>
FT_DEVICE void load_values(const T* p, int count, bool wide, T (&v)[kSgdValues]) {
  if (wide && count == kSgdValues) {
    load(p, v);
  } else {
#pragma unroll
    for (int j = 0; j < kSgdValues; ++j) v[j] = j < count ? load(p + j) : T(0);
  }
}
template <typename T>
FT_DEVICE void store_values(T* p, int count, bool wide, const T (&v)[kSgdValues]) {
  if (wide && count == kSgdValues) {
    store(p, v);
  } else {
#pragma unroll
    for (int j = 0; j < kSgdValues; ++j)
      if (j < count) store(p + j, v[j]);
  }
}
FT_DEVICE bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// The sum over the block, returned to all threads and always added in the same order; `scratch` has a value per warp.
FT_DEVICE double sum_over_block(double v, double* scratch) {
  v = sum_over_lanes<32>(v);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int w = 0; w < kSgdThreads / 32; ++w) sum += scratch[w];
  return sum;
}

// The master, or the parameter if it no longer equals the rounded master because it was changed from outside.
template <typename P>
FT_DEVICE float as_seen(P param, float master) {
  return float(P(master)) == float(param) ? master : float(param);
}

FT_DEVICE double squares_in_double(const float (&v)[kSgdValues]) {
  double sum = 0;
#pragma unroll 1
  for (int j = 0; j < kSgdValues; ++j) sum = fma(double(v[j]), double(v[j]), sum);
  return sum;
}
FT_DEVICE double sum_of_squares(const double (&v)[kSgdValues]) {
  double sum = 0;
#pragma unroll
  for (int j = 0; j < kSgdValues; ++j) sum = fma(v[j], v[j], sum);
  return sum;
}
// In float32, as float64 runs at 1/64 of its rate on most cards; in float64 where squares of float32 would overflow, or
// vanish though the values do not.
FT_DEVICE double sum_of_squares(const float (&v)[kSgdValues]) {
  float sum = 0, most = 0;
#pragma unroll
  for (int j = 0; j < kSgdValues; ++j) {
    sum = fmaf(v[j], v[j], sum);
    most = fmaxf(most, fabsf(v[j]));
  }
  const bool safe = sum >= 1e-30f && sum <= 1e37f;
  return safe || most == 0 ? double(sum) : squares_in_double(v);
}

// found_inf = 1 where a gradient is not finite; partial: each block's sum of squares in float64, where norms are
// wanted.
__global__ void __launch_bounds__(kSgdThreads, 4)
    sgd_check(FT_PARAMETER(SgdTable) table, double* __restrict__ partial) {
  FT_SHARED(double, scratch, kSgdThreads / 32);
  const SgdView view(table);
  const int64_t e = view.entry_of_block(blockIdx.x);
  const int64_t begin = (int64_t(blockIdx.x) - view.first_blocks()[e]) * kSgdBlock;
  const int64_t left = int64_t(view.count(e)) - begin, n = left < kSgdBlock ? left : kSgdBlock;
  const SgdGroup& group = view.group(view.group_of_entry(e));
  const bool weight = group.flags & kSgdWeight;
  double square = 0;
  int bad = 0;
  with_type(weight ? group.type : group.grad_type, [&](auto zero) {
    using P = decltype(zero);
    const P* const values = static_cast<const P*>(view.pointer(e, weight ? kSgdParam : kSgdGrad)) + begin;
    const float* const master = weight ? static_cast<const float*>(view.pointer(e, kSgdMaster)) : nullptr;
    const bool wide = aligned(values) && aligned(master);
    for_values(n, [&](int64_t i, int count) {
      P v[kSgdValues];
      load_values(values + i, count, wide, v);
      float m[kSgdValues];
      if constexpr (sizeof(P) == 2)
        if (master) load_values(master + begin + i, count, wide, m);
      acc_t<P> value[kSgdValues];
#pragma unroll
      for (int j = 0; j < kSgdValues; ++j) {
        value[j] = v[j];
        if constexpr (sizeof(P) == 2)
          if (master) value[j] = as_seen(v[j], m[j]);
        bad |= !weight && !is_finite(value[j]);
      }
      if (partial) square += sum_of_squares(value);
    });
  });
  if (__syncthreads_or(bad) && threadIdx.x == 0) store(view.header().found_inf, 1.0f);
  if (!partial) return;
  const double sum = sum_over_block(square, scratch);
  if (threadIdx.x == 0) store(partial + blockIdx.x, sum);
}

// The sum of squares of each tensor, from its blocks' partial sums; one warp per tensor. If the sum of a gradient is
// not finite (float64 values can overflow it), found_inf is set: there is nothing to clip to.
__global__ void __launch_bounds__(kSgdThreads)
    sgd_norms(FT_PARAMETER(SgdTable) table, const double* __restrict__ partial, int64_t blocks) {
  const SgdView view(table);
  const SgdHeader& header = view.header();
  const int lane = int(threadIdx.x) % 32;
  int64_t e = int64_t(blockIdx.x) * (kSgdThreads / 32) + int64_t(threadIdx.x) / 32;
  if (e >= header.entries) return;
  const SgdGroup& group = view.group(view.group_of_entry(e));
  const bool weight = group.flags & kSgdWeight;
  const int tensor = view.tensor(e);
  const auto is_same = [&](int64_t other) {
    return view.tensor(other) == tensor && bool(view.group(view.group_of_entry(other)).flags & kSgdWeight) == weight;
  };
  if (e > 0 && is_same(e - 1)) return;  // summed by the warp of its first entry
  double* const squares = weight ? header.weight_sq : header.grad_sq;
  if (!squares) return;  // only the other kind's norms are requested
  double* const out = squares + tensor;
  double total = e == 0 && (header.flags & kSgdContinues) ? load(out) : 0;
  for (; e < header.entries && is_same(e); ++e) {
    const int64_t end = e + 1 < header.entries ? view.first_blocks()[e + 1] : blocks;
    double sum = 0;
    for (int64_t b = view.first_blocks()[e] + lane; b < end; b += 32) sum += load(partial + b);
    total += sum_over_lanes<32>(sum);
  }
  if (lane != 0) return;
  store(out, total);
  if (!weight && !is_finite(total)) store(header.found_inf, 1.0f);
}

// Returns whether this is the tensor's first step, and counts the step. Blocks run in any order, and all of them must
// see the count from before the step. If it is 1 or more, one block increments it: the others see a nonzero count
// either way. If it is 0, each block adds 1 to the BITS of the count (which stay below those of 1.0f), and the last
// writes 1.0f.
FT_DEVICE bool count_step(float* steps, const SgdView& view, int64_t e) {
  unsigned* const bits = reinterpret_cast<unsigned*>(steps);
  const unsigned seen = load_shared_between_blocks(bits), one = __float_as_uint(1.0f);
  const bool first = seen < one;
  // the tensor's entries in this launch; where it goes on in the next launch, it is counted there
  const int64_t entries = view.header().entries;
  int64_t from = e, to = e + 1;
  while (from > 0 && view.tensor(from - 1) == view.tensor(e)) --from;
  while (to < entries && view.tensor(to) == view.tensor(e)) ++to;
  if (!(view.header().flags & kSgdCount) || (to == entries && (view.header().flags & kSgdGoesOn))) return first;
  const unsigned begin = view.first_blocks()[from], end = to < entries ? view.first_blocks()[to] : gridDim.x;
  if (!first) {
    if (blockIdx.x == begin) store(steps, __uint_as_float(seen) + 1.0f);
  } else if (atomicAdd(bits, 1u) + 1 == end - begin) {
    atomicExch(bits, one);
  }
  return first;
}

// The factors shared by all values of entry e. norm: of all gradients, before division by the loss scale.
FT_DEVICE SgdScalars scalars_of(const SgdView& view, int64_t e, double norm, bool first) {
  const SgdHeader& header = view.header();
  const SgdGroup& group = view.group(view.group_of_entry(e));
  SgdScalars s;
  s.has_scale = header.grad_scale != nullptr;
  s.inv_scale = s.has_scale ? 1.0 / double(load(header.grad_scale)) : 1.0;
  s.clip = header.max_norm > 0 ? sgd_clip(header.max_norm, norm * s.inv_scale) : 1.0;
  s.has_clip = s.clip != 1.0;
  s.maximize = group.flags & kSgdMaximize;
  s.nesterov = group.flags & kSgdNesterov;
  s.weight_decay = group.weight_decay;
  s.momentum = group.momentum;
  s.one_minus_dampening = group.one_minus_dampening;
  s.has_momentum = group.momentum != 0;
  s.first = first;
  s.lr = group.flags & kSgdLrIsDouble ? load(static_cast<const double*>(group.lr))
                                      : double(load(static_cast<const float*>(group.lr)));
  s.lr_in_momentum = header.flags & kSgdLrInMomentum;
  s.has_multiplier = s.lr_in_momentum || group.trust_coefficient > 0;
  s.multiplier = s.lr_in_momentum ? s.lr : 1.0;
  if (group.trust_coefficient > 0) {
    const int tensor = view.tensor(e);
    s.multiplier *= lars_trust(group.trust_coefficient, sqrt(load(header.weight_sq + tensor)),
                               sqrt(load(header.grad_sq + tensor)) * s.inv_scale * s.clip, s.weight_decay, header.eps);
  }
  return s;
}

template <typename P, typename G>
FT_DEVICE void step_values(const SgdScalars& s, P* param, const G* grad, acc_t<P>* master, acc_t<P>* buffer,
                           int64_t n) {
  using T = acc_t<P>;
  constexpr bool kMaster = sizeof(P) == 2;
  const SgdCoefficients<T> k = SgdCoefficients<T>::of(s, T(0));
  const bool wide = aligned(param) && aligned(grad) && aligned(master) && aligned(buffer);
  for_values(n, [&](int64_t i, int count) {
    P p[kSgdValues];
    G g[kSgdValues];
    T m[kSgdValues], b[kSgdValues] = {};
    load_values(param + i, count, wide, p);
    load_values(grad + i, count, wide, g);
    if constexpr (kMaster) load_values(master + i, count, wide, m);
    if (s.has_momentum && !s.first) load_values(buffer + i, count, wide, b);
#pragma unroll
    for (int j = 0; j < kSgdValues; ++j) {
      if constexpr (kMaster)
        m[j] = as_seen(p[j], m[j]);
      else
        m[j] = p[j];
      sgd_update(s, k, T(g[j]), m[j], b[j]);
      p[j] = P(m[j]);
    }
    if (s.has_momentum) store_values(buffer + i, count, wide, b);
    if constexpr (kMaster) store_values(master + i, count, wide, m);
    store_values(param + i, count, wide, p);
  });
}

// One step of every tensor in the table; nothing is changed if found_inf is set.
__global__ void __launch_bounds__(kSgdThreads, 3) sgd_step(FT_PARAMETER(SgdTable) table) {
  FT_SHARED(double, scratch, kSgdThreads / 32);
  FT_SHARED(SgdScalars, scalars, 1);
  const SgdView view(table);
  const SgdHeader& header = view.header();
  if (header.found_inf && load(header.found_inf) != 0.0f) return;
  const int64_t e = view.entry_of_block(blockIdx.x);
  double norm = 0;
  if (header.max_norm > 0) {
    for (int i = int(threadIdx.x); i < header.norms; i += kSgdThreads) norm += load(header.grad_sq + i);
    norm = sqrt(sum_over_block(norm, scratch));
  }
  if (threadIdx.x == 0) {
    float* const steps = static_cast<float*>(view.pointer(e, kSgdSteps));
    scalars[0] = scalars_of(view, e, norm, steps && count_step(steps, view, e));
  }
  __syncthreads();
  const SgdScalars s = scalars[0];
  const SgdGroup& group = view.group(view.group_of_entry(e));
  const int64_t begin = (int64_t(blockIdx.x) - view.first_blocks()[e]) * kSgdBlock;
  const int64_t left = int64_t(view.count(e)) - begin, n = left < kSgdBlock ? left : kSgdBlock;
  with_type(group.type, [&](auto zero) {
    using P = decltype(zero);
    using T = acc_t<P>;
    const auto at = [begin](auto* p) { return p ? p + begin : nullptr; };
    P* const param = at(static_cast<P*>(view.pointer(e, kSgdParam)));
    T* const master = at(static_cast<T*>(view.pointer(e, kSgdMaster)));
    T* const buffer = at(static_cast<T*>(view.pointer(e, kSgdBuffer)));
    with_type(group.grad_type, [&](auto other) {
      using G = decltype(other);
      step_values<P, G>(s, param, at(static_cast<const G*>(view.pointer(e, kSgdGrad))), master, buffer, n);
    });
  });
}

// Counts the steps of tensors that share memory. These are launched one by one, all with the counts from before the
// call, and counted last.
__global__ void sgd_count(float* steps, const float* found_inf) {
  if (!found_inf || load(found_inf) == 0.0f) store(steps, load(steps) + 1.0f);
}

}  // namespace fasttricks::cuda

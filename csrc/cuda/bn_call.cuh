// One call of a BatchNorm op on CUDA tensors: its arguments as the kernels take them, allocation and launches.
#pragma once

#include <tuple>

#include "bn_relu_call.h"
#include "bn_relu_run.cuh"
#include "host.h"

namespace fasttricks::cuda::ops {

// count: values per channel, on the device; null: `values`.
inline void move_statistics(BnRunningStatistics& running, const Tensor& mean, const Tensor& var, const double* count,
                            int64_t values, cudaStream_t stream) {
  BnUpdate update{};
  update.count = count;
  update.values = values;
  update.batches = running.batches_data();
  update.cumulative = !running.momentum.has_value();
  update.momentum = running.momentum.value_or(0);
  const auto one = [](Tensor& r, const Tensor& now) {
    return BnRunning{r.mutable_data_ptr(), now.const_data_ptr(),          r.stride(0),
                     now.stride(0),        element_type(r.scalar_type()), element_type(now.scalar_type())};
  };
  int channels = 0;
  if (running.mean.has_value() && (count || values)) {
    channels = int(mean.size(0));
    update.mean = one(*running.mean, mean);
    update.var = one(*running.var, var);
  }
  if (channels || update.batches) bn_update_stats_run(update, channels, stream);
}

// The arguments of a call as the kernels take them.
struct Call : BnCall {
  OnDevice on;
  BnShape shape;
  const void *weight_data = nullptr, *bias_data = nullptr;
  ElementType weight_type = ElementType::kFloat, bias_type = ElementType::kFloat;
  const void *mean_data = nullptr, *var_data = nullptr;
  double eps;

  Call(const char* op, const Tensor& given, double eps_)
      : BnCall(op, given, eps_), on(x), shape(bn_shape(rows, int(channels), inner, false)), eps(eps_) {}
  // The BatchNorm of a residual of x.
  Call(const Call& main, const Tensor& residual, double eps_)
      : BnCall(main, residual, eps_), on(x), shape(main.shape), eps(eps_) {}

  template <typename T>
  const T* data() const {
    return static_cast<const T*>(x.const_data_ptr());
  }

  // In their own type: the kernels convert.
  void affine(const MaybeTensor& weight, const MaybeTensor& bias) {
    const auto one = [this](const char* name, const MaybeTensor& given, const void*& at, ElementType& type) {
      if (!given.has_value()) return;
      check_per_channel(name, *given);
      at = is_dense(*given, MemoryFormat::Contiguous) ? given->const_data_ptr()
                                                      : keep(torch::stable::contiguous(*given));
      type = element_type(given->scalar_type());
    };
    one(names->weight, weight, weight_data, weight_type);
    one(names->bias, bias, bias_data, bias_type);
  }
  void statistics(const Tensor& mean, const Tensor& var) {
    mean_data = per_channel(names->mean, mean);
    var_data = per_channel(names->var, var);
  }
  template <typename A>
  BnParams<A> params() const {
    return {static_cast<const A*>(mean_data),
            static_cast<const A*>(var_data),
            weight_data,
            bias_data,
            weight_type,
            bias_type,
            A(eps)};
  }

  // Zeros if x is empty: nothing is launched then.
  Tensor new_per_channel() const {
    return empty() ? torch::stable::new_zeros(x, {channels}, statistics_type)
                   : torch::stable::new_empty(x, {channels}, statistics_type);
  }
  template <typename T>
  BnSecondGradient<T> on_device(const SecondGradient& second) const {
    BnSecondGradient<T> made;
    made.data = static_cast<const T*>(second.data);
    made.pooled = second.pooled;
    if (!second.pooled) return made;
    made.by_pixels = inner == 1;
    made.height = int(x.size(2)), made.width = int(x.size(3));
    made.pooled_height = int(second.height), made.pooled_width = int(second.width);
    made.by_height = LongDivider(made.height), made.by_width = LongDivider(made.width);
    return made;
  }
  // Workspace of a reduction, of either variant.
  Tensor new_partial() const {
    return torch::stable::new_empty(x, {bn_most_partials(shape, on.device.sm_count)}, statistics_type);
  }

  // Computes y, mean, var and, with a residual, the mask.
  std::tuple<Tensor, Tensor, Tensor, Tensor> launch_forward(const MaybeTensor& residual, BnRunningStatistics running) {
    const void* z = residual.has_value() ? like_x("residual", *residual) : nullptr;
    running.check(*this);
    check_several_values(*this);
    Tensor mean = new_per_channel(), var = new_per_channel();
    mean_data = mean.const_data_ptr();
    var_data = var.const_data_ptr();
    Tensor y = new_like_x(), mask = torch::stable::new_empty(x, {z ? mask_bytes() : 0}, ScalarType::Byte);
    if (empty()) {
      move_statistics(running, mean, var, nullptr, 0, on.stream);
      return {y, mean, var, mask};
    }
    Tensor partial = new_partial();
    with_type(x.scalar_type(), [&](auto t) {
      using T = decltype(t);
      using A = acc_t<T>;
      bn_forward_run(data<T>(), static_cast<const T*>(z), params<A>(), shape, on.device,
                     static_cast<A*>(partial.mutable_data_ptr()), static_cast<A*>(mean.mutable_data_ptr()),
                     static_cast<A*>(var.mutable_data_ptr()), static_cast<T*>(y.mutable_data_ptr()),
                     z ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr, on.stream);
    });
    move_statistics(running, mean, var, nullptr, values, on.stream);
    return {y, mean, var, mask};
  }

  std::tuple<Tensor, Tensor> launch_stats() {
    Tensor mean = new_per_channel(), var = new_per_channel();
    mean_data = mean.const_data_ptr();
    var_data = var.const_data_ptr();
    if (empty()) return {mean, var};
    Tensor partial = new_partial();
    with_type(x.scalar_type(), [&](auto t) {
      using A = acc_t<decltype(t)>;
      bn_stats_run(data<decltype(t)>(), shape, on.device, static_cast<A*>(partial.mutable_data_ptr()),
                   static_cast<A*>(mean.mutable_data_ptr()), static_cast<A*>(var.mutable_data_ptr()), on.stream);
    });
    return {mean, var};
  }

  // Computes y from given statistics and, with a residual, the mask.
  std::tuple<Tensor, Tensor> launch_apply(const MaybeTensor& residual) {
    const void* z = residual.has_value() ? like_x("residual", *residual) : nullptr;
    Tensor y = new_like_x(), mask = torch::stable::new_empty(x, {z ? mask_bytes() : 0}, ScalarType::Byte);
    if (empty()) return {y, mask};
    with_type(x.scalar_type(), [&](auto t) {
      using T = decltype(t);
      bn_apply_run(data<T>(), static_cast<const T*>(z), params<acc_t<T>>(), false, shape, on.device,
                   static_cast<T*>(y.mutable_data_ptr()), z ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr,
                   on.stream);
    });
    return {y, mask};
  }

  std::tuple<Tensor, Tensor> launch_backward_reduce(const void* dy, const uint8_t* bits) {
    Tensor dweight = new_per_channel(), dbias = new_per_channel();
    if (empty()) return {dweight, dbias};
    Tensor partial = new_partial();
    with_type(x.scalar_type(), [&](auto t) {
      using T = decltype(t);
      using A = acc_t<T>;
      bn_backward_reduce_run(static_cast<const T*>(dy), data<T>(), bits, params<A>(), shape, on.device,
                             static_cast<A*>(partial.mutable_data_ptr()), static_cast<A*>(dweight.mutable_data_ptr()),
                             static_cast<A*>(dbias.mutable_data_ptr()), on.stream);
    });
    return {dweight, dbias};
  }

  // Computes dx and dresidual from the sums. count: values per channel over all replicas; 0 for constant statistics.
  std::tuple<Tensor, Tensor> launch_backward_apply(const void* dy, const uint8_t* bits, const void* dweight,
                                                   const void* dbias, int64_t count, bool need_dresidual) {
    Tensor dx = new_like_x(), dresidual = need_dresidual ? new_like_x() : torch::stable::new_empty(x, {0});
    if (empty()) return {dx, dresidual};
    with_type(x.scalar_type(), [&](auto t) {
      using T = decltype(t);
      using A = acc_t<T>;
      bn_backward_apply_run(static_cast<const T*>(dy), data<T>(), bits, params<A>(), static_cast<const A*>(dweight),
                            static_cast<const A*>(dbias), count, shape, on.device,
                            static_cast<T*>(dx.mutable_data_ptr()),
                            need_dresidual ? static_cast<T*>(dresidual.mutable_data_ptr()) : nullptr, on.stream);
    });
    return {dx, dresidual};
  }
};

}  // namespace fasttricks::cuda::ops

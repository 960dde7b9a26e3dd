// One call of a BatchNorm op on CUDA tensors: its arguments as the kernels take them, and allocation.
#pragma once

#include <tuple>

#include "bn_relu_call.h"
#include "bn_relu_run.cuh"
#include "host.h"

namespace fasttricks::cuda::ops {

// count: values per channel, on the device; null: `values`. Defined in bn_relu.cu.
void move_statistics(BnRunningStatistics& running, const Tensor& mean, const Tensor& var, const double* count,
                     int64_t values, cudaStream_t stream);

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
    const int64_t count = empty() ? 0 : bn_most_partials(shape, on.device.sm_count);
    return torch::stable::new_empty(x, {count}, statistics_type);
  }

  // Mean and biased variance of x, for a kernel to write and others to read, and its workspace.
  struct Statistics {
    Tensor mean, var, partial;
  };
  Statistics new_statistics() {
    Statistics made{new_per_channel(), new_per_channel(), new_partial()};
    mean_data = made.mean.const_data_ptr();
    var_data = made.var.const_data_ptr();
    return made;
  }
  // Computes them. Defined in bn_relu.cu, the only source that compiles their kernels.
  void launch_stats(Statistics& to) const;
};

}  // namespace fasttricks::cuda::ops

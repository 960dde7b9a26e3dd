// bn_relu and bn_add_relu on CUDA tensors: checks, allocation and registration; bn_relu_run.cuh launches.
#include "bn_call.cuh"

namespace fasttricks::cuda::ops {

void move_statistics(BnRunningStatistics& running, const Tensor& mean, const Tensor& var, const double* count,
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

void Call::launch_stats(Statistics& to) const {
  if (empty()) return;
  with_type(x.scalar_type(), [&](auto t) {
    using A = acc_t<decltype(t)>;
    bn_stats_run(data<decltype(t)>(), shape, on.device, static_cast<A*>(to.partial.mutable_data_ptr()),
                 static_cast<A*>(to.mean.mutable_data_ptr()), static_cast<A*>(to.var.mutable_data_ptr()), on.stream);
  });
}

namespace {

// Both ops, and what they share; without a residual there is no mask.
struct ForwardCall : Call {
  ForwardCall(const char* op, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, double eps)
      : Call(op, x, eps) {
    affine(weight, bias);
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> launch_forward(const MaybeTensor& residual, BnRunningStatistics running) {
    const void* z = residual.has_value() ? like_x("residual", *residual) : nullptr;
    running.check(*this);
    check_several_values(*this);
    Statistics made = new_statistics();
    Tensor y = new_like_x(), mask = torch::stable::new_empty(x, {z ? mask_bytes() : 0}, ScalarType::Byte);
    if (empty()) {
      move_statistics(running, made.mean, made.var, nullptr, 0, on.stream);
      return {y, made.mean, made.var, mask};
    }
    with_type(x.scalar_type(), [&](auto t) {
      using T = decltype(t);
      using A = acc_t<T>;
      bn_forward_run(data<T>(), static_cast<const T*>(z), params<A>(), shape, on.device,
                     static_cast<A*>(made.partial.mutable_data_ptr()), static_cast<A*>(made.mean.mutable_data_ptr()),
                     static_cast<A*>(made.var.mutable_data_ptr()), static_cast<T*>(y.mutable_data_ptr()),
                     z ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr, on.stream);
    });
    move_statistics(running, made.mean, made.var, nullptr, values, on.stream);
    return {y, made.mean, made.var, mask};
  }

  // From given statistics.
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
};

std::tuple<Tensor, Tensor, Tensor> bn_relu_forward(Tensor x, MaybeTensor weight, MaybeTensor bias, double eps,
                                                   MaybeTensor running_mean, MaybeTensor running_var,
                                                   MaybeTensor num_batches_tracked, std::optional<double> momentum) {
  ForwardCall call("bn_relu_forward", x, weight, bias, eps);
  auto [y, mean, var, mask] =
      call.launch_forward(std::nullopt, {running_mean, running_var, num_batches_tracked, momentum});
  return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_relu_forward(Tensor x, Tensor residual, MaybeTensor weight,
                                                               MaybeTensor bias, double eps, MaybeTensor running_mean,
                                                               MaybeTensor running_var, MaybeTensor num_batches_tracked,
                                                               std::optional<double> momentum) {
  ForwardCall call("bn_add_relu_forward", x, weight, bias, eps);
  return call.launch_forward(residual, {running_mean, running_var, num_batches_tracked, momentum});
}

Tensor bn_relu_apply(Tensor x, MaybeTensor weight, MaybeTensor bias, Tensor mean, Tensor var, double eps) {
  ForwardCall call("bn_relu_apply", x, weight, bias, eps);
  call.statistics(mean, var);
  return std::get<0>(call.launch_apply(std::nullopt));
}

std::tuple<Tensor, Tensor> bn_add_relu_apply(Tensor x, Tensor residual, MaybeTensor weight, MaybeTensor bias,
                                             Tensor mean, Tensor var, double eps) {
  ForwardCall call("bn_add_relu_apply", x, weight, bias, eps);
  call.statistics(mean, var);
  return call.launch_apply(residual);
}

std::tuple<Tensor, Tensor> bn_stats(Tensor x) {
  Call call("bn_stats", x, 0.0);
  Call::Statistics made = call.new_statistics();
  call.launch_stats(made);
  return {made.mean, made.var};
}

// The arguments that all backward ops share.
struct BackwardCall : Call {
  const void* dy;
  const uint8_t* bits;

  BackwardCall(const char* op, const Tensor& dy_, const Tensor& x, const MaybeTensor& mask_, const MaybeTensor& weight,
               const MaybeTensor& bias, const Tensor& mean, const Tensor& var, double eps)
      : Call(op, x, eps), dy(like_x("dy", dy_)), bits(mask(mask_)) {
    affine(weight, bias);
    statistics(mean, var);
  }

  std::tuple<Tensor, Tensor> launch_backward_reduce() {
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

  // dx and dresidual from the sums. count: values per channel over all replicas; 0 for constant statistics.
  std::tuple<Tensor, Tensor> launch_backward_apply(const void* dweight, const void* dbias, int64_t count,
                                                   bool need_dresidual) {
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

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_relu_backward(Tensor dy, Tensor x, MaybeTensor mask, MaybeTensor weight,
                                                            MaybeTensor bias, Tensor mean, Tensor var, double eps,
                                                            bool training, bool need_dresidual, MaybeTensor dy2) {
  BackwardCall call("bn_relu_backward", dy, x, mask, weight, bias, mean, var, eps);
  call.check_need_dresidual(need_dresidual, mask);
  const BnCall::SecondGradient second = call.second_gradient(dy2);
  Tensor dweight = call.new_per_channel(), dbias = call.new_per_channel(), dx = call.new_like_x();
  Tensor dresidual = need_dresidual ? call.new_like_x() : torch::stable::new_empty(x, {0});
  if (call.empty()) return {dx, dresidual, dweight, dbias};
  Tensor partial = call.new_partial(), dz = second.data && !need_dresidual ? call.new_like_x() : dresidual;
  with_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const T* const g = static_cast<const T*>(call.dy);
    const auto at = [](Tensor& made) { return static_cast<A*>(made.mutable_data_ptr()); };
    const int64_t count = training ? call.values : 0;
    T* const to = static_cast<T*>(dx.mutable_data_ptr());
    if (second.data)
      bn_backward_two_run(g, call.on_device<T>(second), call.data<T>(), call.bits, call.params<A>(), call.shape,
                          call.on.device, at(partial), at(dweight), at(dbias), count, to,
                          static_cast<T*>(dz.mutable_data_ptr()), need_dresidual, call.on.stream);
    else
      bn_backward_run(g, call.data<T>(), call.bits, call.params<A>(), call.shape, call.on.device, at(partial),
                      at(dweight), at(dbias), count, to,
                      need_dresidual ? static_cast<T*>(dresidual.mutable_data_ptr()) : nullptr, call.on.stream);
  });
  return {dx, dresidual, dweight, dbias};
}

std::tuple<Tensor, Tensor> bn_relu_backward_reduce(Tensor dy, Tensor x, MaybeTensor mask, MaybeTensor weight,
                                                   MaybeTensor bias, Tensor mean, Tensor var, double eps) {
  BackwardCall call("bn_relu_backward_reduce", dy, x, mask, weight, bias, mean, var, eps);
  return call.launch_backward_reduce();
}

std::tuple<Tensor, Tensor> bn_relu_backward_apply(Tensor dy, Tensor x, MaybeTensor mask, MaybeTensor weight,
                                                  MaybeTensor bias, Tensor mean, Tensor var, double eps,
                                                  Tensor mean_dweight, Tensor mean_dbias, bool need_dresidual) {
  BackwardCall call("bn_relu_backward_apply", dy, x, mask, weight, bias, mean, var, eps);
  call.check_need_dresidual(need_dresidual, mask);
  const void* dweight_data = call.per_channel("mean_dweight", mean_dweight);
  const void* dbias_data = call.per_channel("mean_dbias", mean_dbias);
  return call.launch_backward_apply(dweight_data, dbias_data, 1, need_dresidual);
}

void bn_update_stats_(Tensor running_mean, Tensor running_var, Tensor mean, Tensor var, Tensor count,
                      MaybeTensor num_batches_tracked, std::optional<double> momentum) {
  BnRunningStatistics running{running_mean, running_var, num_batches_tracked, momentum};
  check_update_stats(running, mean, var, count);
  OnDevice on(mean);
  move_statistics(running, mean, var, static_cast<const double*>(count.const_data_ptr()), 0, on.stream);
}

}  // namespace
}  // namespace fasttricks::cuda::ops

FT_CUDA_LIBRARY(m) {
  using namespace fasttricks::cuda::ops;
  m.impl("bn_relu_forward", TORCH_BOX(&bn_relu_forward));
  m.impl("bn_add_relu_forward", TORCH_BOX(&bn_add_relu_forward));
  m.impl("bn_relu_apply", TORCH_BOX(&bn_relu_apply));
  m.impl("bn_add_relu_apply", TORCH_BOX(&bn_add_relu_apply));
  m.impl("bn_stats", TORCH_BOX(&bn_stats));
  m.impl("bn_relu_backward", TORCH_BOX(&bn_relu_backward));
  m.impl("bn_relu_backward_reduce", TORCH_BOX(&bn_relu_backward_reduce));
  m.impl("bn_relu_backward_apply", TORCH_BOX(&bn_relu_backward_apply));
  m.impl("bn_update_stats_", TORCH_BOX(&bn_update_stats_));
}

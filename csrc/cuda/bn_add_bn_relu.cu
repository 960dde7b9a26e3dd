// bn_add_bn_relu on CUDA tensors: checks, allocation and registration; bn_add_bn_relu_run.cuh launches.
#include "bn_add_bn_relu_call.h"
#include "bn_add_bn_relu_run.cuh"
#include "bn_call.cuh"

namespace fasttricks::cuda::ops {
namespace {

using PairCall = BnAddBnCall<Call>;

std::tuple<Tensor, Tensor> new_outputs(const Call& main) {
  return {main.new_like_x(), torch::stable::new_empty(main.x, {main.mask_bytes()}, ScalarType::Byte)};
}

void launch_apply(const PairCall& call, bool from_x, Tensor& y, Tensor& mask) {
  const Call &main = call.main, &other = call.residual;
  if (main.empty()) return;
  with_type(main.x.scalar_type(), [&](auto of) {
    using T = decltype(of);
    bn_add_bn_apply_run(main.data<T>(), other.data<T>(), main.params<acc_t<T>>(), other.params<acc_t<T>>(), from_x,
                        main.shape, main.on.device, static_cast<T*>(y.mutable_data_ptr()),
                        static_cast<uint8_t*>(mask.mutable_data_ptr()), main.on.stream);
  });
}

// Everything in one launch; returns whether there is one.
bool launch_forward(const PairCall& call, Call::Statistics& of_x, Call::Statistics& of_residual, Tensor& y,
                    Tensor& mask) {
  const Call &main = call.main, &other = call.residual;
  if (main.empty()) return false;
  bool launched = false;
  with_type(main.x.scalar_type(), [&](auto of) {
    using T = decltype(of);
    using A = acc_t<T>;
    const auto to = [](Call::Statistics& made) {
      const auto at = [](Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); };
      return BnStatistics<A>{at(made.partial), at(made.mean), at(made.var)};
    };
    launched =
        bn_add_bn_forward_slab_run(main.data<T>(), other.data<T>(), main.params<A>(), other.params<A>(), main.shape,
                                   main.on.device, to(of_x), to(of_residual), static_cast<T*>(y.mutable_data_ptr()),
                                   static_cast<uint8_t*>(mask.mutable_data_ptr()), main.on.stream);
  });
  return launched;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_add_bn_relu_forward(
    Tensor x, Tensor residual, MaybeTensor weight, MaybeTensor bias, MaybeTensor residual_weight,
    MaybeTensor residual_bias, double eps, double residual_eps, MaybeTensor running_mean, MaybeTensor running_var,
    MaybeTensor num_batches_tracked, std::optional<double> momentum, MaybeTensor residual_running_mean,
    MaybeTensor residual_running_var, MaybeTensor residual_num_batches_tracked,
    std::optional<double> residual_momentum) {
  PairCall call("bn_add_bn_relu_forward", x, residual, eps, residual_eps);
  BnRunningStatistics running{running_mean, running_var, num_batches_tracked, momentum};
  BnRunningStatistics residual_running{residual_running_mean, residual_running_var, residual_num_batches_tracked,
                                       residual_momentum};
  call.affine(weight, bias, residual_weight, residual_bias);
  call.check_training(running, residual_running);
  Call::Statistics of_x = call.main.new_statistics(), of_residual = call.residual.new_statistics();
  auto [y, mask] = new_outputs(call.main);
  if (!launch_forward(call, of_x, of_residual, y, mask)) {
    call.main.launch_stats(of_x);
    call.residual.launch_stats(of_residual);
    launch_apply(call, true, y, mask);
  }
  const int64_t values = call.main.empty() ? 0 : call.main.values;
  move_statistics(running, of_x.mean, of_x.var, nullptr, values, call.main.on.stream);
  move_statistics(residual_running, of_residual.mean, of_residual.var, nullptr, values, call.main.on.stream);
  return {y, of_x.mean, of_x.var, of_residual.mean, of_residual.var, mask};
}

std::tuple<Tensor, Tensor> bn_add_bn_relu_apply(Tensor x, Tensor residual, MaybeTensor weight, MaybeTensor bias,
                                                MaybeTensor residual_weight, MaybeTensor residual_bias, Tensor mean,
                                                Tensor var, Tensor residual_mean, Tensor residual_var, double eps,
                                                double residual_eps) {
  PairCall call("bn_add_bn_relu_apply", x, residual, eps, residual_eps);
  call.affine(weight, bias, residual_weight, residual_bias);
  call.statistics(mean, var, residual_mean, residual_var);
  auto [y, mask] = new_outputs(call.main);
  launch_apply(call, false, y, mask);
  return {y, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_add_bn_relu_backward(
    Tensor dy, Tensor x, Tensor residual, Tensor mask, MaybeTensor weight, MaybeTensor residual_weight, Tensor mean,
    Tensor var, Tensor residual_mean, Tensor residual_var, double eps, double residual_eps, bool training,
    MaybeTensor dy2) {
  PairCall call("bn_add_bn_relu_backward", x, residual, eps, residual_eps);
  Call &main = call.main, &other = call.residual;
  const void* const given = main.like_x("dy", dy);
  const uint8_t* bits = main.mask(mask);
  call.affine(weight, std::nullopt, residual_weight, std::nullopt);
  call.statistics(mean, var, residual_mean, residual_var);
  const BnCall::SecondGradient second = main.second_gradient(dy2);
  Tensor dweight = main.new_per_channel(), dresidual_weight = main.new_per_channel(), dbias = main.new_per_channel();
  Tensor dx = main.new_like_x(), dresidual = main.new_like_x();
  if (main.empty()) return {dx, dresidual, dweight, dresidual_weight, dbias};
  Tensor partial = main.new_partial(), other_partial = main.new_partial();
  with_type(main.x.scalar_type(), [&](auto of) {
    using T = decltype(of);
    using A = acc_t<T>;
    const auto at = [](Tensor& made) { return static_cast<A*>(made.mutable_data_ptr()); };
    bn_add_bn_backward_run(static_cast<const T*>(given), main.on_device<T>(second), main.data<T>(), other.data<T>(),
                           bits, main.params<A>(), other.params<A>(), training ? main.values : 0, main.shape,
                           main.on.device, at(partial), at(other_partial), at(dweight), at(dresidual_weight), at(dbias),
                           static_cast<T*>(dx.mutable_data_ptr()), static_cast<T*>(dresidual.mutable_data_ptr()),
                           main.on.stream);
  });
  return {dx, dresidual, dweight, dresidual_weight, dbias};
}

}  // namespace
}  // namespace fasttricks::cuda::ops

FT_CUDA_LIBRARY(m) {
  using namespace fasttricks::cuda::ops;
  m.impl("bn_add_bn_relu_forward", TORCH_BOX(&bn_add_bn_relu_forward));
  m.impl("bn_add_bn_relu_apply", TORCH_BOX(&bn_add_bn_relu_apply));
  m.impl("bn_add_bn_relu_backward", TORCH_BOX(&bn_add_bn_relu_backward));
}

// bn_relu and bn_add_relu on the CPU: checks, allocation and the division of work; the kernels are in isa/bn_relu.cpp.
#include <torch/csrc/stable/library.h>

#include "cpu/bn_call.h"

namespace fasttricks::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> bn_relu_forward(Tensor x, MaybeTensor weight, MaybeTensor bias, double eps,
                                                   MaybeTensor running_mean, MaybeTensor running_var,
                                                   MaybeTensor num_batches_tracked, std::optional<double> momentum) {
  Call call("bn_relu_forward", x, eps);
  BnRunningStatistics running{running_mean, running_var, num_batches_tracked, momentum};
  call.affine(weight, bias);
  running.check(call);
  check_several_values(call);
  auto [mean, var] = new_statistics(call);
  Tensor y = new_output(call);
  call.run(kBnStatistics | kBnApply);
  move_statistics(running, mean, var, double(call.values));
  return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_relu_forward(Tensor x, Tensor residual, MaybeTensor weight,
                                                               MaybeTensor bias, double eps, MaybeTensor running_mean,
                                                               MaybeTensor running_var, MaybeTensor num_batches_tracked,
                                                               std::optional<double> momentum) {
  Call call("bn_add_relu_forward", x, eps);
  BnRunningStatistics running{running_mean, running_var, num_batches_tracked, momentum};
  call.affine(weight, bias);
  call.arguments.residual = call.like_x("residual", residual);
  running.check(call);
  check_several_values(call);
  auto [mean, var] = new_statistics(call);
  Tensor y = new_output(call), mask = call.new_mask();
  call.run(kBnStatistics | kBnApply);
  move_statistics(running, mean, var, double(call.values));
  return {y, mean, var, mask};
}

Tensor bn_relu_apply(Tensor x, MaybeTensor weight, MaybeTensor bias, Tensor mean, Tensor var, double eps) {
  Call call("bn_relu_apply", x, eps);
  call.affine(weight, bias);
  call.statistics(mean, var);
  call.arguments.training = false;  // the statistics need not be those of x: x is read even where the weight is zero
  Tensor y = new_output(call);
  call.run(kBnApply);
  return y;
}

std::tuple<Tensor, Tensor> bn_add_relu_apply(Tensor x, Tensor residual, MaybeTensor weight, MaybeTensor bias,
                                             Tensor mean, Tensor var, double eps) {
  Call call("bn_add_relu_apply", x, eps);
  call.affine(weight, bias);
  call.arguments.residual = call.like_x("residual", residual);
  call.statistics(mean, var);
  call.arguments.training = false;
  Tensor y = new_output(call), mask = call.new_mask();
  call.run(kBnApply);
  return {y, mask};
}

std::tuple<Tensor, Tensor> bn_stats(Tensor x) {
  Call call("bn_stats", x, 0.0);
  auto statistics = new_statistics(call);
  call.run(kBnStatistics);
  return statistics;
}

Call backward_call(const char* op, const Tensor& dy, const Tensor& x, const MaybeTensor& mask,
                   const MaybeTensor& weight, const MaybeTensor& bias, const Tensor& mean, const Tensor& var,
                   double eps) {
  Call call(op, x, eps);
  call.arguments.dy = call.like_x("dy", dy);
  call.read_mask(mask);
  call.affine(weight, bias);
  call.statistics(mean, var);
  return call;
}

std::tuple<Tensor, Tensor> new_gradients(Call& call, const MaybeTensor& mask, bool need_dresidual) {
  call.check_need_dresidual(need_dresidual, mask);
  Tensor dx = call.new_like_x();
  call.arguments.dx = dx.mutable_data_ptr();
  Tensor dresidual = need_dresidual ? call.new_like_x() : new_tensor(call.x, {0}, call.x.scalar_type());
  if (need_dresidual) call.arguments.dresidual = dresidual.mutable_data_ptr();
  return {dx, dresidual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_relu_backward(Tensor dy, Tensor x, MaybeTensor mask, MaybeTensor weight,
                                                            MaybeTensor bias, Tensor mean, Tensor var, double eps,
                                                            bool training, bool need_dresidual, MaybeTensor dy2) {
  Call call = backward_call("bn_relu_backward", dy, x, mask, weight, bias, mean, var, eps);
  call.arguments.training = training;
  const BnCall::SecondGradient second = call.second_gradient(dy2);
  auto [dweight, dbias] = new_sums(call);
  auto [dx, dresidual] = new_gradients(call, mask, need_dresidual);
  call.add(second);
  call.run(kBnReduce | kBnBackward);
  return {dx, dresidual, dweight, dbias};
}

std::tuple<Tensor, Tensor> bn_relu_backward_reduce(Tensor dy, Tensor x, MaybeTensor mask, MaybeTensor weight,
                                                   MaybeTensor bias, Tensor mean, Tensor var, double eps) {
  Call call = backward_call("bn_relu_backward_reduce", dy, x, mask, weight, bias, mean, var, eps);
  auto sums = new_sums(call);
  call.run(kBnReduce);
  return sums;
}

std::tuple<Tensor, Tensor> bn_relu_backward_apply(Tensor dy, Tensor x, MaybeTensor mask, MaybeTensor weight,
                                                  MaybeTensor bias, Tensor mean, Tensor var, double eps,
                                                  Tensor mean_dweight, Tensor mean_dbias, bool need_dresidual) {
  Call call = backward_call("bn_relu_backward_apply", dy, x, mask, weight, bias, mean, var, eps);
  call.arguments.dweight = const_cast<void*>(call.per_channel("mean_dweight", mean_dweight));
  call.arguments.dbias = const_cast<void*>(call.per_channel("mean_dbias", mean_dbias));
  call.arguments.count = 1;
  auto gradients = new_gradients(call, mask, need_dresidual);
  call.run(kBnBackward);
  return gradients;
}

void bn_update_stats_(Tensor running_mean, Tensor running_var, Tensor mean, Tensor var, Tensor count,
                      MaybeTensor num_batches_tracked, std::optional<double> momentum) {
  BnRunningStatistics running{running_mean, running_var, num_batches_tracked, momentum};
  check_update_stats(running, mean, var, count);
  move_statistics(running, mean, var, *static_cast<const double*>(count.const_data_ptr()));
}

}  // namespace
}  // namespace fasttricks::cpu

STABLE_TORCH_LIBRARY_IMPL(fasttricks, CPU, m) {
  using namespace fasttricks::cpu;
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

// bn_add_relu with the 2x2 means of its output, on the CPU: checks and allocation; bn_call.h divides the work, the
// kernels are in isa/bn_relu.cpp.
#include <torch/csrc/stable/library.h>

#include "cpu/bn_call.h"

namespace fasttricks::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_add_relu_pool_forward(
    Tensor x, Tensor residual, MaybeTensor weight, MaybeTensor bias, double eps, MaybeTensor running_mean,
    MaybeTensor running_var, MaybeTensor num_batches_tracked, std::optional<double> momentum, bool ceil_mode) {
  Call call("bn_add_relu_pool_forward", x, eps);
  BnRunningStatistics running{running_mean, running_var, num_batches_tracked, momentum};
  call.affine(weight, bias);
  call.arguments.residual = call.like_x("residual", residual);
  running.check(call);
  check_several_values(call);
  Tensor pooled = call.new_means(ceil_mode);
  auto [mean, var] = new_statistics(call);
  Tensor y = new_output(call), mask = call.new_mask();
  call.run(kBnStatistics | kBnApply);
  move_statistics(running, mean, var, double(call.values));
  return {y, pooled, mean, var, mask};
}

std::tuple<Tensor, Tensor, Tensor> bn_add_relu_pool_apply(Tensor x, Tensor residual, MaybeTensor weight,
                                                          MaybeTensor bias, Tensor mean, Tensor var, double eps,
                                                          bool ceil_mode) {
  Call call("bn_add_relu_pool_apply", x, eps);
  call.affine(weight, bias);
  call.arguments.residual = call.like_x("residual", residual);
  call.statistics(mean, var);
  call.arguments.training = false;  // as of bn_add_relu_apply
  Tensor pooled = call.new_means(ceil_mode), y = new_output(call), mask = call.new_mask();
  call.run(kBnApply);
  return {y, pooled, mask};
}

}  // namespace
}  // namespace fasttricks::cpu

STABLE_TORCH_LIBRARY_IMPL(fasttricks, CPU, m) {
  m.impl("bn_add_relu_pool_forward", TORCH_BOX(&fasttricks::cpu::bn_add_relu_pool_forward));
  m.impl("bn_add_relu_pool_apply", TORCH_BOX(&fasttricks::cpu::bn_add_relu_pool_apply));
}

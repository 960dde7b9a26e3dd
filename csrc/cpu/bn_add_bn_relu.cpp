// bn_add_bn_relu on the CPU: checks and allocation; bn_call.h divides the work, the kernels are in isa/bn_relu.cpp.
#include <torch/csrc/stable/library.h>

#include "bn_add_bn_relu_call.h"
#include "cpu/bn_call.h"

namespace fasttricks::cpu {
namespace {

struct AddBnCall : BnAddBnCall<Call> {
  AddBnCall(const char* op, const Tensor& x, const Tensor& residual_, double eps, double residual_eps)
      : BnAddBnCall(op, x, residual_, eps, residual_eps) {
    main.arguments.residual = residual.arguments.x;
    main.arguments.of_residual = &residual.arguments;
  }
  AddBnCall(const AddBnCall&) = delete;

  void training(bool batch_statistics) { main.arguments.training = residual.arguments.training = batch_statistics; }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_add_bn_relu_forward(
    Tensor x, Tensor residual, MaybeTensor weight, MaybeTensor bias, MaybeTensor residual_weight,
    MaybeTensor residual_bias, double eps, double residual_eps, MaybeTensor running_mean, MaybeTensor running_var,
    MaybeTensor num_batches_tracked, std::optional<double> momentum, MaybeTensor residual_running_mean,
    MaybeTensor residual_running_var, MaybeTensor residual_num_batches_tracked,
    std::optional<double> residual_momentum) {
  AddBnCall call("bn_add_bn_relu_forward", x, residual, eps, residual_eps);
  BnRunningStatistics running{running_mean, running_var, num_batches_tracked, momentum};
  BnRunningStatistics residual_running{residual_running_mean, residual_running_var, residual_num_batches_tracked,
                                       residual_momentum};
  call.affine(weight, bias, residual_weight, residual_bias);
  call.check_training(running, residual_running);
  auto [mean, var] = new_statistics(call.main);
  auto [residual_mean, residual_var] = new_statistics(call.residual);
  Tensor y = new_output(call.main), mask = call.main.new_mask();
  call.main.run(kBnStatistics | kBnApply);
  move_statistics(running, mean, var, double(call.main.values));
  move_statistics(residual_running, residual_mean, residual_var, double(call.main.values));
  return {y, mean, var, residual_mean, residual_var, mask};
}

std::tuple<Tensor, Tensor> bn_add_bn_relu_apply(Tensor x, Tensor residual, MaybeTensor weight, MaybeTensor bias,
                                                MaybeTensor residual_weight, MaybeTensor residual_bias, Tensor mean,
                                                Tensor var, Tensor residual_mean, Tensor residual_var, double eps,
                                                double residual_eps) {
  AddBnCall call("bn_add_bn_relu_apply", x, residual, eps, residual_eps);
  call.affine(weight, bias, residual_weight, residual_bias);
  call.statistics(mean, var, residual_mean, residual_var);
  call.training(false);  // the statistics need not be those of x: x is read even where the weight is zero
  Tensor y = new_output(call.main), mask = call.main.new_mask();
  call.main.run(kBnApply);
  return {y, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_add_bn_relu_backward(
    Tensor dy, Tensor x, Tensor residual, Tensor mask, MaybeTensor weight, MaybeTensor residual_weight, Tensor mean,
    Tensor var, Tensor residual_mean, Tensor residual_var, double eps, double residual_eps, bool training,
    MaybeTensor dy2) {
  AddBnCall call("bn_add_bn_relu_backward", x, residual, eps, residual_eps);
  Call& main = call.main;
  main.arguments.dy = main.like_x("dy", dy);
  main.read_mask(mask);
  call.affine(weight, std::nullopt, residual_weight, std::nullopt);
  call.statistics(mean, var, residual_mean, residual_var);
  call.training(training);
  const BnCall::SecondGradient second = main.second_gradient(dy2);
  auto [dweight, dbias] = new_sums(main);
  Tensor dresidual_weight = call.residual.new_per_channel();
  call.residual.arguments.dweight = dresidual_weight.mutable_data_ptr();
  call.residual.arguments.dbias = main.arguments.dbias;
  Tensor dx = main.new_like_x(), dresidual = main.new_like_x();
  main.arguments.dx = dx.mutable_data_ptr();
  main.add(second);
  main.arguments.dresidual = dresidual.mutable_data_ptr();
  main.run(kBnReduce | kBnBackward);
  return {dx, dresidual, dweight, dresidual_weight, dbias};
}

}  // namespace
}  // namespace fasttricks::cpu

STABLE_TORCH_LIBRARY_IMPL(fasttricks, CPU, m) {
  using namespace fasttricks::cpu;
  m.impl("bn_add_bn_relu_forward", TORCH_BOX(&bn_add_bn_relu_forward));
  m.impl("bn_add_bn_relu_apply", TORCH_BOX(&bn_add_bn_relu_apply));
  m.impl("bn_add_bn_relu_backward", TORCH_BOX(&bn_add_bn_relu_backward));
}

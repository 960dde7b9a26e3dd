// The schemas of every op, once; csrc/cpu and csrc/cuda register implementations for them.
#include <torch/csrc/stable/library.h>

#ifndef FT_LIBRARY_NAME  // tests give the emulated CUDA kernels a name of their own
#define FT_LIBRARY_NAME fasttricks
#endif
#define FT_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)  // expands the name

FT_LIBRARY(FT_LIBRARY_NAME, m) {
  // bn_relu, bn_add_relu: see csrc/math/bn.h for the formulas. mean and var are biased, float32 (float64 for float64).
  // dy2: a second gradient of y, which is added to dy; of the shape of x, or of the 2x2 means of y.
  // The forward ops update the running statistics themselves, so that a recomputed forward pass updates them as well.
#define FT_RUNNING                                                                                      \
  " Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, Tensor(c!)? num_batches_tracked=None," \
  " float? momentum=0.1)"
  m.def("bn_relu_forward(Tensor x, Tensor? weight, Tensor? bias, float eps," FT_RUNNING
        " -> (Tensor y, Tensor mean, Tensor var)");
  m.def("bn_add_relu_forward(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps," FT_RUNNING
        " -> (Tensor y, Tensor mean, Tensor var, Tensor mask)");
#undef FT_RUNNING
  m.def("bn_relu_apply(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps) -> Tensor");
  m.def(
      "bn_add_relu_apply(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps)"
      " -> (Tensor y, Tensor mask)");
  // pooled: the means of the 2x2 windows of y; ceil_mode: with those that overhang an odd edge, each over its pixels
  // inside.
  m.def(
      "bn_add_relu_pool_forward(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps,"
      " Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum,"
      " bool ceil_mode) -> (Tensor y, Tensor pooled, Tensor mean, Tensor var, Tensor mask)");
  m.def(
      "bn_add_relu_pool_apply(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var,"
      " float eps, bool ceil_mode) -> (Tensor y, Tensor pooled, Tensor mask)");
  m.def("bn_stats(Tensor x) -> (Tensor mean, Tensor var)");
  m.def(
      "bn_relu_backward(Tensor dy, Tensor x, Tensor? mask, Tensor? weight, Tensor? bias, Tensor mean, Tensor var,"
      " float eps, bool training, bool need_dresidual, Tensor? dy2=None)"
      " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)");
  m.def(
      "bn_relu_backward_reduce(Tensor dy, Tensor x, Tensor? mask, Tensor? weight, Tensor? bias, Tensor mean,"
      " Tensor var, float eps) -> (Tensor dweight, Tensor dbias)");
  // mean_dweight, mean_dbias: dweight and dbias divided by M, the number of values per channel over all replicas.
  m.def(
      "bn_relu_backward_apply(Tensor dy, Tensor x, Tensor? mask, Tensor? weight, Tensor? bias, Tensor mean, Tensor var,"
      " float eps, Tensor mean_dweight, Tensor mean_dbias, bool need_dresidual) -> (Tensor dx, Tensor dresidual)");
  // count: M, a float64 scalar on the device, so that merged statistics need not wait for it.
  m.def(
      "bn_update_stats_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, Tensor count,"
      " Tensor(c!)? num_batches_tracked=None, float? momentum=0.1) -> ()");

  // bn_add_bn_relu: y = relu(bn(x) + bn(residual)), each with statistics, weight and bias of its own. dbias is that of
  // both.
  m.def(
      "bn_add_bn_relu_forward(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? residual_weight,"
      " Tensor? residual_bias, float eps, float residual_eps, Tensor(a!)? running_mean=None,"
      " Tensor(b!)? running_var=None, Tensor(c!)? num_batches_tracked=None, float? momentum=0.1,"
      " Tensor(d!)? residual_running_mean=None, Tensor(e!)? residual_running_var=None,"
      " Tensor(f!)? residual_num_batches_tracked=None, float? residual_momentum=0.1)"
      " -> (Tensor y, Tensor mean, Tensor var, Tensor residual_mean, Tensor residual_var, Tensor mask)");
  m.def(
      "bn_add_bn_relu_apply(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? residual_weight,"
      " Tensor? residual_bias, Tensor mean, Tensor var, Tensor residual_mean, Tensor residual_var, float eps,"
      " float residual_eps) -> (Tensor y, Tensor mask)");
  m.def(
      "bn_add_bn_relu_backward(Tensor dy, Tensor x, Tensor residual, Tensor mask, Tensor? weight,"
      " Tensor? residual_weight, Tensor mean, Tensor var, Tensor residual_mean, Tensor residual_var, float eps,"
      " float residual_eps, bool training, Tensor? dy2=None)"
      " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dresidual_weight, Tensor dbias)");

  m.def("cpu_isa() -> str");  // the instruction set in use
  // Why the CUDA kernels cannot run on this device (an older driver, no code for the card); "" if they can.
  m.def("cuda_why_not(int device) -> str");

  // avgpool_conv1x1: see csrc/math/avgpool.h. pooled_dx: dx is the gradient of the means, not of x.
  m.def("avgpool_conv1x1_forward(Tensor x, Tensor weight, Tensor? bias, int stride, bool ceil_mode) -> Tensor");
  m.def(
      "avgpool_conv1x1_backward(Tensor dy, Tensor x, Tensor weight, int stride, bool ceil_mode, bool need_dx,"
      " bool need_dweight, bool need_dbias, bool pooled_dx=False) -> (Tensor dx, Tensor dweight, Tensor dbias)");

  // sgd_check, sgd_step: see csrc/math/sgd.h. One call per step for all tensors of a device: those of group 0, then
  // those of group 1, ... Half parameters have masters; parameters of groups with momentum have momentum_buffers and
  // steps.
  m.def(
      "sgd_check(Tensor[] grads, Tensor[] params, Tensor[] masters, Tensor(a!) found_inf, Tensor(b!)? grad_sq,"
      " Tensor(c!)? weight_sq) -> ()");
  m.def(
      "sgd_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] steps,"
      " Tensor(d!)[] masters, int[] group_sizes, Tensor[] lr, float[] momentum, float[] dampening, float[] "
      "weight_decay,"
      " bool[] nesterov, bool[] maximize, float[] trust_coefficient, float eps, bool lr_in_momentum, float max_norm,"
      " Tensor? grad_scale, Tensor? found_inf, Tensor? grad_sq, Tensor? weight_sq) -> ()");
}

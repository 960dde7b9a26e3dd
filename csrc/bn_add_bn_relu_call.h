// One call of bn_add_bn_relu on any device: the BatchNorm of x and that of the residual.
#pragma once

#include "bn_relu_call.h"

namespace fasttricks {

// Call: BnCall as a device extends it, with both constructors, affine(weight, bias) and statistics(mean, var).
template <class Call>
struct BnAddBnCall {
  Call main, residual;

  BnAddBnCall(const char* op, const Tensor& x, const Tensor& residual_, double eps, double residual_eps)
      : main(op, x, eps), residual(main, residual_, residual_eps) {}

  void affine(const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual_weight,
              const MaybeTensor& residual_bias) {
    main.affine(weight, bias);
    residual.affine(residual_weight, residual_bias);
  }
  void statistics(const Tensor& mean, const Tensor& var, const Tensor& residual_mean, const Tensor& residual_var) {
    main.statistics(mean, var);
    residual.statistics(residual_mean, residual_var);
  }
  // What batch statistics need.
  void check_training(const BnRunningStatistics& running, const BnRunningStatistics& residual_running) const {
    running.check(main);
    residual_running.check(residual);
    check_several_values(main);
  }
};

}  // namespace fasttricks

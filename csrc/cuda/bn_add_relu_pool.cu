// bn_add_relu with the 2x2 means of its output on CUDA tensors: checks, allocation and registration;
// bn_add_relu_pool_run.cuh launches.
#include "bn_add_relu_pool_run.cuh"
#include "bn_call.cuh"

namespace fasttricks::cuda::ops {
namespace {

struct PoolCall : Call {
  const void* z;
  std::array<int64_t, 4> sizes;
  BnWindows windows;

  PoolCall(const char* op, const Tensor& x, const Tensor& residual, const MaybeTensor& weight, const MaybeTensor& bias,
           double eps, bool ceil_mode)
      : Call(op, x, eps),
        z(like_x("residual", residual)),
        sizes(pooled_sizes(ceil_mode)),
        windows(x.size(2), x.size(3), ceil_mode) {
    affine(weight, bias);
  }

  std::tuple<Tensor, Tensor, Tensor> launch_apply_pool(bool from_x) const {
    Tensor y = new_like_x(), mask = torch::stable::new_empty(x, {mask_bytes()}, ScalarType::Byte);
    Tensor pooled = torch::stable::empty(sizes, x.scalar_type(), std::nullopt, x.device(), std::nullopt, layout);
    if (empty()) return {y, pooled, mask};
    with_type(x.scalar_type(), [&](auto t) {
      using T = decltype(t);
      bn_apply_pool_run(data<T>(), static_cast<const T*>(z), params<acc_t<T>>(), from_x, shape, windows, on.device,
                        static_cast<T*>(y.mutable_data_ptr()), static_cast<uint8_t*>(mask.mutable_data_ptr()),
                        static_cast<T*>(pooled.mutable_data_ptr()), on.stream);
    });
    return {y, pooled, mask};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_add_relu_pool_forward(
    Tensor x, Tensor residual, MaybeTensor weight, MaybeTensor bias, double eps, MaybeTensor running_mean,
    MaybeTensor running_var, MaybeTensor num_batches_tracked, std::optional<double> momentum, bool ceil_mode) {
  PoolCall call("bn_add_relu_pool_forward", x, residual, weight, bias, eps, ceil_mode);
  BnRunningStatistics running{running_mean, running_var, num_batches_tracked, momentum};
  running.check(call);
  check_several_values(call);
  Call::Statistics made = call.new_statistics();
  call.launch_stats(made);
  auto [y, pooled, mask] = call.launch_apply_pool(true);
  move_statistics(running, made.mean, made.var, nullptr, call.values, call.on.stream);
  return {y, pooled, made.mean, made.var, mask};
}

std::tuple<Tensor, Tensor, Tensor> bn_add_relu_pool_apply(Tensor x, Tensor residual, MaybeTensor weight,
                                                          MaybeTensor bias, Tensor mean, Tensor var, double eps,
                                                          bool ceil_mode) {
  PoolCall call("bn_add_relu_pool_apply", x, residual, weight, bias, eps, ceil_mode);
  call.statistics(mean, var);
  return call.launch_apply_pool(false);
}

}  // namespace
}  // namespace fasttricks::cuda::ops

FT_CUDA_LIBRARY(m) {
  using namespace fasttricks::cuda::ops;
  m.impl("bn_add_relu_pool_forward", TORCH_BOX(&bn_add_relu_pool_forward));
  m.impl("bn_add_relu_pool_apply", TORCH_BOX(&bn_add_relu_pool_apply));
}

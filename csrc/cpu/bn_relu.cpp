// bn_relu and bn_add_relu on the CPU: checks, allocation and the division of work; the kernels are in isa/bn_relu.cpp.
#include "cpu/bn_relu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bn_relu_call.h"
#include "cpu/allocate.h"
#include "math/bn.h"
#include "math/welford.h"

namespace fasttricks::cpu {
namespace {

using torch::stable::parallel_for;

const BnOfType& kernels_of(ScalarType t) {
  const BnReluKernels& all = FT_KERNELS(bn_relu_kernels);
  return t == ScalarType::Float    ? all.float32
         : t == ScalarType::Double ? all.float64
         : t == ScalarType::Half   ? all.float16
                                   : all.bfloat16;
}

// The arguments of a call as the kernels take them.
struct Call : BnCall {
  BnArguments arguments{};

  Call(const char* op, const Tensor& given, double eps) : BnCall(op, given, eps) {
    BnArguments& a = arguments;
    a.channels = channels;
    a.rows = rows;
    a.inner = inner;
    a.eps = eps;
    a.training = true;
    a.count = double(values);
    a.x = x.const_data_ptr();
  }

  bool by_rows() const { return inner == 1; }

  void affine(const MaybeTensor& weight, const MaybeTensor& bias) {
    if (weight.has_value()) arguments.weight = per_channel("weight", *weight);
    if (bias.has_value()) arguments.bias = per_channel("bias", *bias);
  }

  // The kernels only read statistics that are given.
  void statistics(const Tensor& mean, const Tensor& var) {
    arguments.mean = const_cast<void*>(per_channel("mean", mean));
    arguments.var = const_cast<void*>(per_channel("var", var));
  }

  void read_mask(const MaybeTensor& given) {
    arguments.mask_in = mask(given);
    arguments.mask_bytes = given.has_value() ? mask_bytes() : 0;
  }

  Tensor new_like_x() const { return new_tensor(x, x.sizes(), x.scalar_type(), layout); }

  Tensor new_per_channel() const {  // zeros if x is empty: no pass writes them then
    Tensor made = new_tensor(x, {arguments.channels}, statistics_type);
    return empty() ? torch::stable::zero_(made) : made;
  }

  Tensor new_mask() {  // zeros: channels of NCHW share bytes
    Tensor made = new_tensor(x, {mask_bytes()}, ScalarType::Byte);
    arguments.mask_out = static_cast<uint8_t*>(made.mutable_data_ptr());
    if (!empty()) std::memset(arguments.mask_out, 0, size_t(mask_bytes()));
    return made;
  }

  // NCHW: all passes over one channel before the next channel, while it is in the cache.
  void run_channels(int passes) const {
    const BnOfType& kernels = kernels_of(x.scalar_type());
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / (arguments.rows * arguments.inner));
    if (arguments.channels <= grain) return kernels.channels(arguments, passes, 0, arguments.channels);
    parallel_for(0, arguments.channels, grain,
                 [&](int64_t begin, int64_t end) { kernels.channels(arguments, passes, begin, end); });
  }

  // NHWC: slices of whole rows that do not depend on the number of threads; eight rows end on a byte of the mask.
  int64_t slices() const {
    const int64_t rows = std::max<int64_t>(8, (1 << 17) / arguments.channels);
    return std::clamp<int64_t>(arguments.rows / rows, 1, 64);
  }
  // A pass after a reduction goes backwards, because the last rows are still in the cache.
  template <class F>
  void run_slices(const F& f, bool backwards = false) const {
    const int64_t n = slices(), eighths = (arguments.rows + 7) / 8;
    parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t s = backwards ? begin + end - 1 - i : i;
        f(s, std::min(arguments.rows, eighths * s / n * 8), std::min(arguments.rows, eighths * (s + 1) / n * 8));
      }
    });
  }

  // A reduction over the rows: two doubles per channel and slice, stored as two arrays. join(count so far, count of the
  // slice, pair so far, pair of the slice) merges them in the order of the slices.
  template <class Kernel, class Join>
  std::vector<double> reduce_rows(Kernel kernel, const Join& join) const {
    const int64_t n = slices(), channels = arguments.channels;
    std::vector<double> parts(size_t(2 * n * channels)), counts(size_t(n), 0.0);
    run_slices([&](int64_t s, int64_t begin, int64_t end) {
      kernel(arguments, begin, end, &parts[size_t(2 * s * channels)], &parts[size_t((2 * s + 1) * channels)]);
      counts[size_t(s)] = double(end - begin);
    });
    double count = counts[0];
    for (int64_t s = 1; s < n; ++s) {
      const double* part = &parts[size_t(2 * s * channels)];
      for (int64_t c = 0; c < channels; ++c)
        join(count, counts[size_t(s)], parts[size_t(c)], parts[size_t(channels + c)], part[c], part[channels + c]);
      count += counts[size_t(s)];
    }
    return parts;
  }

  void store(void* to, int64_t c, double value) const {
    if (statistics_type == ScalarType::Double)
      static_cast<double*>(to)[c] = value;
    else
      static_cast<float*>(to)[c] = float(value);
  }
  double load(const void* from, int64_t c) const {
    return statistics_type == ScalarType::Double ? static_cast<const double*>(from)[c]
                                                 : double(static_cast<const float*>(from)[c]);
  }

  void run(int passes) {
    if (empty()) return;
    if (!by_rows()) return run_channels(passes);
    const BnOfType& kernels = kernels_of(x.scalar_type());
    BnArguments& a = arguments;
    if (passes & kBnStatistics) {
      const auto join = [](double before, double n, double& mean, double& m2, double mean_s, double m2_s) {
        const Moments<double> all = merge<double>({before, mean, m2}, {n, mean_s, m2_s});
        mean = all.mean, m2 = all.m2;
      };
      const std::vector<double> both = reduce_rows(kernels.row_statistics, join);
      for (int64_t c = 0; c < a.channels; ++c) {
        store(a.mean, c, both[size_t(c)]);
        store(a.var, c, both[size_t(a.channels + c)] / double(a.rows));
      }
    }
    if (passes == kBnStatistics) return;
    std::vector<double> prepared(size_t(5 * a.channels));
    a.prepared = prepared.data();
    if (passes & kBnApply) {
      a.vanish = kernels.prepare(a, false);
      run_slices([&](int64_t, int64_t begin, int64_t end) { kernels.row_apply(a, begin, end); }, true);
    }
    if (passes & kBnReduce) {
      const auto join = [](double, double, double& sum_dz, double& sum_dz_d, double sum_dz_s, double sum_dz_d_s) {
        sum_dz += sum_dz_s, sum_dz_d += sum_dz_d_s;
      };
      kernels.prepare(a, false);
      const std::vector<double> both = reduce_rows(kernels.row_reduce, join);
      for (int64_t c = 0; c < a.channels; ++c) {
        const double var = load(a.var, c);
        const double rstd = statistics_type == ScalarType::Double ? bn_rstd(var, a.eps) : bn_rstd(float(var), a.eps);
        store(a.dbias, c, both[size_t(c)]);
        store(a.dweight, c, both[size_t(a.channels + c)] * rstd);
      }
    }
    if (passes & kBnBackward) {
      a.vanish = kernels.prepare(a, true);
      run_slices([&](int64_t, int64_t begin, int64_t end) { kernels.row_backward(a, begin, end); }, true);
    }
    a.prepared = nullptr;
  }
};

std::tuple<Tensor, Tensor> new_statistics(Call& call) {
  Tensor mean = call.new_per_channel(), var = call.new_per_channel();
  call.arguments.mean = mean.mutable_data_ptr();
  call.arguments.var = var.mutable_data_ptr();
  return {mean, var};
}

Tensor new_output(Call& call) {
  Tensor y = call.new_like_x();
  call.arguments.y = y.mutable_data_ptr();
  return y;
}

template <class R, class N>
void move_statistic(Tensor& running, const Tensor& now, double factor, double momentum) {
  using A = std::conditional_t<std::is_same_v<R, double>, double, float>;
  R* const to = static_cast<R*>(running.mutable_data_ptr());
  const N* const from = static_cast<const N*>(now.const_data_ptr());
  const int64_t channels = now.size(0), stride = running.stride(0), now_stride = now.stride(0);
  for (int64_t c = 0; c < channels; ++c) {
    const A value = A(double(from[c * now_stride]) * factor);
    to[c * stride] = R(bn_update(A(to[c * stride]), value, A(momentum)));
  }
}

void move_statistics(BnRunningStatistics& running, const Tensor& mean, const Tensor& var, double count) {
  int64_t* const batches = running.batches_data();
  if (batches) ++*batches;
  if (!running.mean.has_value() || count == 0) return;
  const double momentum =
      bn_momentum(!running.momentum.has_value(), running.momentum.value_or(0), batches ? *batches : 1);
  const auto move = [momentum](Tensor& r, const Tensor& now, double factor) {
    with_type(r.scalar_type(), [&](auto to) {
      with_type(now.scalar_type(),
                [&](auto from) { move_statistic<decltype(to), decltype(from)>(r, now, factor, momentum); });
    });
  };
  move(*running.mean, mean, 1.0);
  move(*running.var, var, bn_unbiased_factor(count));
}

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

std::tuple<Tensor, Tensor> new_sums(Call& call) {
  Tensor dweight = call.new_per_channel(), dbias = call.new_per_channel();
  call.arguments.dweight = dweight.mutable_data_ptr();
  call.arguments.dbias = dbias.mutable_data_ptr();
  return {dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_relu_backward(Tensor dy, Tensor x, MaybeTensor mask, MaybeTensor weight,
                                                            MaybeTensor bias, Tensor mean, Tensor var, double eps,
                                                            bool training, bool need_dresidual,
                                                            MaybeTensor dy2) {
  FT_CHECK("bn_relu_backward", !dy2.has_value(), "dy2 is given");
  Call call = backward_call("bn_relu_backward", dy, x, mask, weight, bias, mean, var, eps);
  call.arguments.training = training;
  auto [dweight, dbias] = new_sums(call);
  auto [dx, dresidual] = new_gradients(call, mask, need_dresidual);
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

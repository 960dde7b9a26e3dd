// One call of bn_relu, bn_add_relu or bn_add_bn_relu on the CPU: the arguments as the kernels take them, the results,
// and the division of the work.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bn_relu_call.h"
#include "cpu/allocate.h"
#include "cpu/bn_relu.h"
#include "math/bn.h"
#include "math/welford.h"

namespace fasttricks::cpu {

using torch::stable::parallel_for;

inline const BnOfType& kernels_of(ScalarType t) {
  const BnReluKernels& all = FT_KERNELS(bn_relu_kernels);
  return t == ScalarType::Float    ? all.float32
         : t == ScalarType::Double ? all.float64
         : t == ScalarType::Half   ? all.float16
                                   : all.bfloat16;
}

// The arguments of a call as the kernels take them.
struct Call : BnCall {
  BnArguments arguments{};

  Call(const char* op, const Tensor& given, double eps) : BnCall(op, given, eps) { start(eps); }
  Call(const Call& main, const Tensor& residual, double eps) : BnCall(main, residual, eps) { start(eps); }

  void start(double eps) {
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
    if (weight.has_value()) arguments.weight = per_channel(names->weight, *weight);
    if (bias.has_value()) arguments.bias = per_channel(names->bias, *bias);
  }

  // The kernels only read statistics that are given.
  void statistics(const Tensor& mean, const Tensor& var) {
    arguments.mean = const_cast<void*>(per_channel(names->mean, mean));
    arguments.var = const_cast<void*>(per_channel(names->var, var));
  }

  void read_mask(const MaybeTensor& given) {
    arguments.mask_in = mask(given);
    arguments.mask_bytes = given.has_value() ? mask_bytes() : 0;
  }

  // After the gradients are allocated: dz is dresidual or, if that is none, is kept where dx will overwrite it.
  void add(const SecondGradient& given) {
    if (given.data == nullptr) return;
    BnArguments& a = arguments;
    a.second = {given.data, given.pooled, 0, 0, given.height, given.width};
    if (given.pooled) a.second.height = x.size(2), a.second.width = x.size(3);
    a.dz = a.dresidual ? a.dresidual : a.dx;
    a.dresidual = nullptr;
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

  Tensor new_means(bool ceil_mode) {
    const auto sizes = pooled_sizes(ceil_mode);
    Tensor made = new_tensor(x, sizes, x.scalar_type(), layout);
    arguments.means = {made.mutable_data_ptr(), x.size(2), x.size(3), sizes[2], sizes[3]};
    return made;
  }

  // NCHW: all passes over a few channels before the next ones, while they are in the cache.
  void run_channels(int passes) const {
    const BnOfType& kernels = kernels_of(x.scalar_type());
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / (arguments.rows * arguments.inner));
    if (arguments.channels <= grain) return kernels.channels(arguments, passes, 0, arguments.channels);
    parallel_for(0, arguments.channels, grain,
                 [&](int64_t begin, int64_t end) { kernels.channels(arguments, passes, begin, end); });
  }

  // NHWC: slices of whole rows that do not depend on the number of threads; eight rows end on a byte of the mask.
  int64_t slices() const {
    const int64_t rows = std::max<int64_t>(8, (1 << 15) / arguments.channels);
    return std::clamp<int64_t>(arguments.rows / rows, 1, 64);
  }
  // Calls f(s) for the slices s of n. Of two passes over the same rows one goes backwards, so that the second begins
  // with rows that are in the cache. Forward it is the first: a convolution has just written the last rows of x.
  template <class F>
  static void each_slice(int64_t n, bool backwards, const F& f) {
    parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(backwards ? begin + end - 1 - i : i);
    });
  }
  template <class F>
  void run_slices(bool backwards, const F& f) const {
    const int64_t n = slices(), eighths = (arguments.rows + 7) / 8;
    each_slice(n, backwards, [&](int64_t s) {
      f(s, std::min(arguments.rows, eighths * s / n * 8), std::min(arguments.rows, eighths * (s + 1) / n * 8));
    });
  }
  // With means of y the slices are of pairs of image rows.
  void run_apply() const {
    const BnOfType& kernels = kernels_of(x.scalar_type());
    const BnArguments& a = arguments;
    if (!a.means.data)
      return run_slices(false, [&](int64_t, int64_t begin, int64_t end) { kernels.row_apply(a, begin, end); });
    const int64_t pairs = x.size(0) * ceil_div(a.means.height, 2), n = std::min(slices(), pairs);
    each_slice(n, false, [&](int64_t s) { kernels.row_apply_pooled(a, pairs * s / n, pairs * (s + 1) / n); });
  }

  // A reduction over the rows: `arrays` doubles per channel and slice, which kernel(begin, end, arrays) computes.
  // join(count so far, count of the slice, arrays so far, arrays of the slice) merges them in the order of the slices.
  template <class Kernel, class Join>
  std::vector<double> reduce_rows(int64_t arrays, bool backwards, const Kernel& kernel, const Join& join) const {
    const int64_t n = slices(), size = arrays * channels;
    std::vector<double> parts(size_t(n * size)), counts(size_t(n), 0.0);
    run_slices(backwards, [&](int64_t s, int64_t begin, int64_t end) {
      kernel(begin, end, &parts[size_t(s * size)]);
      counts[size_t(s)] = double(end - begin);
    });
    double count = counts[0];
    for (int64_t s = 1; s < n; ++s) {
      join(count, counts[size_t(s)], parts.data(), &parts[size_t(s * size)]);
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

  // NHWC: mean and M2 of x and, after them, of a residual that has a BatchNorm.
  void run_statistics() const {
    const BnOfType& kernels = kernels_of(x.scalar_type());
    const BnArguments* of_residual = arguments.of_residual;
    const int64_t n = channels, arrays = of_residual ? 4 : 2;
    const auto kernel = [&](int64_t begin, int64_t end, double* to) {
      kernels.row_statistics(arguments, begin, end, to, to + n);
      if (of_residual) kernels.row_statistics(*of_residual, begin, end, to + 2 * n, to + 3 * n);
    };
    const auto join = [&](double before, double count, double* all, const double* part) {
      const MergeFactors<double> factors = merge_factors(before, count);
      for (int64_t k = 0; k < arrays * n; k += 2 * n)
        for (int64_t c = k; c < k + n; ++c) merge_into(all[c], all[c + n], part[c], part[c + n], factors);
    };
    const std::vector<double> all = reduce_rows(arrays, true, kernel, join);
    const auto put = [&](const BnArguments& a, const double* from) {
      for (int64_t c = 0; c < n; ++c) {
        store(a.mean, c, from[c]);
        store(a.var, c, from[n + c] / double(rows));
      }
    };
    put(arguments, all.data());
    if (of_residual) put(*of_residual, &all[size_t(2 * n)]);
  }

  // NHWC: dbias, dweight and the dweight of a residual that has a BatchNorm.
  void run_reduce() const {
    const BnOfType& kernels = kernels_of(x.scalar_type());
    const BnArguments* of_residual = arguments.of_residual;
    const int64_t n = channels, arrays = of_residual ? 3 : 2;
    const auto kernel = [&](int64_t begin, int64_t end, double* to) { kernels.row_reduce(arguments, begin, end, to); };
    const auto join = [&](double, double, double* all, const double* part) {
      for (int64_t i = 0; i < arrays * n; ++i) all[i] += part[i];
    };
    const std::vector<double> all = reduce_rows(arrays, false, kernel, join);
    for (int64_t c = 0; c < n; ++c) store(arguments.dbias, c, all[size_t(c)]);
    const auto put_dweight = [&](const BnArguments& a, const double* from) {
      for (int64_t c = 0; c < n; ++c) {
        const double var = load(a.var, c);
        const double rstd = statistics_type == ScalarType::Double ? bn_rstd(var, a.eps) : bn_rstd(float(var), a.eps);
        store(a.dweight, c, from[c] * rstd);
      }
    };
    put_dweight(arguments, &all[size_t(n)]);
    if (of_residual) put_dweight(*of_residual, &all[size_t(2 * n)]);
  }

  void run(int passes) {
    if (empty()) return;
    if (!by_rows()) return run_channels(passes);
    if (passes & kBnStatistics) run_statistics();
    if (passes == kBnStatistics) return;
    const BnOfType& kernels = kernels_of(x.scalar_type());
    BnArguments &a = arguments, *of_residual = a.of_residual;
    std::vector<double> prepared(size_t((of_residual ? 10 : 5) * channels));
    a.prepared = prepared.data();
    if (of_residual) of_residual->prepared = &prepared[size_t(5 * channels)];
    const auto prepare = [&](bool backward) {
      a.vanish = kernels.prepare(a, backward);
      if (of_residual) kernels.prepare(*of_residual, backward);
    };
    if (passes & kBnApply) {
      prepare(false);
      run_apply();
    }
    if (passes & kBnReduce) {
      prepare(false);
      run_reduce();
    }
    if (passes & kBnBackward) {
      prepare(true);
      run_slices(true, [&](int64_t, int64_t begin, int64_t end) { kernels.row_backward(a, begin, end); });
    }
  }
};

inline std::tuple<Tensor, Tensor> new_statistics(Call& call) {
  Tensor mean = call.new_per_channel(), var = call.new_per_channel();
  call.arguments.mean = mean.mutable_data_ptr();
  call.arguments.var = var.mutable_data_ptr();
  return {mean, var};
}

inline std::tuple<Tensor, Tensor> new_sums(Call& call) {
  Tensor dweight = call.new_per_channel(), dbias = call.new_per_channel();
  call.arguments.dweight = dweight.mutable_data_ptr();
  call.arguments.dbias = dbias.mutable_data_ptr();
  return {dweight, dbias};
}

inline Tensor new_output(Call& call) {
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

inline void move_statistics(BnRunningStatistics& running, const Tensor& mean, const Tensor& var, double count) {
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

}  // namespace fasttricks::cpu

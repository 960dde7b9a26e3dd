// One call of bn_relu or bn_add_relu on any device: argument checks, layout, sizes and allocation.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "checks.h"
#include "layout.h"
#include "math/avgpool.h"

namespace fasttricks {

using MaybeTensor = std::optional<Tensor>;

// What the arguments of a BatchNorm are called in errors.
struct BnNames {
  const char *weight, *bias, *mean, *var, *eps, *running_mean, *running_var, *num_batches_tracked, *momentum;
};
inline constexpr BnNames kBnNames{
    "weight", "bias", "mean", "var", "eps", "running_mean", "running_var", "num_batches_tracked", "momentum"};
inline constexpr BnNames kBnResidualNames{
    "residual_weight",  "residual_bias",         "residual_mean",        "residual_var",
    "residual_eps",     "residual_running_mean", "residual_running_var", "residual_num_batches_tracked",
    "residual_momentum"};

// The dense tensors of one call, kept alive while kernels use their pointers. x is a matrix of rows x channels (inner
// is 1) or of rows x channels x inner.
struct BnCall {
  const char* op;
  const BnNames* names;
  Tensor x;
  MemoryFormat layout;
  ScalarType statistics_type;
  int64_t channels, values, rows, inner;
  std::vector<Tensor> kept;

  BnCall(const char* op_, const Tensor& given, double eps) : op(op_), names(&kBnNames), x(given) {
    FT_CHECK(op, x.dim() >= 2 && x.dim() <= 5, "x has shape ", shape_of(x),
             "; accepted: 2 to 5 dimensions (N, C, ...)");
    check_floating(op, "x", x);
    check_eps(eps);
    statistics_type = accumulate_type(x.scalar_type());
    layout = layout_of(x);
    if (!is_dense(x, layout)) x = torch::stable::contiguous(x, layout);
    channels = x.size(1);
    values = empty() ? 0 : x.numel() / channels;
    const bool by_rows = layout != MemoryFormat::Contiguous || values == x.size(0);
    rows = by_rows ? values : x.size(0);
    inner = by_rows || rows == 0 ? 1 : values / rows;
  }
  // The BatchNorm of a residual of x, in the layout of x.
  BnCall(const BnCall& main, const Tensor& residual, double residual_eps)
      : op(main.op),
        names(&kBnResidualNames),
        x(residual),
        layout(main.layout),
        statistics_type(main.statistics_type),
        channels(main.channels),
        values(main.values),
        rows(main.rows),
        inner(main.inner) {
    main.check_like_x("residual", residual);
    check_eps(residual_eps);
    x = in_layout(residual, layout);
  }

  bool empty() const { return x.numel() == 0; }

  void check_eps(double eps) const {
    FT_CHECK(op, eps >= 0 && eps < std::numeric_limits<double>::infinity(), names->eps, " is ", eps,
             "; accepted: a finite number >= 0");
  }
  bool has_shape_of_x(const Tensor& t) const {
    bool same = t.dim() == x.dim();
    for (int64_t d = 0; same && d < x.dim(); ++d) same = t.size(d) == x.size(d);
    return same;
  }
  void check_like_x(const char* name, const Tensor& t) const {
    check_same_device(op, name, t, x);
    check_dtype(op, name, t, x.scalar_type());
    FT_CHECK(op, has_shape_of_x(t), name, " has shape ", shape_of(t), "; accepted: ", shape_of(x), ", the shape of x");
  }
  const void* like_x(const char* name, const Tensor& t) {
    check_like_x(name, t);
    return dense(t);
  }
  // The values of t in the layout of x.
  const void* dense(const Tensor& t) {
    return is_dense(t, layout) ? t.const_data_ptr() : keep(torch::stable::contiguous(t, layout));
  }

  // Accepts every floating dtype that the type of the statistics represents exactly.
  void check_per_channel(const char* name, const Tensor& t) const {
    check_same_device(op, name, t, x);
    const ScalarType type = t.scalar_type();
    FT_CHECK(op, is_floating(type) && (type != ScalarType::Double || statistics_type == type), name, " has dtype ",
             name_of(type), "; accepted: float16, bfloat16, float32",
             statistics_type == ScalarType::Double ? ", float64" : "");
    FT_CHECK(op, t.dim() == 1 && t.size(0) == channels, name, " has shape ", shape_of(t), "; accepted: (", channels,
             ",), the channels of x");
  }
  // Returns the values in the type of the statistics.
  const void* per_channel(const char* name, const Tensor& t) {
    check_per_channel(name, t);
    if (t.scalar_type() == statistics_type && is_dense(t, MemoryFormat::Contiguous)) return t.const_data_ptr();
    return keep(torch::stable::contiguous(torch::stable::to(t, statistics_type)));
  }

  // The bits of bn_add_relu's forward; null where there are none.
  const uint8_t* mask(const MaybeTensor& mask) {
    if (!mask.has_value()) return nullptr;
    check_same_device(op, "mask", *mask, x);
    check_dtype(op, "mask", *mask, ScalarType::Byte);
    FT_CHECK(op, mask->dim() == 1 && mask->size(0) == mask_bytes(), "mask has shape ", shape_of(*mask), "; accepted: (",
             mask_bytes(), ",), a bit for each element of x");
    if (is_dense(*mask, MemoryFormat::Contiguous)) return static_cast<const uint8_t*>(mask->const_data_ptr());
    return static_cast<const uint8_t*>(keep(torch::stable::contiguous(*mask)));
  }
  int64_t mask_bytes() const { return (x.numel() + 7) / 8; }

  // A second gradient of y: of the shape of x, or, pooled, of the 2x2 means of y, of which the last window of an odd
  // edge may be smaller.
  struct SecondGradient {
    const void* data = nullptr;
    bool pooled = false;
    int64_t height = 0, width = 0;  // of the means
  };
  SecondGradient second_gradient(const MaybeTensor& dy2) {
    if (!dy2.has_value()) return {};
    check_same_device(op, "dy2", *dy2, x);
    check_dtype(op, "dy2", *dy2, x.scalar_type());
    const bool same = has_shape_of_x(*dy2);
    bool pooled = dy2->dim() == 4 && x.dim() == 4;
    for (int64_t d = 0; pooled && d < 4; ++d) {
      const int64_t size = x.size(d), given = dy2->size(d);
      pooled = d < 2 ? given == size : given == size / 2 || given == (size + 1) / 2;
    }
    FT_CHECK(op, same || pooled, "dy2 has shape ", shape_of(*dy2), "; accepted: ", shape_of(x),
             ", the shape of x, or that of its 2x2 means");
    const void* data = dense(*dy2);
    return same ? SecondGradient{data} : SecondGradient{data, true, dy2->size(2), dy2->size(3)};
  }

  // The sizes of the 2x2 means of y.
  std::array<int64_t, 4> pooled_sizes(bool ceil_mode) const {
    FT_CHECK(op, x.dim() == 4, "x has shape ", shape_of(x), "; accepted: 4 dimensions (N, C, H, W)");
    const int64_t height = avgpool_out_size(x.size(2), 2, ceil_mode), width = avgpool_out_size(x.size(3), 2, ceil_mode);
    FT_CHECK(op, height > 0 && width > 0, "x has shape ", shape_of(x), ", so that the pooled output would be ", height,
             " x ", width, ": Output size is too small; accepted: H and W of at least ", ceil_mode ? 1 : 2);
    return {x.size(0), x.size(1), height, width};
  }

  void check_need_dresidual(bool need, const MaybeTensor& mask) const {
    FT_CHECK(op, !need || mask.has_value() || empty(),
             "need_dresidual is true and mask is None; accepted: the mask that the forward op gave");
  }
  Tensor new_like_x() const {
    return torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt, layout);
  }

  const void* keep(const Tensor& t) {
    kept.push_back(t);
    return kept.back().const_data_ptr();
  }
};

// The running statistics that an op updates, and the momentum.
struct BnRunningStatistics {
  MaybeTensor mean, var, batches;  // batches: num_batches_tracked
  std::optional<double> momentum;  // none: the cumulative average

  void check_numbers(const char* op, const Tensor& x, const BnNames& names = kBnNames) const {
    FT_CHECK(op, mean.has_value() == var.has_value(), mean.has_value() ? names.running_var : names.running_mean,
             " is None and the other is not; accepted: both, or neither");
    FT_CHECK(op, !momentum.has_value() || std::abs(*momentum) < std::numeric_limits<double>::infinity(), names.momentum,
             " is ", momentum.value_or(0), "; accepted: a finite number");
    FT_CHECK(op, momentum.has_value() || !mean.has_value() || batches.has_value(), names.momentum, " is None and ",
             names.num_batches_tracked, " is None; accepted: one of the two given");
    if (!batches.has_value()) return;
    check_same_device(op, names.num_batches_tracked, *batches, x);
    check_dtype(op, names.num_batches_tracked, *batches, ScalarType::Long);
    FT_CHECK(op, batches->numel() == 1, names.num_batches_tracked, " has shape ", shape_of(*batches),
             "; accepted: (), a number");
  }
  void check(const BnCall& call) const {
    check_numbers(call.op, call.x, *call.names);
    if (!mean.has_value()) return;
    call.check_per_channel(call.names->running_mean, *mean);
    call.check_per_channel(call.names->running_var, *var);
  }
  int64_t* batches_data() const {
    return batches.has_value() ? static_cast<int64_t*>(batches->mutable_data_ptr()) : nullptr;
  }
};

// What bn_update_stats_ accepts.
inline void check_update_stats(const BnRunningStatistics& running, const Tensor& mean, const Tensor& var,
                               const Tensor& count) {
  const char* op = "bn_update_stats_";
  running.check_numbers(op, mean);
  FT_CHECK(op, mean.dim() == 1, "mean has shape ", shape_of(mean), "; accepted: (C,)");
  const auto check = [&](const char* name, const Tensor& t) {
    check_floating(op, name, t);
    check_same_device(op, name, t, mean);
    FT_CHECK(op, t.dim() == 1 && t.size(0) == mean.size(0), name, " has shape ", shape_of(t), "; accepted: (",
             mean.size(0), ",), the channels of mean");
  };
  check("mean", mean);
  check("var", var);
  check("running_mean", *running.mean);
  check("running_var", *running.var);
  check_same_device(op, "count", count, mean);
  check_dtype(op, "count", count, ScalarType::Double);
  FT_CHECK(op, count.numel() == 1, "count has shape ", shape_of(count), "; accepted: (), a number");
}

// The variance of a single value is undefined.
inline void check_several_values(const BnCall& call) {
  FT_CHECK(
      call.op, call.values != 1, "x has shape ", shape_of(call.x),
      ": Expected more than 1 value per channel for batch statistics; accepted: two or more, or running statistics");
}

}  // namespace fasttricks

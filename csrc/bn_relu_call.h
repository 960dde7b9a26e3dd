// One call of bn_relu or bn_add_relu on any device: argument checks, layout, sizes and allocation.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "checks.h"

namespace fasttricks {

using torch::headeronly::MemoryFormat;
using MaybeTensor = std::optional<Tensor>;

// y, dx and dresidual take the layout of x; an x that is dense in neither layout is copied into the one it resembles.
// src/fasttricks/layout.py makes the same choice.
inline MemoryFormat bn_layout(const Tensor& x) {
  int64_t dense = 1;
  bool contiguous = true;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    contiguous = contiguous && (x.size(d) == 1 || x.stride(d) == dense);
    dense *= x.size(d);
  }
  if (contiguous || x.numel() == 0 || x.size(1) == 1 || x.stride(1) != 1) return MemoryFormat::Contiguous;
  return x.dim() == 4   ? MemoryFormat::ChannelsLast
         : x.dim() == 5 ? MemoryFormat::ChannelsLast3d
                        : MemoryFormat::Contiguous;
}

// The tensors of one call, dense; keeps alive what kernels are given pointers to. x is a matrix of rows x channels
// (inner is 1) or of rows x channels x inner.
struct BnCall {
  const char* op;
  Tensor x;
  MemoryFormat layout;
  ScalarType statistics_type;
  int64_t channels, values, rows, inner;
  std::vector<Tensor> kept;

  BnCall(const char* op_, const Tensor& given, double eps) : op(op_), x(given) {
    FT_CHECK(op, x.dim() >= 2 && x.dim() <= 5, "x has shape ", shape_of(x),
             "; accepted: 2 to 5 dimensions (N, C, ...)");
    check_floating(op, "x", x);
    FT_CHECK(op, eps >= 0, "eps is ", eps, "; accepted: zero or more");
    statistics_type = accumulate_type(x.scalar_type());
    layout = bn_layout(x);
    x = torch::stable::contiguous(x, layout);
    channels = x.size(1);
    values = empty() ? 0 : x.numel() / channels;
    const bool by_rows = layout != MemoryFormat::Contiguous || values == x.size(0);
    rows = by_rows ? values : x.size(0);
    inner = by_rows || rows == 0 ? 1 : values / rows;
  }

  bool empty() const { return x.numel() == 0; }

  const void* like_x(const char* name, const Tensor& t) {
    check_same_device(op, name, t, x);
    check_dtype(op, name, t, x.scalar_type());
    bool same = t.dim() == x.dim();
    for (int64_t d = 0; same && d < x.dim(); ++d) same = t.size(d) == x.size(d);
    FT_CHECK(op, same, name, " has shape ", shape_of(t), "; accepted: that of x, ", shape_of(x));
    return keep(torch::stable::contiguous(t, layout));
  }

  void check_per_channel(const char* name, const Tensor& t) const {
    check_same_device(op, name, t, x);
    check_floating(op, name, t);
    FT_CHECK(op, t.dim() == 1 && t.size(0) == channels, name, " has shape ", shape_of(t), "; accepted: (", channels,
             ",), the channels of x");
  }
  // In the type of the statistics.
  const void* per_channel(const char* name, const Tensor& t) {
    check_per_channel(name, t);
    return keep(torch::stable::contiguous(torch::stable::to(t, statistics_type)));
  }

  // The bits of bn_add_relu's forward; null where there are none.
  const uint8_t* mask(const MaybeTensor& mask) {
    if (!mask.has_value()) return nullptr;
    check_same_device(op, "mask", *mask, x);
    check_dtype(op, "mask", *mask, ScalarType::Byte);
    FT_CHECK(op, mask->dim() == 1 && mask->size(0) == mask_bytes(), "mask has shape ", shape_of(*mask), "; accepted: (",
             mask_bytes(), ",), a bit for each element of x");
    return static_cast<const uint8_t*>(keep(torch::stable::contiguous(*mask)));
  }
  int64_t mask_bytes() const { return (x.numel() + 7) / 8; }

  void check_need_dresidual(bool need, const MaybeTensor& mask) const {
    FT_CHECK(op, !need || mask.has_value() || empty(),
             "need_dresidual is true and mask is None; accepted: the mask that the forward op gave");
  }
  void check_count(int64_t count) const {
    FT_CHECK(op, count > 0 || empty(), "count is ", count, "; accepted: a positive number of values per channel");
  }

  Tensor new_like_x() const {
    return torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt, layout);
  }

  const void* keep(const Tensor& t) {
    kept.push_back(t);
    return kept.back().const_data_ptr();
  }
};

// What bn_update_stats_ accepts.
inline void check_update_stats(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean,
                               const Tensor& var, int64_t count) {
  const char* op = "bn_update_stats_";
  FT_CHECK(op, count >= 0, "count is ", count, "; accepted: zero or more values per channel");
  FT_CHECK(op, mean.dim() == 1 && var.dim() == 1 && mean.size(0) == var.size(0), "mean has shape ", shape_of(mean),
           " and var ", shape_of(var), "; accepted: (C,) both");
  const auto check = [&](const char* name, const Tensor& running, const Tensor& now) {
    check_floating(op, name, running);
    check_same_device(op, name, running, now);
    FT_CHECK(op, running.dim() == 1 && running.size(0) == now.size(0), name, " has shape ", shape_of(running),
             "; accepted: (", now.size(0), ",), that of the new statistics");
  };
  check("running_mean", running_mean, mean);
  check("running_var", running_var, var);
}

// The biased variance times this is the unbiased one. One value has none: the modules refuse it in training, the raw op
// keeps the biased one.
inline double unbiased_factor(int64_t count) { return count > 1 ? double(count) / double(count - 1) : 1.0; }

}  // namespace fasttricks

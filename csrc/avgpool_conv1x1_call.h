// The arguments of avgpool_conv1x1 on any device: checks, layout, sizes and allocation.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>

#include "checks.h"
#include "layout.h"
#include "math/avgpool.h"

namespace fasttricks {

using MaybeTensor = std::optional<Tensor>;

inline AvgPoolConv1x1Sizes avgpool_conv1x1_sizes(const char* op, const Tensor& x, const Tensor& weight, int64_t stride,
                                                 bool ceil_mode) {
  FT_CHECK(op, x.dim() == 4, "x has shape ", shape_of(x), "; accepted: 4 dimensions (N, C, H, W)");
  check_floating(op, "x", x);
  check_dtype(op, "weight", weight, x.scalar_type());
  check_same_device(op, "weight", weight, x);
  FT_CHECK(op,
           weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) > 0 && weight.size(1) == x.size(1) &&
               weight.size(2) == 1 && weight.size(3) == 1,
           "weight has shape ", shape_of(weight), " and x ", shape_of(x),
           "; accepted: weight of shape (Cout, C, 1, 1) with the C of x, none of them zero (no groups, no other kernel "
           "size)");
  FT_CHECK(op, stride == 1 || stride == 2, "stride is ", stride, "; accepted: 1, 2");
  AvgPoolConv1x1Sizes s;
  s.n = x.size(0), s.c = x.size(1), s.h = x.size(2), s.w = x.size(3), s.o = weight.size(0), s.stride = stride;
  s.ho = avgpool_out_size(s.h, stride, ceil_mode), s.wo = avgpool_out_size(s.w, stride, ceil_mode);
  FT_CHECK(op, s.ho > 0 && s.wo > 0, "x has shape ", shape_of(x), ", so that the output would be ", s.ho, " x ", s.wo,
           ": Output size is too small; accepted: H and W of at least ", ceil_mode ? 1 : stride);
  s.nhwc = layout_of(x) == MemoryFormat::ChannelsLast;
  return s;
}

inline void check_avgpool_conv1x1_bias(const char* op, const MaybeTensor& bias, const Tensor& x,
                                       const AvgPoolConv1x1Sizes& s) {
  if (!bias.has_value()) return;
  check_dtype(op, "bias", *bias, x.scalar_type());
  check_same_device(op, "bias", *bias, x);
  FT_CHECK(op, bias->dim() == 1 && bias->size(0) == s.o, "bias has shape ", shape_of(*bias), "; accepted: (", s.o,
           ",), the Cout of weight");
}

inline void check_avgpool_conv1x1_dy(const char* op, const Tensor& dy, const Tensor& x, const AvgPoolConv1x1Sizes& s) {
  check_dtype(op, "dy", dy, x.scalar_type());
  check_same_device(op, "dy", dy, x);
  FT_CHECK(op, dy.dim() == 4 && dy.size(0) == s.n && dy.size(1) == s.o && dy.size(2) == s.ho && dy.size(3) == s.wo,
           "dy has shape ", shape_of(dy), "; accepted: (", s.n, ", ", s.o, ", ", s.ho, ", ", s.wo, "), the shape of y");
}

inline Tensor avgpool_conv1x1_empty(const Tensor& like, std::array<int64_t, 4> sizes, bool nhwc) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              nhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Whether a tensor of the weight's shape is Cout rows of C.
inline bool is_matrix(const Tensor& weight, const AvgPoolConv1x1Sizes& s) {
  return (s.c == 1 || weight.stride(1) == 1) && (s.o == 1 || weight.stride(0) == s.c);
}

}  // namespace fasttricks

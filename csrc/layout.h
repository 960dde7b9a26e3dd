// The layout of tensors in memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>

namespace fasttricks {

using torch::headeronly::MemoryFormat;

// Whether t is dense in this layout: contiguous, or contiguous with the channels as the innermost dimension.
inline bool is_dense(const torch::stable::Tensor& t, MemoryFormat layout) {
  const auto sizes = t.sizes(), strides = t.strides();
  if (t.numel() == 0) return true;
  int64_t expected = 1;
  const auto follows = [&](int64_t d) {
    const bool fits = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
    return fits;
  };
  const bool channels_last = layout != MemoryFormat::Contiguous;
  if (channels_last && !follows(1)) return false;
  for (int64_t d = t.dim() - 1; d >= 0; --d)
    if (!(channels_last && d == 1) && !follows(d)) return false;
  return true;
}

// The layout of a result with the shape of x (N, C, ...): the layout of x or, if x is dense in neither layout and is
// copied, the one that its strides resemble. src/fasttricks/layout.py makes the same choice.
inline MemoryFormat layout_of(const torch::stable::Tensor& x) {
  if (is_dense(x, MemoryFormat::Contiguous) || x.numel() == 0 || x.size(1) == 1 || x.stride(1) != 1)
    return MemoryFormat::Contiguous;
  return x.dim() == 4   ? MemoryFormat::ChannelsLast
         : x.dim() == 5 ? MemoryFormat::ChannelsLast3d
                        : MemoryFormat::Contiguous;
}

// Returns t if it is dense in this layout, else a dense copy.
inline torch::stable::Tensor in_layout(const torch::stable::Tensor& t, MemoryFormat layout) {
  return is_dense(t, layout) ? t : torch::stable::contiguous(t, layout);
}

}  // namespace fasttricks

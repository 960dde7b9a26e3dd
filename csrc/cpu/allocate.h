// Results of the ops on the CPU.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "checks.h"
#include "cpu/huge_pages.h"
#include "layout.h"

namespace fasttricks::cpu {

// As torch's empty on the device of `like`; the small ones past the dispatcher. At most five dimensions.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type,
                         MemoryFormat layout = MemoryFormat::Contiguous) {
  const int64_t dims = int64_t(sizes.size());
  std::array<int64_t, 5> strides{};
  int64_t numel = 1, next = 1;
  const auto place = [&](int64_t d) {
    strides[size_t(d)] = next;
    next *= std::max<int64_t>(sizes[size_t(d)], 1);
    numel *= sizes[size_t(d)];
  };
  const bool channels_last = layout != MemoryFormat::Contiguous;
  if (channels_last) place(1);
  for (int64_t d = dims - 1; d >= 0; --d)
    if (!(channels_last && d == 1)) place(d);
  constexpr int64_t kSmall = 1024;  // elements up to which the dispatcher would take longer than the kernel
  if (numel > kSmall) {
    Tensor made = torch::stable::empty(sizes, type, std::nullopt, like.device(), std::nullopt, layout);
    advise_huge_pages(made.mutable_data_ptr(), numel * int64_t(made.element_size()));
    return made;
  }
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes.data(), strides.data(), dtype, device_type, device_index, &made));
  return Tensor(made);
}

}  // namespace fasttricks::cpu

// Small results, allocated without the dispatcher, whose cost matters for them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "types.h"

namespace fasttricks::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// As torch.empty_strided with the device of `like` and a dtype, as aoti_torch_get_dtype gives it.
inline Tensor make_small(const Tensor& like, int32_t dtype, const int64_t* sizes, const int64_t* strides,
                         int64_t dims) {
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, &made));
  return Tensor(made);
}

// As above, with the dtype of `like`.
inline Tensor make_small(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dims) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return make_small(like, dtype, sizes, strides, dims);
}

inline bool is_small(const Tensor& like, int64_t numel) { return numel * int64_t(like.element_size()) <= 4096; }

}  // namespace fasttricks::cpu

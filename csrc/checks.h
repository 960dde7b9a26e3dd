// Argument checks of the raw ops: each error names the op, the argument, what was given and what is accepted, in the
// words of src/fasttricks/checks.py.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

#include "math/common.h"
#include "types.h"

#define FT_CHECK(op, cond, ...) STD_TORCH_CHECK(cond, "fasttricks::", op, ": ", __VA_ARGS__)

namespace fasttricks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string s = "(";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + (t.dim() == 1 ? ",)" : ")");
}

// As Python prints it: cpu, cuda:0, meta.
inline std::string device_of(const Tensor& t) {
  const auto device = t.device();
  switch (device.type()) {
    case torch::headeronly::DeviceType::CPU:
      return "cpu";
    case torch::headeronly::DeviceType::CUDA:
      return "cuda:" + std::to_string(device.index());
    case torch::headeronly::DeviceType::Meta:
      return "meta";
    default:
      return "another device";
  }
}

inline const char* name_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline bool is_floating(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half || t == ScalarType::BFloat16;
}

// The type in which values of type t are accumulated.
inline ScalarType accumulate_type(ScalarType t) {
  return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Of a floating type.
inline ElementType element_type(ScalarType t) {
  return t == ScalarType::Half       ? ElementType::kHalf
         : t == ScalarType::BFloat16 ? ElementType::kBFloat16
         : t == ScalarType::Double   ? ElementType::kDouble
                                     : ElementType::kFloat;
}

template <typename F>
void with_type(ScalarType type, F f) {
  with_type(element_type(type), f);
}

inline void check_floating(const char* op, const char* arg, const Tensor& t) {
  FT_CHECK(op, is_floating(t.scalar_type()), arg, " has dtype ", name_of(t.scalar_type()),
           "; accepted: float16, bfloat16, float32, float64");
}

inline void check_dtype(const char* op, const char* arg, const Tensor& t, ScalarType want) {
  FT_CHECK(op, t.scalar_type() == want, arg, " has dtype ", name_of(t.scalar_type()), "; accepted: ", name_of(want));
}

inline void check_same_device(const char* op, const char* arg, const Tensor& t, const Tensor& other,
                              const char* whose = "x") {
  FT_CHECK(op, t.device() == other.device(), arg, " is on ", device_of(t), "; accepted: the device of ", whose, ", ",
           device_of(other));
}

// Whether several elements share memory, so that none may be written; torch's in-place operations refuse the same.
inline bool is_expanded(const Tensor& t) {
  if (t.is_contiguous()) return false;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) > 1 && t.stride(d) == 0) return true;
  return false;
}
inline constexpr const char* kExpanded =
    " is expanded: its elements share memory; accepted: a tensor that can be written";

}  // namespace fasttricks

// From a dtype to its C++ type, for host and device.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "math/common.h"

namespace fasttricks {

// f(T()) with the C++ type of a dtype.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <typename F>
FT_HD void with_type(ElementType type, F f) {
  switch (type) {
    case ElementType::kHalf:
      return f(torch::headeronly::Half());
    case ElementType::kBFloat16:
      return f(torch::headeronly::BFloat16());
    case ElementType::kFloat:
      return f(float());
    case ElementType::kDouble:
      return f(double());
  }
}

}  // namespace fasttricks

// The arguments of sgd_check and sgd_step on any device: what is checked, and which tensors belong together.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"

namespace fasttricks {

using MaybeTensor = std::optional<Tensor>;
constexpr int kSgdMaxDims = 64;

inline bool is_half(ScalarType t) { return t == ScalarType::Half || t == ScalarType::BFloat16; }

// ---- geometry of one tensor ----

// Sizes and strides are fetched once for a tensor: every question to it is a call across the library's boundary.
inline bool sgd_same_sizes(const Tensor& a, const Tensor& b) {
  const auto left = a.sizes(), right = b.sizes();
  return left.size() == right.size() && std::equal(left.begin(), left.end(), right.begin());
}

// Of tensors of the same sizes.
inline bool sgd_same_strides(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), left = a.strides(), right = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && left[d] != right[d]) return false;
  return true;
}

// Whether the elements lie one after another in some order of the dimensions.
inline bool sgd_dense(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int order[kSgdMaxDims];
  int n = 0;
  for (int d = 0; d < int(sizes.size()); ++d) {
    if (sizes[d] == 1) continue;
    int j = n++;
    for (; j > 0 && strides[order[j - 1]] > strides[d]; --j) order[j] = order[j - 1];
    order[j] = d;
  }
  int64_t expected = 1;
  for (int j = 0; j < n; ++j) {
    if (strides[order[j]] != expected) return false;
    expected *= sizes[order[j]];
  }
  return true;
}

// ---- checks ----

// Returns the dtype. All tensors must be on the device of `first`.
inline ScalarType sgd_check_tensor(const char* op, const char* arg, size_t i, const Tensor& t, const Tensor& first) {
  const ScalarType type = t.scalar_type();
  FT_CHECK(op, is_floating(type), arg, "[", i, "] has dtype ", name_of(type),
           "; accepted: float16, bfloat16, float32, float64");
  FT_CHECK(op, &t == &first || t.device() == first.device(), arg, "[", i, "] is on ", device_of(t),
           "; accepted: the device of the first tensor, ", device_of(first));
  FT_CHECK(op, t.dim() <= kSgdMaxDims, arg, "[", i, "] has ", t.dim(), " dimensions; accepted: at most ", kSgdMaxDims);
  return type;
}

inline void sgd_check_beside(const char* op, const char* arg, size_t i, const Tensor& t, const Tensor& param,
                             ScalarType want) {
  const ScalarType type = sgd_check_tensor(op, arg, i, t, param);
  FT_CHECK(op, type == want, arg, "[", i, "] has dtype ", name_of(type), "; accepted: ", name_of(want));
  FT_CHECK(op, sgd_same_sizes(t, param), arg, "[", i, "] has shape ", shape_of(t), "; accepted: ", shape_of(param),
           ", the parameter's");
}

inline void sgd_check_number(const char* op, const char* arg, double value, double least) {
  FT_CHECK(op, std::isfinite(value) && value >= least, arg, " is ", value, "; accepted: a finite number",
           least == 0.0 ? " >= 0" : "");
}

inline void sgd_check_count(const char* op, const char* arg, size_t count, size_t want) {
  FT_CHECK(op, count == want, arg, " has ", count, " tensors; accepted: ", want, ", one for each that needs one");
}

// lr: fp32 or fp64; the others fp32.
inline void sgd_check_scalar(const char* op, const char* arg, const Tensor& t, const Tensor& first) {
  FT_CHECK(op, t.numel() == 1, arg, " has shape ", shape_of(t), "; accepted: one element");
  if (t.scalar_type() != ScalarType::Double) check_dtype(op, arg, t, ScalarType::Float);
  check_same_device(op, arg, t, first, "the first tensor");
}

// Squared norms: float64, one for each of `count` tensors. A step also accepts more of them: the norms of tensors on
// other devices.
inline void sgd_check_squares(const char* op, const char* arg, const MaybeTensor& t, size_t count, bool exactly,
                              const Tensor& first) {
  if (!t.has_value()) return;
  check_dtype(op, arg, *t, ScalarType::Double);
  const bool fits = exactly ? size_t(t->numel()) == count : size_t(t->numel()) >= count;
  FT_CHECK(op, t->dim() == 1 && fits && t->is_contiguous(), arg, " has shape ", shape_of(*t), "; accepted: (", count,
           ",)", exactly ? "" : " or longer", ", contiguous");
  check_same_device(op, arg, *t, first, "the first tensor");
}

// ---- the tensors of a call ----

// A tensor to check: a gradient, or a weight with its master (null unless the weight is fp16 or bf16).
struct SgdChecked {
  bool weight;
  size_t index;
  const Tensor& values;
  const Tensor* master;
};

// Calls use(SgdChecked) for the gradients and then, if norms of weights are requested, for the weights.
template <typename Use>
void for_checked(const std::vector<Tensor>& grads, const std::vector<Tensor>& params,
                 const std::vector<Tensor>& masters, const Tensor& found_inf, const MaybeTensor& grad_sq,
                 const MaybeTensor& weight_sq, Use use) {
  const char* op = "sgd_check";
  check_dtype(op, "found_inf", found_inf, ScalarType::Float);
  FT_CHECK(op, found_inf.numel() == 1, "found_inf has shape ", shape_of(found_inf), "; accepted: one element");
  sgd_check_squares(op, "grad_sq", grad_sq, grads.size(), true, found_inf);
  sgd_check_squares(op, "weight_sq", weight_sq, params.size(), true, found_inf);
  for (size_t i = 0; i < grads.size(); ++i) {
    sgd_check_tensor(op, "grads", i, grads[i], found_inf);
    use(SgdChecked{false, i, grads[i], nullptr});
  }
  if (!weight_sq.has_value()) return;
  size_t next = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const ScalarType type = sgd_check_tensor(op, "params", i, params[i], found_inf);
    const Tensor* master = nullptr;
    if (is_half(type)) {
      FT_CHECK(op, next < masters.size(), "masters has ", masters.size(),
               " tensors; accepted: one for each half parameter");
      master = &masters[next];
      sgd_check_beside(op, "masters", next++, *master, params[i], ScalarType::Float);
    }
    use(SgdChecked{true, i, params[i], master});
  }
  sgd_check_count(op, "masters", masters.size(), next);
}

// A tensor to step. Half parameters have a master; parameters of groups with momentum have a buffer and steps.
struct SgdStepped {
  size_t index, group;
  Tensor &param, &grad;
  Tensor *master, *buffer, *steps;
};

// The arguments of sgd_step, checked.
struct SgdStepCall {
  std::vector<Tensor>&params, &grads, &buffers, &steps, &masters;
  const std::vector<int64_t>& group_sizes;
  const std::vector<Tensor>& lr;
  const std::vector<double>&momentum, &dampening, &weight_decay;
  const std::vector<bool>&nesterov, &maximize;
  const std::vector<double>& trust_coefficient;
  const MaybeTensor &grad_scale, &found_inf, &grad_sq, &weight_sq;
  double max_norm, eps;

  static constexpr const char* op = "sgd_step";

  // Checks everything and calls use(SgdStepped) for the tensors in order. `use` must not modify a tensor: a later check
  // may still fail.
  template <typename Use>
  void for_stepped(Use use) const {
    const size_t groups = group_sizes.size();
    sgd_check_count(op, "grads", grads.size(), params.size());
    for (const auto& [arg, count] : {std::pair<const char*, size_t>{"lr", lr.size()},
                                     {"momentum", momentum.size()},
                                     {"dampening", dampening.size()},
                                     {"weight_decay", weight_decay.size()},
                                     {"nesterov", nesterov.size()},
                                     {"maximize", maximize.size()},
                                     {"trust_coefficient", trust_coefficient.size()}})
      FT_CHECK(op, count == groups, arg, " has ", count, " values; accepted: ", groups,
               ", one for each of group_sizes");
    int64_t sized = 0;
    for (int64_t size : group_sizes) {
      FT_CHECK(op, size >= 0, "group_sizes has ", size, "; accepted: at least 0");
      sized += size;
    }
    for (const auto& [arg, values, least] :
         {std::tuple<const char*, const std::vector<double>*, double>{"momentum", &momentum, 0.0},
          {"dampening", &dampening, -INFINITY},
          {"weight_decay", &weight_decay, 0.0},
          {"trust_coefficient", &trust_coefficient, 0.0}})
      for (double value : *values) sgd_check_number(op, arg, value, least);
    sgd_check_number(op, "eps", eps, 0.0);
    sgd_check_number(op, "max_norm", max_norm, 0.0);
    FT_CHECK(op, size_t(sized) == params.size(), "group_sizes add up to ", sized, "; accepted: ", params.size(),
             ", the number of params");
    if (params.empty()) return;
    for (const auto& [arg, t] : {std::pair{"grad_scale", &grad_scale}, {"found_inf", &found_inf}}) {
      if (!t->has_value()) continue;
      check_dtype(op, arg, **t, ScalarType::Float);
      sgd_check_scalar(op, arg, **t, params[0]);
    }
    sgd_check_squares(op, "grad_sq", grad_sq, params.size(), false, params[0]);
    sgd_check_squares(op, "weight_sq", weight_sq, params.size(), false, params[0]);
    FT_CHECK(op, max_norm <= 0 || grad_sq.has_value(), "grad_sq is None; accepted with max_norm: what sgd_check wrote");

    size_t i = 0, next_master = 0, next_buffer = 0;
    for (size_t g = 0; g < groups; ++g) {
      sgd_check_scalar(op, "lr", lr[g], params[0]);
      FT_CHECK(op, trust_coefficient[g] <= 0 || (grad_sq.has_value() && weight_sq.has_value()),
               "grad_sq or weight_sq is None; accepted with trust_coefficient: what sgd_check wrote");
      for (int64_t j = 0; j < group_sizes[g]; ++j, ++i) {
        const ScalarType type = sgd_check_tensor(op, "params", i, params[i], params[0]);
        sgd_check_tensor(op, "grads", i, grads[i], params[0]);
        FT_CHECK(op, sgd_same_sizes(params[i], grads[i]), "grads[", i, "] has shape ", shape_of(grads[i]),
                 "; accepted: ", shape_of(params[i]), ", the parameter's");
        FT_CHECK(op, !is_expanded(params[i]), "params[", i, "]", kExpanded);
        const ScalarType computed = accumulate_type(type);
        const auto beside = [&](const char* arg, std::vector<Tensor>& list, size_t& next) {
          FT_CHECK(op, next < list.size(), arg, " has ", list.size(),
                   " tensors; accepted: one for each parameter that needs one");
          sgd_check_beside(op, arg, next, list[next], params[i], computed);
          FT_CHECK(op, !is_expanded(list[next]), arg, "[", next, "]", kExpanded);
          return &list[next++];
        };
        SgdStepped t{i, g, params[i], grads[i], nullptr, nullptr, nullptr};
        if (is_half(type)) t.master = beside("masters", masters, next_master);
        if (momentum[g] != 0.0) {
          const size_t at = next_buffer;
          t.buffer = beside("momentum_buffers", buffers, next_buffer);
          FT_CHECK(op, at < steps.size(), "steps has ", steps.size(),
                   " tensors; accepted: one for each momentum buffer");
          t.steps = &steps[at];
          FT_CHECK(op, t.steps->numel() == 1, "steps[", at, "] has shape ", shape_of(*t.steps),
                   "; accepted: one element");
          FT_CHECK(op, t.steps->scalar_type() == ScalarType::Float, "steps[", at, "] has dtype ",
                   name_of(t.steps->scalar_type()), "; accepted: float32");
          sgd_check_tensor(op, "steps", at, *t.steps, params[0]);
        }
        use(t);
      }
    }
    sgd_check_count(op, "masters", masters.size(), next_master);
    sgd_check_count(op, "momentum_buffers", buffers.size(), next_buffer);
    sgd_check_count(op, "steps", steps.size(), next_buffer);
  }

  // Whether two parameters share memory (a parameter given twice, views of one tensor). Such parameters must be stepped
  // one after another.
  bool share_memory() const {
    std::vector<std::pair<const char*, const char*>> spans;
    spans.reserve(params.size());
    for (const Tensor& t : params) {
      if (t.numel() == 0) continue;
      const auto sizes = t.sizes(), strides = t.strides();
      int64_t last = 0;
      for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
      const char* data = static_cast<const char*>(t.const_data_ptr());
      spans.emplace_back(data, data + (last + 1) * int64_t(t.element_size()));
    }
    std::sort(spans.begin(), spans.end());
    for (size_t i = 1; i < spans.size(); ++i)
      if (spans[i].first < spans[i - 1].second) return true;
    return false;
  }
};

}  // namespace fasttricks

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

// ---- one tensor ----

// A tensor and what is asked of it. Every question to a tensor is a call across the library's boundary, and there are
// hundreds of tensors.
struct SgdArgument {
  const Tensor* tensor = nullptr;  // null: there is none
  ScalarType type = ScalarType::Float;
  const int64_t *sizes = nullptr, *strides = nullptr;  // borrowed from the tensor
  size_t dims = 0;

  SgdArgument() = default;
  explicit SgdArgument(const Tensor& t) : tensor(&t), type(t.scalar_type()), strides(t.strides().data()) {
    const auto all = t.sizes();
    sizes = all.data();
    dims = all.size();
  }

  explicit operator bool() const { return tensor != nullptr; }
  ElementType element() const { return element_type(type); }

  int64_t numel() const {
    int64_t n = 1;
    for (size_t d = 0; d < dims; ++d) n *= sizes[d];
    return n;
  }

  // From the first element to the end of the last one in memory; 0 if there is none.
  int64_t bytes() const {
    int64_t last = 0;
    for (size_t d = 0; d < dims; ++d) last += (sizes[d] - 1) * strides[d];
    return numel() ? (last + 1) * size_of(element()) : 0;
  }

  bool same_sizes(const SgdArgument& other) const {
    return dims == other.dims && std::equal(sizes, sizes + dims, other.sizes);
  }

  // Of a tensor of the same sizes.
  bool same_strides(const SgdArgument& other) const {
    for (size_t d = 0; d < dims; ++d)
      if (sizes[d] > 1 && strides[d] != other.strides[d]) return false;
    return true;
  }

  // Whether several elements share memory.
  bool expanded() const {
    bool any = false;
    for (size_t d = 0; d < dims; ++d) any = any || (sizes[d] > 1 && strides[d] == 0);
    return any && numel() > 0;
  }

  // Whether the elements lie one after another in some order of the dimensions.
  bool dense() const {
    int order[kSgdMaxDims];
    int n = 0;
    for (int d = 0; d < int(dims); ++d) {
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
};

// ---- checks ----

// Checks one tensor after another: of which dtype, on the device of the call's first tensor.
struct SgdCheck {
  const char* op;
  const Tensor& first;
  torch::stable::Device device = first.device();

  SgdArgument operator()(const char* arg, size_t i, const Tensor& t) const {
    const SgdArgument seen(t);
    FT_CHECK(op, is_floating(seen.type), arg, "[", i, "] has dtype ", name_of(seen.type),
             "; accepted: float16, bfloat16, float32, float64");
    FT_CHECK(op, t.device() == device, arg, "[", i, "] is on ", device_of(t),
             "; accepted: the device of the first tensor, ", device_of(first));
    FT_CHECK(op, seen.dims <= kSgdMaxDims, arg, "[", i, "] has ", seen.dims, " dimensions; accepted: at most ",
             kSgdMaxDims);
    return seen;
  }

  SgdArgument beside(const char* arg, size_t i, const Tensor& t, const SgdArgument& param, ScalarType want) const {
    const SgdArgument seen = (*this)(arg, i, t);
    FT_CHECK(op, seen.type == want, arg, "[", i, "] has dtype ", name_of(seen.type), "; accepted: ", name_of(want));
    FT_CHECK(op, seen.same_sizes(param), arg, "[", i, "] has shape ", shape_of(t),
             "; accepted: ", shape_of(*param.tensor), ", the parameter's");
    return seen;
  }

  void written(const char* arg, size_t i, const SgdArgument& t) const {
    FT_CHECK(op, !t.expanded(), arg, "[", i, "]", kExpanded);
  }
};

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

// A tensor to check: a gradient, or a weight with its master if it is fp16 or bf16.
struct SgdChecked {
  bool weight;
  size_t index;
  SgdArgument values, master;
};

// Calls use(SgdChecked) for the gradients and then, if norms of weights are requested, for the weights.
template <typename Use>
void for_checked(const std::vector<Tensor>& grads, const std::vector<Tensor>& params,
                 const std::vector<Tensor>& masters, const Tensor& found_inf, const MaybeTensor& grad_sq,
                 const MaybeTensor& weight_sq, Use use) {
  const SgdCheck check{"sgd_check", found_inf};
  const char* op = check.op;
  check_dtype(op, "found_inf", found_inf, ScalarType::Float);
  FT_CHECK(op, found_inf.numel() == 1, "found_inf has shape ", shape_of(found_inf), "; accepted: one element");
  sgd_check_squares(op, "grad_sq", grad_sq, grads.size(), true, found_inf);
  sgd_check_squares(op, "weight_sq", weight_sq, params.size(), true, found_inf);
  for (size_t i = 0; i < grads.size(); ++i) use(SgdChecked{false, i, check("grads", i, grads[i]), {}});
  if (!weight_sq.has_value()) return;
  size_t next = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    SgdChecked weight{true, i, check("params", i, params[i]), {}};
    if (is_half(weight.values.type)) {
      FT_CHECK(op, next < masters.size(), "masters has ", masters.size(),
               " tensors; accepted: one for each half parameter");
      weight.master = check.beside("masters", next, masters[next], weight.values, ScalarType::Float);
      ++next;
    }
    use(weight);
  }
  sgd_check_count(op, "masters", masters.size(), next);
}

// A tensor to step. Half parameters have a master; parameters of groups with momentum have a buffer and steps.
struct SgdStepped {
  size_t index, group;
  SgdArgument param, grad, master, buffer, steps;
};

// The arguments of sgd_step, checked.
struct SgdStepCall {
  const std::vector<Tensor>&params, &grads, &buffers, &steps, &masters;
  const std::vector<int64_t>& group_sizes;
  const std::vector<Tensor>& lr;
  const std::vector<double>&momentum, &dampening, &weight_decay;
  const std::vector<bool>&nesterov, &maximize;
  const std::vector<double>& trust_coefficient;
  const MaybeTensor &grad_scale, &found_inf, &grad_sq, &weight_sq;
  double max_norm, eps;

  static constexpr const char* op = "sgd_step";

  // Checks everything and calls use(SgdStepped) for the tensors in order. `use` must not modify a tensor: a later check
  // may still fail. Returns whether two parameters share memory (a parameter given twice, views of one tensor). Such
  // parameters must be stepped one after another.
  template <typename Use>
  bool for_stepped(Use use) const {
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
    if (params.empty()) return false;
    for (const auto& [arg, t] : {std::pair{"grad_scale", &grad_scale}, {"found_inf", &found_inf}}) {
      if (!t->has_value()) continue;
      check_dtype(op, arg, **t, ScalarType::Float);
      sgd_check_scalar(op, arg, **t, params[0]);
    }
    sgd_check_squares(op, "grad_sq", grad_sq, params.size(), false, params[0]);
    sgd_check_squares(op, "weight_sq", weight_sq, params.size(), false, params[0]);
    FT_CHECK(op, max_norm <= 0 || grad_sq.has_value(), "grad_sq is None; accepted with max_norm: what sgd_check wrote");

    const SgdCheck check{op, params[0]};
    std::vector<std::pair<const char*, const char*>> spans;
    spans.reserve(params.size());
    size_t i = 0, next_master = 0, next_buffer = 0;
    for (size_t g = 0; g < groups; ++g) {
      sgd_check_scalar(op, "lr", lr[g], params[0]);
      FT_CHECK(op, trust_coefficient[g] <= 0 || (grad_sq.has_value() && weight_sq.has_value()),
               "grad_sq or weight_sq is None; accepted with trust_coefficient: what sgd_check wrote");
      for (int64_t j = 0; j < group_sizes[g]; ++j, ++i) {
        SgdStepped t{i, g, check("params", i, params[i]), check("grads", i, grads[i]), {}, {}, {}};
        FT_CHECK(op, t.param.same_sizes(t.grad), "grads[", i, "] has shape ", shape_of(grads[i]),
                 "; accepted: ", shape_of(params[i]), ", the parameter's");
        check.written("params", i, t.param);
        const ScalarType computed = accumulate_type(t.param.type);
        const auto beside = [&](const char* arg, const std::vector<Tensor>& list, size_t next) {
          FT_CHECK(op, next < list.size(), arg, " has ", list.size(),
                   " tensors; accepted: one for each parameter that needs one");
          const SgdArgument seen = check.beside(arg, next, list[next], t.param, computed);
          check.written(arg, next, seen);
          return seen;
        };
        if (is_half(t.param.type)) t.master = beside("masters", masters, next_master++);
        if (momentum[g] != 0.0) {
          const size_t at = next_buffer++;
          t.buffer = beside("momentum_buffers", buffers, at);
          FT_CHECK(op, at < steps.size(), "steps has ", steps.size(),
                   " tensors; accepted: one for each momentum buffer");
          t.steps = check("steps", at, steps[at]);
          FT_CHECK(op, t.steps.numel() == 1, "steps[", at, "] has shape ", shape_of(steps[at]),
                   "; accepted: one element");
          FT_CHECK(op, t.steps.type == ScalarType::Float, "steps[", at, "] has dtype ", name_of(t.steps.type),
                   "; accepted: float32");
        }
        if (const int64_t bytes = t.param.bytes()) {
          const char* data = static_cast<const char*>(params[i].const_data_ptr());
          spans.emplace_back(data, data + bytes);
        }
        use(t);
      }
    }
    sgd_check_count(op, "masters", masters.size(), next_master);
    sgd_check_count(op, "momentum_buffers", buffers.size(), next_buffer);
    sgd_check_count(op, "steps", steps.size(), next_buffer);
    std::sort(spans.begin(), spans.end());
    for (size_t k = 1; k < spans.size(); ++k)
      if (spans[k].first < spans[k - 1].second) return true;
    return false;
  }
};

}  // namespace fasttricks

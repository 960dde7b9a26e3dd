// sgd_check and sgd_step on CUDA tensors: checks, strided tensors and registration; sgd_run.cuh launches.
#include <vector>

#include "host.h"
#include "sgd_call.h"
#include "sgd_run.cuh"

namespace fasttricks::cuda::ops {
namespace {

void check_how_many(const char* op, size_t tensors) {
  FT_CHECK(op, int64_t(tensors) <= kSgdMaxTensors, tensors, " tensors are given; accepted: at most ", kSgdMaxTensors,
           " in one call");
}

// Contiguous copies of strided tensors, and where to copy them back to.
class Packed {
 public:
  void* read(const SgdArgument& t, bool as_it_is) {
    if (as_it_is || !t) return t ? const_cast<void*>(t.tensor->const_data_ptr()) : nullptr;
    copies_.push_back(torch::stable::contiguous(*t.tensor));
    return const_cast<void*>(copies_.back().const_data_ptr());
  }
  void* write(const SgdArgument& t, bool as_it_is) {
    if (as_it_is || !t || t.tensor->is_contiguous()) return t ? t.tensor->mutable_data_ptr() : nullptr;
    copies_.push_back(torch::stable::contiguous(*t.tensor));
    targets_.emplace_back(*t.tensor, copies_.back());
    return copies_.back().mutable_data_ptr();
  }
  void copy_back() {
    for (auto& [target, copy] : targets_) torch::stable::copy_(target, copy);
  }

 private:
  std::vector<Tensor> copies_;
  std::vector<std::pair<Tensor, Tensor>> targets_;
};

template <typename T>
T* data_of(const MaybeTensor& t) {
  return t.has_value() ? static_cast<T*>(const_cast<void*>(t->const_data_ptr())) : nullptr;
}

void sgd_check(const std::vector<Tensor>& grads, const std::vector<Tensor>& params, const std::vector<Tensor>& masters,
               const Tensor& found_inf, const MaybeTensor& grad_sq, const MaybeTensor& weight_sq) {
  Packed packed;
  std::vector<SgdItem> items;
  check_how_many("sgd_check", grads.size() + params.size());
  for_checked(grads, params, masters, found_inf, grad_sq, weight_sq, [&](const SgdChecked& t) {
    const bool as_it_is = t.values.dense() && (!t.master || t.values.same_strides(t.master));
    void* const values = packed.read(t.values, as_it_is);
    void* const master = packed.read(t.master, as_it_is);
    const ElementType type = t.values.element();
    if (t.weight)
      items.push_back({int64_t(t.index), t.values.numel(), 1, {nullptr, values, master}, type, ElementType::kFloat});
    else
      items.push_back({int64_t(t.index), t.values.numel(), 0, {values}, ElementType::kFloat, type});
  });
  if (items.empty()) return;
  OnDevice on(found_inf);
  SgdHeader header{};
  header.found_inf = static_cast<float*>(found_inf.mutable_data_ptr());
  header.grad_sq = data_of<double>(grad_sq);
  header.weight_sq = data_of<double>(weight_sq);
  if (!header.grad_sq && !header.weight_sq) return sgd_check_run(items, header, nullptr, on.stream);
  Tensor partial = torch::stable::new_empty(found_inf, {sgd_check_blocks(items)}, ScalarType::Double);
  sgd_check_run(items, header, static_cast<double*>(partial.mutable_data_ptr()), on.stream);
}

SgdItem item_of(const SgdStepped& t, Packed& packed) {
  bool as_it_is = t.param.dense();
  for (const SgdArgument* beside : {&t.grad, &t.master, &t.buffer})
    as_it_is = as_it_is && (!*beside || t.param.same_strides(*beside));
  SgdItem item{int64_t(t.index), t.param.numel(), int(t.group), {}, t.param.element(), t.grad.element()};
  item.pointers[kSgdGrad] = packed.read(t.grad, as_it_is);
  item.pointers[kSgdParam] = packed.write(t.param, as_it_is);
  item.pointers[kSgdMaster] = packed.write(t.master, as_it_is);
  item.pointers[kSgdBuffer] = packed.write(t.buffer, as_it_is);
  item.pointers[kSgdSteps] = packed.write(t.steps, true);
  return item;
}

void sgd_step(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
              const std::vector<Tensor>& momentum_buffers, const std::vector<Tensor>& steps,
              const std::vector<Tensor>& masters, const std::vector<int64_t>& group_sizes,
              const std::vector<Tensor>& lr, const std::vector<double>& momentum, const std::vector<double>& dampening,
              const std::vector<double>& weight_decay, const std::vector<bool>& nesterov,
              const std::vector<bool>& maximize, const std::vector<double>& trust_coefficient, double eps,
              bool lr_in_momentum, double max_norm, const MaybeTensor& grad_scale, const MaybeTensor& found_inf,
              const MaybeTensor& grad_sq, const MaybeTensor& weight_sq) {
  const SgdStepCall call{params,    grads,     momentum_buffers, steps,    masters,  group_sizes,       lr,
                         momentum,  dampening, weight_decay,     nesterov, maximize, trust_coefficient, grad_scale,
                         found_inf, grad_sq,   weight_sq,        max_norm, eps};
  check_how_many("sgd_step", params.size());
  std::vector<SgdStepped> all;
  all.reserve(params.size());
  const bool share_memory = call.for_stepped([&](const SgdStepped& t) { all.push_back(t); });
  if (all.empty()) return;
  std::vector<SgdGroup> groups(group_sizes.size());
  for (size_t g = 0; g < groups.size(); ++g) {
    const bool is_double = lr[g].scalar_type() == ScalarType::Double;
    groups[g] = {lr[g].const_data_ptr(), momentum[g], 1.0 - dampening[g], weight_decay[g], trust_coefficient[g]};
    groups[g].flags = uint16_t((nesterov[g] ? kSgdNesterov : 0) | (maximize[g] ? kSgdMaximize : 0) |
                               (is_double ? kSgdLrIsDouble : 0));
  }
  OnDevice on(params[0]);
  SgdHeader header{data_of<float>(grad_scale),
                   data_of<float>(found_inf),
                   data_of<double>(grad_sq),
                   data_of<double>(weight_sq),
                   max_norm,
                   eps};
  header.norms = grad_sq.has_value() ? int32_t(grad_sq->numel()) : 0;
  header.flags = lr_in_momentum ? kSgdLrInMomentum : 0;
  if (!share_memory) {
    Packed packed;
    std::vector<SgdItem> items;
    for (const SgdStepped& t : all) items.push_back(item_of(t, packed));
    sgd_step_run(items, groups, header, true, on.stream);
    return packed.copy_back();
  }
  // tensors that share memory are stepped one after another, all with the step counts from before the call
  for (const SgdStepped& t : all) {
    Packed packed;
    sgd_step_run({item_of(t, packed)}, groups, header, false, on.stream);
    packed.copy_back();
  }
  for (const SgdStepped& t : all)
    if (t.steps) sgd_count_run(static_cast<float*>(t.steps.tensor->mutable_data_ptr()), header.found_inf, on.stream);
}

}  // namespace
}  // namespace fasttricks::cuda::ops

#if !defined(CUDA_ON_CPU)
namespace fasttricks::cuda {
const void* sgd_step_kernel() { return reinterpret_cast<const void*>(&sgd_step); }
}  // namespace fasttricks::cuda
#endif

FT_CUDA_LIBRARY(m) {
  using namespace fasttricks::cuda::ops;
  m.impl("sgd_check", TORCH_BOX(&sgd_check));
  m.impl("sgd_step", TORCH_BOX(&sgd_step));
}

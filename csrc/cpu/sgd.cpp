// sgd_check, sgd_step: checks, the plan of chunks, and the gather and scatter of strided tensors.
#include "sgd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "../checks.h"

namespace fasttricks::cpu {
namespace {

constexpr int64_t kChunk = 16384;      // elements: the unit of work, and of the sums of squares
constexpr int64_t kPerThread = 65536;  // elements below which another thread costs more than it brings
constexpr int64_t kGathered = 512;     // elements of a strided tensor that are copied together at a time
constexpr int kMaxDims = 64;

SgdType type_of(const char* op, const char* arg, const Tensor& t) {
  check_floating(op, arg, t);
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return SgdType::half;
    case ScalarType::BFloat16:
      return SgdType::bfloat16;
    case ScalarType::Float:
      return SgdType::single;
    default:
      return SgdType::twofold;
  }
}

bool is_half(SgdType t) { return t == SgdType::half || t == SgdType::bfloat16; }
int64_t bytes_of(SgdType t) { return is_half(t) ? 2 : t == SgdType::single ? 4 : 8; }

// A tensor's memory: base, element size, and strides that are borrowed from the tensor.
struct Operand {
  char* data = nullptr;
  int64_t item = 0;
  const int64_t* strides = nullptr;
};

Operand operand(const Tensor& t, int64_t item, bool write) {
  return {static_cast<char*>(write ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr())), item,
          t.strides().data()};
}

struct Geometry {
  const int64_t* sizes = nullptr;
  int64_t dims = 0, numel = 0;
};

Geometry geometry(const Tensor& t) { return {t.sizes().data(), t.dim(), t.numel()}; }

bool same_sizes(const Geometry& g, const Tensor& t) {
  return t.dim() == g.dims && std::equal(g.sizes, g.sizes + g.dims, t.sizes().data());
}

// Whether the elements lie one after another in some order of the dimensions.
bool dense(const Geometry& g, const int64_t* strides) {
  int order[kMaxDims];
  int n = 0;
  for (int64_t d = 0; d < g.dims; ++d) {
    if (g.sizes[d] == 1) continue;
    int j = n++;
    for (; j > 0 && strides[order[j - 1]] > strides[d]; --j) order[j] = order[j - 1];
    order[j] = int(d);
  }
  int64_t expected = 1;
  for (int j = 0; j < n; ++j) {
    if (strides[order[j]] != expected) return false;
    expected *= g.sizes[order[j]];
  }
  return true;
}

bool same_strides(const Geometry& g, const int64_t* a, const int64_t* b) {
  for (int64_t d = 0; d < g.dims; ++d)
    if (g.sizes[d] > 1 && a[d] != b[d]) return false;
  return true;
}

void check_no_overlap(const char* op, const char* arg, size_t i, const Geometry& g, const Operand& o) {
  for (int64_t d = 0; d < g.dims; ++d)
    FT_CHECK(op, g.sizes[d] <= 1 || o.strides[d] != 0 || g.numel == 0, arg, "[", i,
             "] is an expanded tensor: several of its elements are one place in memory, which cannot be written");
}

// Copies elements [begin, begin + count), counted in the order of the dimensions, into or out of `packed`.
void move_strided(const Geometry& g, const Operand& o, int64_t begin, int64_t count, char* packed, bool gather) {
  int64_t index[kMaxDims], offset = 0, rest = begin;
  for (int64_t d = g.dims - 1; d >= 0; --d) {
    index[d] = rest % g.sizes[d];
    rest /= g.sizes[d];
    offset += index[d] * o.strides[d];
  }
  for (int64_t i = 0; i < count; ++i) {
    char* const there = o.data + offset * o.item;
    char* const here = packed + i * o.item;
    if (o.item == 2)
      std::memcpy(gather ? here : there, gather ? there : here, 2);
    else if (o.item == 4)
      std::memcpy(gather ? here : there, gather ? there : here, 4);
    else
      std::memcpy(gather ? here : there, gather ? there : here, 8);
    for (int64_t d = g.dims - 1; d >= 0; --d) {
      offset += o.strides[d];
      if (++index[d] < g.sizes[d]) break;
      offset -= o.strides[d] * g.sizes[d];
      index[d] = 0;
    }
  }
}

struct Chunk {
  int32_t tensor;
  int64_t begin, count;
};

// Chunks of at most kChunk elements. Their bounds depend on the sizes only, so that sums do not depend on the threads.
std::vector<Chunk> chunks_of(const std::vector<int64_t>& numels, int64_t* total) {
  std::vector<Chunk> chunks;
  *total = 0;
  for (size_t i = 0; i < numels.size(); ++i) {
    for (int64_t begin = 0; begin < numels[i]; begin += kChunk)
      chunks.push_back({int32_t(i), begin, std::min(kChunk, numels[i] - begin)});
    *total += numels[i];
  }
  return chunks;
}

// Calls work(chunk index) for all chunks in ascending order (prefetchers count on it), on threads that get nearly equal
// numbers of elements.
template <class Work>
void for_chunks(const std::vector<Chunk>& chunks, int64_t total, const Work& work) {
  const int64_t count = int64_t(chunks.size());
  const int64_t parts =
      std::max<int64_t>(1, std::min<int64_t>({int64_t(torch::stable::get_num_threads()), total / kPerThread, count}));
  std::vector<int64_t> bounds{0};
  int64_t done = 0;
  for (int64_t c = 0; c < count; ++c) {
    done += chunks[c].count;
    if (int64_t(bounds.size()) < parts && done >= total * int64_t(bounds.size()) / parts) bounds.push_back(c + 1);
  }
  bounds.push_back(count);
  torch::stable::parallel_for(0, int64_t(bounds.size()) - 1, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part)
      for (int64_t i = bounds[part]; i < bounds[part + 1]; ++i) work(i);
  });
}

double read_scalar(const char* op, const char* arg, const Tensor& t) {
  FT_CHECK(op, t.numel() == 1, arg, " has shape ", shape_of(t), "; accepted: one element");
  if (t.scalar_type() == ScalarType::Double) return *static_cast<const double*>(t.const_data_ptr());
  check_dtype(op, arg, t, ScalarType::Float);
  return *static_cast<const float*>(t.const_data_ptr());
}

const double* read_squares(const char* op, const char* arg, const Tensor& t, size_t at_least) {
  check_dtype(op, arg, t, ScalarType::Double);
  FT_CHECK(op, t.dim() == 1 && size_t(t.numel()) >= at_least && t.is_contiguous(), arg, " has shape ", shape_of(t),
           "; accepted: (", at_least, ",), contiguous");
  return static_cast<const double*>(t.const_data_ptr());
}

void check_cpu(const char* op, const char* arg, size_t i, const Tensor& t) {
  FT_CHECK(op, t.is_cpu(), arg, "[", i, "] is not on the CPU, but other tensors are");
  FT_CHECK(op, t.dim() <= kMaxDims, arg, "[", i, "] has ", t.dim(), " dimensions; accepted: at most ", kMaxDims);
}

void check_count(const char* op, const char* arg, size_t count, size_t want) {
  FT_CHECK(op, count == want, arg, " has ", count, " tensors; accepted: ", want, ", one for each that needs one");
}

// ----------------------------------------------------------------------------------------------------------------
// check

struct Checked {
  Geometry shape;
  SgdType type = SgdType::single;
  Operand values, master;
  bool linear = true;
};

void sgd_check(std::vector<Tensor> grads, std::vector<Tensor> params, std::vector<Tensor> masters, Tensor found_inf,
               std::optional<Tensor> grad_sq, std::optional<Tensor> weight_sq) {
  const char* op = "sgd_check";
  const SgdKernels& kernels = FT_KERNELS(sgd_kernels);
  check_dtype(op, "found_inf", found_inf, ScalarType::Float);
  FT_CHECK(op, found_inf.numel() == 1, "found_inf has shape ", shape_of(found_inf), "; accepted: one element");

  const auto squares_of = [&](const char* arg, std::optional<Tensor>& t, size_t count) -> double* {
    if (!t.has_value()) return nullptr;
    read_squares(op, arg, *t, count);
    check_count(op, arg, size_t(t->numel()), count);
    return static_cast<double*>(t->mutable_data_ptr());
  };
  double* const grad_squares = squares_of("grad_sq", grad_sq, grads.size());
  double* const weight_squares = squares_of("weight_sq", weight_sq, params.size());

  // first the gradients, then (for LARS) the weights
  const size_t weights = weight_squares ? params.size() : 0;
  std::vector<Checked> all(grads.size() + weights);
  std::vector<int64_t> numels(all.size());
  size_t next_master = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    const bool weight = i >= grads.size();
    const char* arg = weight ? "params" : "grads";
    const size_t at = weight ? i - grads.size() : i;
    const Tensor& t = weight ? params[at] : grads[at];
    check_cpu(op, arg, at, t);
    Checked& c = all[i];
    c.type = type_of(op, arg, t);
    c.shape = geometry(t);
    c.values = operand(t, bytes_of(c.type), false);
    c.linear = dense(c.shape, c.values.strides);
    numels[i] = c.shape.numel;
    if (!weight || !is_half(c.type)) continue;
    FT_CHECK(op, next_master < masters.size(), "masters has ", masters.size(),
             " tensors; accepted: one for each half parameter");
    const Tensor& master = masters[next_master++];
    check_cpu(op, "masters", next_master - 1, master);
    check_dtype(op, "masters", master, ScalarType::Float);
    FT_CHECK(op, same_sizes(c.shape, master), "masters[", next_master - 1, "] has shape ", shape_of(master),
             "; accepted: ", shape_of(t), ", the parameter's");
    c.master = operand(master, 4, false);
    c.linear = c.linear && same_strides(c.shape, c.values.strides, c.master.strides);
  }
  if (weights) check_count(op, "masters", masters.size(), next_master);

  int64_t total = 0;
  const std::vector<Chunk> chunks = chunks_of(numels, &total);
  std::vector<double> sums(chunks.size());
  std::vector<uint8_t> bad(chunks.size());
  for_chunks(chunks, total, [&](int64_t i) {
    const Chunk& chunk = chunks[i];
    const Checked& c = all[chunk.tensor];
    const bool weight = size_t(chunk.tensor) >= grads.size();
    const auto run = [&](const char* values, const char* master, int64_t n) {
      double sum = 0.0;
      if (weight)
        sum = kernels.weight_square[int(c.type)](values, master, n);
      else if (kernels.check[int(c.type)](values, n, grad_squares ? &sum : nullptr))
        bad[i] = 1;
      sums[i] += sum;
    };
    if (c.linear) {
      run(c.values.data + chunk.begin * c.values.item, c.master.data + chunk.begin * c.master.item, chunk.count);
      return;
    }
    alignas(64) char values[kGathered * 8], master[kGathered * 4];
    for (int64_t done = 0; done < chunk.count; done += kGathered) {
      const int64_t n = std::min(kGathered, chunk.count - done);
      move_strided(c.shape, c.values, chunk.begin + done, n, values, true);
      if (c.master.data) move_strided(c.shape, c.master, chunk.begin + done, n, master, true);
      run(values, master, n);
    }
  });

  if (grad_squares) std::fill(grad_squares, grad_squares + grads.size(), 0.0);
  if (weight_squares) std::fill(weight_squares, weight_squares + params.size(), 0.0);
  bool any = false;
  for (size_t i = 0; i < chunks.size(); ++i) {
    const size_t tensor = size_t(chunks[i].tensor);
    if (tensor >= grads.size())
      weight_squares[tensor - grads.size()] += sums[i];
    else if (grad_squares)
      grad_squares[tensor] += sums[i];
    any = any || bad[i];
  }
  if (grad_squares)  // of fp64 gradients: a norm that is not finite cannot be clipped to
    any = any || !std::all_of(grad_squares, grad_squares + grads.size(), [](double s) { return std::isfinite(s); });
  if (any) *static_cast<float*>(found_inf.mutable_data_ptr()) = 1.0f;
}

// -----------------------------------------------------------------------------------------------------------------
// step

struct Stepped {
  Geometry shape;
  SgdType type = SgdType::single, grad_type = SgdType::single;
  Operand param, grad, master, buffer;
  SgdScalars scalars = {};
  bool linear = true;
};

void step_chunk(const SgdKernels& kernels, const Stepped& t, int64_t begin, int64_t count) {
  const SgdKernels::Step step = kernels.step[int(t.type)][int(t.grad_type)];
  const auto at = [&](const Operand& o) { return o.data ? o.data + begin * o.item : nullptr; };
  if (t.linear) {
    step(at(t.param), at(t.grad), at(t.master), at(t.buffer), count, t.scalars);
    return;
  }
  alignas(64) char param[kGathered * 8], grad[kGathered * 8], master[kGathered * 4], buffer[kGathered * 8];
  for (int64_t done = 0; done < count; done += kGathered) {
    const int64_t from = begin + done, n = std::min(kGathered, count - done);
    move_strided(t.shape, t.param, from, n, param, true);
    move_strided(t.shape, t.grad, from, n, grad, true);
    if (t.master.data) move_strided(t.shape, t.master, from, n, master, true);
    if (t.buffer.data) move_strided(t.shape, t.buffer, from, n, buffer, true);
    step(param, grad, t.master.data ? master : nullptr, t.buffer.data ? buffer : nullptr, n, t.scalars);
    move_strided(t.shape, t.param, from, n, param, false);
    if (t.master.data) move_strided(t.shape, t.master, from, n, master, false);
    if (t.buffer.data) move_strided(t.shape, t.buffer, from, n, buffer, false);
  }
}

// Whether two parameters share memory (a parameter given twice, views of one tensor): they must be stepped one by one.
bool share_memory(const std::vector<Stepped>& tensors) {
  std::vector<std::pair<const char*, const char*>> spans;
  spans.reserve(tensors.size());
  for (const Stepped& t : tensors) {
    if (t.shape.numel == 0) continue;
    int64_t last = 0;
    for (int64_t d = 0; d < t.shape.dims; ++d) last += (t.shape.sizes[d] - 1) * t.param.strides[d];
    spans.emplace_back(t.param.data, t.param.data + (last + 1) * t.param.item);
  }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i)
    if (spans[i].first < spans[i - 1].second) return true;
  return false;
}

void sgd_step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
              std::vector<Tensor> steps, std::vector<Tensor> masters, std::vector<int64_t> group_sizes,
              std::vector<Tensor> lr, std::vector<double> momentum, std::vector<double> dampening,
              std::vector<double> weight_decay, std::vector<bool> nesterov, std::vector<bool> maximize,
              std::vector<double> trust_coefficient, double eps, bool lr_in_momentum, double max_norm,
              std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<Tensor> grad_sq,
              std::optional<Tensor> weight_sq) {
  const char* op = "sgd_step";
  const size_t groups = group_sizes.size();
  check_count(op, "grads", grads.size(), params.size());
  for (const auto& [arg, count] : {std::pair<const char*, size_t>{"lr", lr.size()},
                                   {"momentum", momentum.size()},
                                   {"dampening", dampening.size()},
                                   {"weight_decay", weight_decay.size()},
                                   {"nesterov", nesterov.size()},
                                   {"maximize", maximize.size()},
                                   {"trust_coefficient", trust_coefficient.size()}})
    FT_CHECK(op, count == groups, arg, " has ", count, " values; accepted: ", groups, ", one for each of group_sizes");
  int64_t sized = 0;
  for (int64_t size : group_sizes) {
    FT_CHECK(op, size >= 0, "group_sizes has ", size, "; accepted: at least 0");
    sized += size;
  }
  FT_CHECK(op, size_t(sized) == params.size(), "group_sizes add up to ", sized, "; accepted: ", params.size(),
           ", the number of params");

  // what decides is read here, on the CPU; a kernel on another device reads it there
  const double inv_scale = grad_scale.has_value() ? 1.0 / read_scalar(op, "grad_scale", *grad_scale) : 1.0;
  const bool skip = found_inf.has_value() && read_scalar(op, "found_inf", *found_inf) != 0.0;
  const double* const grad_squares =
      grad_sq.has_value() ? read_squares(op, "grad_sq", *grad_sq, params.size()) : nullptr;
  const double* const weight_squares =
      weight_sq.has_value() ? read_squares(op, "weight_sq", *weight_sq, params.size()) : nullptr;
  double clip = 1.0;
  if (max_norm > 0.0) {
    FT_CHECK(op, grad_squares, "grad_sq is None; accepted with max_norm: what sgd_check wrote");
    double square = 0.0;
    for (int64_t i = 0; i < grad_sq->numel(); ++i) square += grad_squares[i];
    clip = sgd_clip(max_norm, std::sqrt(square) * inv_scale);
  }

  std::vector<Stepped> all(params.size());
  std::vector<int64_t> numels(params.size());
  std::vector<float*> counts;
  size_t i = 0, next_master = 0, next_buffer = 0;
  for (size_t g = 0; g < groups; ++g) {
    const double rate = read_scalar(op, "lr", lr[g]);
    for (int64_t j = 0; j < group_sizes[g]; ++j, ++i) {
      Stepped& t = all[i];
      check_cpu(op, "params", i, params[i]);
      check_cpu(op, "grads", i, grads[i]);
      t.type = type_of(op, "params", params[i]);
      t.grad_type = type_of(op, "grads", grads[i]);
      t.shape = geometry(params[i]);
      numels[i] = t.shape.numel;
      FT_CHECK(op, same_sizes(t.shape, grads[i]), "grads[", i, "] has shape ", shape_of(grads[i]),
               "; accepted: ", shape_of(params[i]), ", the parameter's");
      t.param = operand(params[i], bytes_of(t.type), true);
      t.grad = operand(grads[i], bytes_of(t.grad_type), false);
      check_no_overlap(op, "params", i, t.shape, t.param);
      t.linear = same_strides(t.shape, t.param.strides, t.grad.strides) && dense(t.shape, t.param.strides);
      const ScalarType computed = accumulate_type(params[i].scalar_type());
      const auto beside = [&](const char* arg, std::vector<Tensor>& list, size_t& next) {
        FT_CHECK(op, next < list.size(), arg, " has ", list.size(),
                 " tensors; accepted: one for each parameter that needs one");
        const Tensor& s = list[next];
        check_cpu(op, arg, next, s);
        check_dtype(op, arg, s, computed);
        FT_CHECK(op, same_sizes(t.shape, s), arg, "[", next, "] has shape ", shape_of(s),
                 "; accepted: ", shape_of(params[i]), ", the parameter's");
        const Operand o = operand(s, computed == ScalarType::Double ? 8 : 4, true);
        check_no_overlap(op, arg, next++, t.shape, o);
        t.linear = t.linear && same_strides(t.shape, t.param.strides, o.strides);
        return o;
      };
      if (is_half(t.type)) t.master = beside("masters", masters, next_master);

      SgdScalars& s = t.scalars;
      s.inv_scale = inv_scale;
      s.has_scale = grad_scale.has_value();
      s.clip = clip;
      s.has_clip = clip != 1.0;
      s.maximize = maximize[g];
      s.weight_decay = weight_decay[g];
      s.momentum = momentum[g];
      s.one_minus_dampening = 1.0 - dampening[g];
      s.lr = rate;
      s.nesterov = nesterov[g];
      s.has_momentum = momentum[g] != 0.0;
      s.lr_in_momentum = lr_in_momentum;
      s.has_multiplier = lr_in_momentum || trust_coefficient[g] > 0.0;
      s.multiplier = lr_in_momentum ? rate : 1.0;
      if (trust_coefficient[g] > 0.0) {
        FT_CHECK(op, grad_squares && weight_squares,
                 "grad_sq or weight_sq is None; accepted with trust_coefficient: what sgd_check wrote");
        s.multiplier *= lars_trust(trust_coefficient[g], std::sqrt(weight_squares[i]),
                                   std::sqrt(grad_squares[i]) * inv_scale * clip, s.weight_decay, eps);
      }
      if (s.has_momentum) {
        const size_t at = next_buffer;
        t.buffer = beside("momentum_buffers", momentum_buffers, next_buffer);
        FT_CHECK(op, at < steps.size(), "steps has ", steps.size(), " tensors; accepted: one for each momentum buffer");
        check_dtype(op, "steps", steps[at], ScalarType::Float);
        FT_CHECK(op, steps[at].is_cpu() && steps[at].numel() == 1, "steps[", at, "] has shape ", shape_of(steps[at]),
                 "; accepted: one element, on the CPU");
        counts.push_back(static_cast<float*>(steps[at].mutable_data_ptr()));
        s.first = *counts.back() == 0.0f;
      }
    }
  }
  check_count(op, "masters", masters.size(), next_master);
  check_count(op, "momentum_buffers", momentum_buffers.size(), next_buffer);
  check_count(op, "steps", steps.size(), next_buffer);
  if (skip) return;

  const SgdKernels& kernels = FT_KERNELS(sgd_kernels);
  int64_t total = 0;
  const auto run = [&](const std::vector<Chunk>& chunks) {
    for_chunks(chunks, total,
               [&](int64_t c) { step_chunk(kernels, all[chunks[c].tensor], chunks[c].begin, chunks[c].count); });
  };
  if (share_memory(all)) {
    for (size_t t = 0; t < all.size(); ++t) {
      std::vector<Chunk> chunks = chunks_of({numels[t]}, &total);
      for (Chunk& c : chunks) c.tensor = int32_t(t);
      run(chunks);
    }
  } else {
    run(chunks_of(numels, &total));
  }
  for (float* count : counts) *count += 1.0f;
}

}  // namespace
}  // namespace fasttricks::cpu

STABLE_TORCH_LIBRARY_IMPL(fasttricks, CPU, m) {
  m.impl("sgd_check", TORCH_BOX(&fasttricks::cpu::sgd_check));
  m.impl("sgd_step", TORCH_BOX(&fasttricks::cpu::sgd_step));
}

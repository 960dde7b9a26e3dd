// sgd_check, sgd_step: checks, the plan of chunks, and the gather and scatter of strided tensors.
#include "sgd.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "sgd_call.h"

namespace fasttricks::cpu {
namespace {

constexpr int64_t kChunk = 16384;      // elements: the unit of work, and of the sums of squares
constexpr int64_t kPerThread = 65536;  // elements below which another thread costs more than it saves
constexpr int64_t kGathered = 512;     // elements of a strided tensor that are copied together at a time

// A tensor's memory: base, element size, and strides borrowed from the tensor.
struct Operand {
  char* data = nullptr;
  int64_t item = 0;
  const int64_t* strides = nullptr;
};

Operand operand(const SgdArgument& t, bool write) {
  if (!t) return {};
  void* const data = write ? t.tensor->mutable_data_ptr() : const_cast<void*>(t.tensor->const_data_ptr());
  return {static_cast<char*>(data), size_of(t.element()), t.strides};
}

// Copies elements [begin, begin + count), counted in the order of the dimensions, into or out of `packed`.
void move_strided(const SgdArgument& g, const Operand& o, int64_t begin, int64_t count, char* packed, bool gather) {
  int64_t index[kSgdMaxDims], offset = 0, rest = begin;
  for (int64_t d = int64_t(g.dims) - 1; d >= 0; --d) {
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
    for (int64_t d = int64_t(g.dims) - 1; d >= 0; --d) {
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

// Chunks of at most kChunk elements. Their bounds depend only on the sizes, so sums do not depend on the thread count.
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

// Calls work(chunk index) for all chunks, in ascending order on each thread (which helps prefetchers); threads get
// nearly equal numbers of elements.
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

double read_scalar(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? *static_cast<const double*>(t.const_data_ptr())
                                               : *static_cast<const float*>(t.const_data_ptr());
}

const double* read_squares(const MaybeTensor& t) {
  return t.has_value() ? static_cast<const double*>(t->const_data_ptr()) : nullptr;
}

// ----------------------------------------------------------------------------------------------------------------
// check

struct Checked {
  SgdArgument shape;
  ElementType type = ElementType::kFloat;
  Operand values, master;
  bool linear = true;
};

void sgd_check(const std::vector<Tensor>& grads, const std::vector<Tensor>& params, const std::vector<Tensor>& masters,
               const Tensor& found_inf, const MaybeTensor& grad_sq, const MaybeTensor& weight_sq) {
  const SgdKernels& kernels = FT_KERNELS(sgd_kernels);
  std::vector<Checked> all;
  std::vector<int64_t> numels;
  all.reserve(grads.size() + params.size());
  numels.reserve(grads.size() + params.size());
  for_checked(grads, params, masters, found_inf, grad_sq, weight_sq, [&](const SgdChecked& t) {
    const bool linear = t.values.dense() && (!t.master || t.values.same_strides(t.master));
    all.push_back({t.values, t.values.element(), operand(t.values, false), operand(t.master, false), linear});
    numels.push_back(t.values.numel());
  });
  double* const grad_squares = const_cast<double*>(read_squares(grad_sq));
  double* const weight_squares = const_cast<double*>(read_squares(weight_sq));

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
  if (grad_squares)  // fp64 gradients whose norm overflowed: there is nothing to clip to
    any = any || !std::all_of(grad_squares, grad_squares + grads.size(), [](double s) { return std::isfinite(s); });
  if (any) *static_cast<float*>(found_inf.mutable_data_ptr()) = 1.0f;
}

// -----------------------------------------------------------------------------------------------------------------
// step

struct Stepped {
  SgdArgument shape;
  ElementType type = ElementType::kFloat, grad_type = ElementType::kFloat;
  Operand param, grad, master, buffer;
  SgdScalars scalars = {};
  size_t group = 0;
  float* count = nullptr;
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
  std::vector<Stepped> all;
  std::vector<int64_t> numels;
  all.reserve(params.size());
  numels.reserve(params.size());
  const bool share_memory = call.for_stepped([&](const SgdStepped& given) {
    Stepped t;
    t.type = given.param.element();
    t.grad_type = given.grad.element();
    t.shape = given.param;
    t.param = operand(given.param, true);
    t.grad = operand(given.grad, false);
    t.master = operand(given.master, true);
    t.buffer = operand(given.buffer, true);
    t.linear = given.param.dense();
    for (const SgdArgument* beside : {&given.grad, &given.master, &given.buffer})
      t.linear = t.linear && (!*beside || given.param.same_strides(*beside));
    t.group = given.group;
    if (given.steps) t.count = static_cast<float*>(given.steps.tensor->mutable_data_ptr());
    all.push_back(t);
    numels.push_back(given.param.numel());
  });

  // the CPU reads found_inf here; kernels on other devices read it there
  if (found_inf.has_value() && read_scalar(*found_inf) != 0.0) return;
  const double inv_scale = grad_scale.has_value() ? 1.0 / read_scalar(*grad_scale) : 1.0;
  const double* const grad_squares = read_squares(grad_sq);
  const double* const weight_squares = read_squares(weight_sq);
  double clip = 1.0;
  if (max_norm > 0.0) {
    double square = 0.0;
    for (int64_t i = 0; i < grad_sq->numel(); ++i) square += grad_squares[i];
    clip = sgd_clip(max_norm, std::sqrt(square) * inv_scale);
  }
  for (size_t i = 0; i < all.size(); ++i) {
    const size_t g = all[i].group;
    const double rate = read_scalar(lr[g]);
    SgdScalars& s = all[i].scalars;
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
    if (trust_coefficient[g] > 0.0)
      s.multiplier *= lars_trust(trust_coefficient[g], std::sqrt(weight_squares[i]),
                                 std::sqrt(grad_squares[i]) * inv_scale * clip, s.weight_decay, eps);
    if (all[i].count) s.first = *all[i].count == 0.0f;
  }

  const SgdKernels& kernels = FT_KERNELS(sgd_kernels);
  int64_t total = 0;
  const auto run = [&](const std::vector<Chunk>& chunks) {
    for_chunks(chunks, total,
               [&](int64_t c) { step_chunk(kernels, all[chunks[c].tensor], chunks[c].begin, chunks[c].count); });
  };
  if (share_memory) {
    for (size_t t = 0; t < all.size(); ++t) {
      std::vector<Chunk> chunks = chunks_of({numels[t]}, &total);
      for (Chunk& c : chunks) c.tensor = int32_t(t);
      run(chunks);
    }
  } else {
    run(chunks_of(numels, &total));
  }
  for (const Stepped& t : all)
    if (t.count) *t.count += 1.0f;
}

}  // namespace
}  // namespace fasttricks::cpu

STABLE_TORCH_LIBRARY_IMPL(fasttricks, CPU, m) {
  m.impl("sgd_check", TORCH_BOX(&fasttricks::cpu::sgd_check));
  m.impl("sgd_step", TORCH_BOX(&fasttricks::cpu::sgd_step));
}

// avgpool_conv1x1 on the CPU: checks, allocation and the division of work; the kernels are in isa/avgpool_conv1x1.cpp.
#include "cpu/avgpool_conv1x1.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "avgpool_conv1x1_call.h"
#include "cpu/allocate.h"
#include "math/avgpool.h"

namespace fasttricks::cpu {
namespace {

using torch::stable::parallel_for;

const AvgPoolConv1x1OfType& kernels_of(ScalarType t) {
  const AvgPoolConv1x1Kernels& all = FT_KERNELS(avgpool_conv1x1_kernels);
  return t == ScalarType::Float    ? all.float32
         : t == ScalarType::Double ? all.float64
         : t == ScalarType::Half   ? all.float16
                                   : all.bfloat16;
}

// In one of the layouts that the kernels know.
Tensor make(const Tensor& like, std::array<int64_t, 4> sizes, bool nhwc) {
  return new_tensor(like, sizes, like.scalar_type(), nhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// The gradient has the strides of weight, so that neither autograd nor DistributedDataParallel copies it.
Tensor make_like(const Tensor& weight) {
  return is_dense(weight, MemoryFormat::Contiguous) ? new_tensor(weight, weight.sizes(), weight.scalar_type())
                                                    : torch::stable::empty_like(weight);
}

// One value for each of `count` channels; none for a gradient that is not needed.
Tensor make_vector(const Tensor& like, int64_t count) { return new_tensor(like, {count}, like.scalar_type()); }

// Memory of a call's tasks; on the stack if it is small, as for the smallest images.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t bytes) : base_(small_) {
    if (bytes <= int64_t(sizeof small_)) return;
    memory_ = new_tensor(like, {bytes}, ScalarType::Byte);
    base_ = static_cast<char*>(memory_->mutable_data_ptr());
  }
  char* base() { return base_; }

 private:
  alignas(64) char small_[64 << 10];
  char* base_;
  std::optional<Tensor> memory_;
};

// The workspaces of several tasks in one allocation, each aligned to separate cache lines.
int64_t round_up(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// The number of tasks: one per thread, or one if starting threads would cost more than they save.
int64_t tasks_for(int64_t pixels, int64_t c, int64_t o) {
  constexpr int64_t kSmall = 1 << 18;  // multiply-adds: some 10 us
  return pixels * c * o < kSmall ? 1 : int64_t(torch::stable::get_num_threads());
}

// Computes y from x, or dx from dy.
void convolve(const AvgPoolConv1x1OfType& kernels, const AvgPoolConv1x1Sizes& s, AvgPoolConv1x1Pass pass,
              const Tensor& src, const Tensor& weight, const Tensor* bias, Tensor& dst) {
  const bool forward = pass == AvgPoolConv1x1Pass::forward;
  const int64_t k = forward ? s.c : s.o, m = forward ? s.o : s.c, pixels = s.n * s.ho * s.wo;
  // split over the pixels, in whole tiles, and over the output channels only if there are too few pixels for all
  // threads
  const int64_t unit = s.nhwc ? kernels.mr : kernels.nr, units = ceil_div(pixels, unit);
  const int64_t tasks = tasks_for(pixels, s.c, s.o), across = std::min(tasks, units);
  const int64_t panels = ceil_div(m, kernels.nr), along = std::min(tasks / across, panels);

  const int64_t packed_bytes = round_up(kernels.packed_weight_bytes(s, pass));
  const int64_t task_bytes = round_up(kernels.convolve_bytes(s, pass));
  Workspace memory(src, packed_bytes + across * along * task_bytes);
  char* base = memory.base();
  parallel_for(0, panels, ceil_div(1 << 15, k * kernels.nr), [&](int64_t begin, int64_t end) {
    kernels.pack_weight(s, pass, weight.const_data_ptr(), base, begin, end);
  });
  parallel_for(0, across * along, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = t % across, j = t / across;
      kernels.convolve(s, pass,
                       {src.const_data_ptr(), base, bias ? bias->const_data_ptr() : nullptr, dst.mutable_data_ptr(),
                        std::min(pixels, units * i / across * unit), std::min(pixels, units * (i + 1) / across * unit),
                        std::min(m, panels * j / along * kernels.nr),
                        std::min(m, panels * (j + 1) / along * kernels.nr), base + packed_bytes + t * task_bytes});
    }
  });
}

// How the weight's gradient is divided: slices of the reduction over the pixels, parts of o and of c.
struct WeightGrid {
  int64_t slices, o_parts, c_parts;
};

// The grid with the least work for the busiest task, from the sizes and the thread count alone. Costs are in
// units of one multiply-add of the register tile: copying an element of dy, pooling one of x (four reads), adding one
// of a slice.
WeightGrid weight_grid(const AvgPoolConv1x1OfType& kernels, const AvgPoolConv1x1Sizes& s, int64_t tasks) {
  constexpr double kCopy = 32, kAverage = 96, kAdd = 96;
  const int64_t pixels = s.n * s.ho * s.wo;
  WeightGrid best{1, 1, 1};
  double least = 0;
  for (int64_t slices = 1; slices <= std::min(tasks, ceil_div(pixels, 128)); ++slices)
    for (int64_t o_parts = 1; o_parts <= std::min(tasks / slices, ceil_div(s.o, kernels.mr)); ++o_parts) {
      const int64_t c_parts = std::min(tasks / (slices * o_parts), ceil_div(s.c, kernels.nr));
      const double p = double(ceil_div(pixels, slices)), o = double(ceil_div(s.o, o_parts));
      const double c = double(ceil_div(ceil_div(s.c, kernels.nr), c_parts) * kernels.nr);
      const double sums = slices > 1 ? double(s.o * s.c) * double(slices + 1) / double(tasks) : 0;
      const double work = p * o * c + kCopy * p * o + kAverage * p * c + kAdd * sums;
      if (least == 0 || work < least) least = work, best = {slices, o_parts, c_parts};
    }
  return best;
}

void weight_grad(const AvgPoolConv1x1OfType& kernels, const AvgPoolConv1x1Sizes& s, const Tensor& dy, const Tensor& x,
                 Tensor& dweight) {
  const int64_t pixels = s.n * s.ho * s.wo, numel = s.o * s.c, c_panels = ceil_div(s.c, kernels.nr);
  const WeightGrid grid = weight_grid(kernels, s, tasks_for(pixels, s.c, s.o));
  const ScalarType sum_type = accumulate_type(x.scalar_type());
  const bool direct = grid.slices == 1 && sum_type == x.scalar_type();
  const int64_t sum_bytes = sum_type == ScalarType::Double ? 8 : 4;
  const int64_t partial_bytes = direct ? 0 : round_up(grid.slices * numel * sum_bytes);
  const int64_t tasks = grid.slices * grid.o_parts * grid.c_parts, task_bytes = round_up(kernels.weight_grad_bytes(s));
  Workspace memory(x, partial_bytes + tasks * task_bytes);
  char* base = memory.base();
  char* sums = direct ? static_cast<char*>(dweight.mutable_data_ptr()) : base;
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = t % grid.c_parts, j = t / grid.c_parts % grid.o_parts, l = t / (grid.c_parts * grid.o_parts);
      const auto c_at = [&](int64_t q) { return std::min(s.c, c_panels * q / grid.c_parts * kernels.nr); };
      kernels.weight_grad(
          s, {dy.const_data_ptr(), x.const_data_ptr(), sums + l * numel * sum_bytes, pixels * l / grid.slices,
              pixels * (l + 1) / grid.slices, s.o * j / grid.o_parts, s.o * (j + 1) / grid.o_parts, c_at(i),
              c_at(i + 1), base + partial_bytes + t * task_bytes});
    }
  });
  if (direct) return;
  parallel_for(0, numel, 1 << 14, [&](int64_t begin, int64_t end) {
    kernels.sum_slices(sums, grid.slices, numel, dweight.mutable_data_ptr(), begin, end);
  });
}

Tensor avgpool_conv1x1_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t stride, bool ceil_mode) {
  const char* op = "avgpool_conv1x1_forward";
  const AvgPoolConv1x1Sizes s = avgpool_conv1x1_sizes(op, x, weight, stride, ceil_mode);
  check_avgpool_conv1x1_bias(op, bias, x, s);
  if (bias.has_value()) bias = in_layout(*bias, MemoryFormat::Contiguous);
  Tensor y = make(x, {s.n, s.o, s.ho, s.wo}, s.nhwc);
  if (s.n == 0) return y;
  convolve(kernels_of(x.scalar_type()), s, AvgPoolConv1x1Pass::forward, in_layout(x, layout_of(x)),
           in_layout(weight, MemoryFormat::Contiguous), bias.has_value() ? &*bias : nullptr, y);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> avgpool_conv1x1_backward(Tensor dy, Tensor x, Tensor weight, int64_t stride,
                                                            bool ceil_mode, bool need_dx, bool need_dweight,
                                                            bool need_dbias, bool pooled_dx) {
  const char* op = "avgpool_conv1x1_backward";
  const AvgPoolConv1x1Sizes s = avgpool_conv1x1_sizes(op, x, weight, stride, ceil_mode);
  check_avgpool_conv1x1_dy(op, dy, x, s);
  const AvgPoolConv1x1OfType& kernels = kernels_of(x.scalar_type());
  const MemoryFormat layout = layout_of(x);
  const bool empty = s.n == 0;
  if (!empty) dy = in_layout(dy, layout);

  const AvgPoolConv1x1Sizes to = pooled_dx ? s.without_pool() : s;
  Tensor dx = need_dx ? make(x, {to.n, to.c, to.h, to.w}, to.nhwc) : make_vector(x, 0);
  if (need_dx && !empty) {
    convolve(kernels, to, AvgPoolConv1x1Pass::backward, dy, in_layout(weight, MemoryFormat::Contiguous), nullptr, dx);
    if (to.ho * to.stride < to.h || to.wo * to.stride < to.w)
      parallel_for(0, to.n, 1,
                   [&](int64_t begin, int64_t end) { kernels.zero_uncovered(to, dx.mutable_data_ptr(), begin, end); });
  }

  Tensor dweight = need_dweight ? make_like(weight) : make_vector(weight, 0);
  if (need_dweight && empty) torch::stable::zero_(dweight);
  if (need_dweight && !empty) {
    x = in_layout(x, layout);
    const bool rows = is_matrix(dweight, s);
    Tensor dense = rows ? dweight : new_tensor(weight, {s.o, s.c, 1, 1}, weight.scalar_type());
    weight_grad(kernels, s, dy, x, dense);
    if (!rows) torch::stable::copy_(dweight, dense);
  }

  Tensor dbias = make_vector(weight, need_dbias ? s.o : 0);
  if (need_dbias && empty) torch::stable::zero_(dbias);
  if (need_dbias && !empty)
    parallel_for(0, s.o, 32, [&](int64_t begin, int64_t end) {
      kernels.bias_grad(s, dy.const_data_ptr(), dbias.mutable_data_ptr(), begin, end);
    });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace fasttricks::cpu

STABLE_TORCH_LIBRARY_IMPL(fasttricks, CPU, m) {
  m.impl("avgpool_conv1x1_forward", TORCH_BOX(&fasttricks::cpu::avgpool_conv1x1_forward));
  m.impl("avgpool_conv1x1_backward", TORCH_BOX(&fasttricks::cpu::avgpool_conv1x1_backward));
}

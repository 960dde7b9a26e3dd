// avgpool_conv1x1 on CUDA tensors: checks, allocation and registration; avgpool_conv1x1_run.cuh launches.
#include <tuple>

#include "avgpool_conv1x1_call.h"
#include "avgpool_conv1x1_run.cuh"
#include "host.h"

namespace fasttricks::cuda::ops {
namespace {

// Calls use(first image, shape) for each launch: as many whole images as the pixel limit of one launch allows.
template <typename Use>
void for_images(const char* op, const AvgPoolConv1x1Sizes& s, Use use) {
  FT_CHECK(op, s.ho * s.wo <= kAvgPoolMaxPixels && s.c < kAvgPoolMaxPixels && s.o < kAvgPoolMaxPixels,
           "the output would have ", s.ho * s.wo, " pixels an image, ", s.o, " channels from ", s.c,
           "; accepted: fewer than 2^31 of each");
  const int64_t images = avgpool_images(s.ho, s.wo);
  for (int64_t n = 0; n < s.n; n += images)
    use(n, AvgPoolShape{int(std::min(images, s.n - n)), int(s.c), int(s.h), int(s.w), int(s.o), int(s.ho), int(s.wo),
                        int(s.stride)});
}

Tensor avgpool_conv1x1_forward(Tensor x, Tensor weight, MaybeTensor bias, int64_t stride, bool ceil_mode) {
  const char* op = "avgpool_conv1x1_forward";
  const AvgPoolConv1x1Sizes s = avgpool_conv1x1_sizes(op, x, weight, stride, ceil_mode);
  check_avgpool_conv1x1_bias(op, bias, x, s);
  Tensor y = avgpool_conv1x1_empty(x, {s.n, s.o, s.ho, s.wo}, s.nhwc);
  if (s.n == 0) return y;
  OnDevice on(x);
  x = torch::stable::contiguous(x, layout_of(x));
  weight = torch::stable::contiguous(weight);
  if (bias.has_value()) bias = torch::stable::contiguous(*bias);
  with_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    for_images(op, s, [&](int64_t n, const AvgPoolShape& shape) {
      avgpool_forward_run<T>(static_cast<const T*>(x.const_data_ptr()) + n * s.c * s.h * s.w,
                             static_cast<const T*>(weight.const_data_ptr()),
                             bias.has_value() ? static_cast<const T*>(bias->const_data_ptr()) : nullptr, shape, s.nhwc,
                             on.device, static_cast<T*>(y.mutable_data_ptr()) + n * s.o * s.ho * s.wo, on.stream);
    });
  });
  return y;
}

// One workspace for the partial sums of all launches, `numel` values per part.
template <typename T>
struct Partial {
  Tensor memory;
  int64_t numel, used = 0;

  Partial(const Tensor& like, int64_t parts, int64_t numel)
      : memory(torch::stable::new_empty(like, {parts * numel}, accumulate_type(like.scalar_type()))), numel(numel) {}
  acc_t<T>* take(int64_t parts) {
    used += parts;
    return static_cast<acc_t<T>*>(memory.mutable_data_ptr()) + (used - parts) * numel;
  }
  void sum_to(Tensor& out, cudaStream_t stream) {
    avgpool_sum_splits_run<T>(static_cast<const acc_t<T>*>(memory.const_data_ptr()), used, numel,
                              static_cast<T*>(out.mutable_data_ptr()), stream);
  }
};

std::tuple<Tensor, Tensor, Tensor> avgpool_conv1x1_backward(Tensor dy, Tensor x, Tensor weight, int64_t stride,
                                                            bool ceil_mode, bool need_dx, bool need_dweight,
                                                            bool need_dbias, bool pooled_dx) {
  const char* op = "avgpool_conv1x1_backward";
  const AvgPoolConv1x1Sizes s = avgpool_conv1x1_sizes(op, x, weight, stride, ceil_mode);
  check_avgpool_conv1x1_dy(op, dy, x, s);
  // without the pool it is the gradient of a convolution
  const AvgPoolConv1x1Sizes dx_sizes = pooled_dx ? s.without_pool() : s;
  Tensor dx =
      need_dx ? avgpool_conv1x1_empty(x, {s.n, s.c, dx_sizes.h, dx_sizes.w}, s.nhwc) : torch::stable::new_empty(x, {0});
  // dweight has the strides of weight, so that neither autograd nor DistributedDataParallel copies it
  Tensor dweight = need_dweight ? torch::stable::empty_like(weight) : torch::stable::new_empty(weight, {0});
  Tensor dbias = torch::stable::new_empty(weight, {need_dbias ? s.o : 0});
  if (s.n == 0) {
    for (Tensor* sums : {&dweight, &dbias})
      if (sums->numel() > 0) torch::stable::zero_(*sums);
    return {dx, dweight, dbias};
  }
  OnDevice on(x);
  const MemoryFormat layout = layout_of(x);
  dy = torch::stable::contiguous(dy, layout);
  if (need_dweight) x = torch::stable::contiguous(x, layout);
  if (need_dx) weight = torch::stable::contiguous(weight);
  with_type(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const auto dy_at = [&](int64_t n) { return static_cast<const T*>(dy.const_data_ptr()) + n * s.o * s.ho * s.wo; };
    const auto pixels_of = [&](int64_t n) { return n * s.c * s.h * s.w; };
    if (need_dx)
      for_images(op, dx_sizes, [&](int64_t n, const AvgPoolShape& shape) {
        avgpool_input_run<T>(dy_at(n), static_cast<const T*>(weight.const_data_ptr()), shape, s.nhwc, on.device,
                             static_cast<T*>(dx.mutable_data_ptr()) + n * s.c * dx_sizes.h * dx_sizes.w, on.stream);
      });
    if (need_dweight) {
      const auto plan_of = [&](const AvgPoolShape& shape) {
        return avgpool_plan(shape, AvgPoolProduct::kWeight, sizeof(T), on.device.sm_count);
      };
      int64_t parts = 0;
      for_images(op, s, [&](int64_t, const AvgPoolShape& shape) { parts += plan_of(shape).splits; });
      Partial<T> partial(x, parts, s.o * s.c);
      for_images(op, s, [&](int64_t n, const AvgPoolShape& shape) {
        const AvgPoolPlan plan = plan_of(shape);
        avgpool_weight_run<T>(dy_at(n), static_cast<const T*>(x.const_data_ptr()) + pixels_of(n), shape, s.nhwc, plan,
                              partial.take(plan.splits), on.stream);
      });
      Tensor dense = is_matrix(dweight, s) ? dweight : torch::stable::new_empty(weight, {s.o, s.c, 1, 1});
      partial.sum_to(dense, on.stream);
      if (!is_matrix(dweight, s)) torch::stable::copy_(dweight, dense);
    }
    if (need_dbias) {
      int64_t parts = 0;
      const auto splits_of = [&](const AvgPoolShape& shape) { return avgpool_bias_splits(shape, on.device.sm_count); };
      for_images(op, s, [&](int64_t, const AvgPoolShape& shape) { parts += splits_of(shape); });
      Partial<T> partial(dy, parts, s.o);
      for_images(op, s, [&](int64_t n, const AvgPoolShape& shape) {
        avgpool_bias_run<T>(dy_at(n), shape, s.nhwc, splits_of(shape), partial.take(splits_of(shape)), on.stream);
      });
      partial.sum_to(dbias, on.stream);
    }
  });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace fasttricks::cuda::ops

FT_CUDA_LIBRARY(m) {
  using namespace fasttricks::cuda::ops;
  m.impl("avgpool_conv1x1_forward", TORCH_BOX(&avgpool_conv1x1_forward));
  m.impl("avgpool_conv1x1_backward", TORCH_BOX(&avgpool_conv1x1_backward));
}

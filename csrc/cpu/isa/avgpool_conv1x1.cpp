// avgpool_conv1x1: y = W pool(x) + b,  dx = spread(W^T dy),  dW = dy pool(x)^T,  db = sum dy     (formulas:
// math/avgpool.h)
//
// Blocked products (cpu/gemm.h) whose operand of pixels is pooled while it is packed: the pooled tensor exists only as
// one block at a time, in the L2 cache. Half precision is widened there: pooled values and sums are float, and only y,
// dx and dW are rounded.
#include "cpu/avgpool_conv1x1.h"

#include "cpu/avgpool_image.h"
#include "cpu/gemm.h"

namespace fasttricks::cpu::FT_ISA {
namespace {

// Blocks that the L2 cache holds, for one of 1 MiB.
constexpr int64_t kOperandBytes = 512 << 10;   // pixels, read once for every row or panel of the weight
constexpr int64_t kResultBytes = 128 << 10;    // results
constexpr int64_t kAvgPoolBytes = 1024 << 10;  // pooled channels of dW, read a panel at a time: they may reach into L3

// ---- blocks of the reduced dimension ----

FT_INLINE int64_t k_blocks(int64_t k) { return ceil_div(k, kKc); }
FT_INLINE int64_t k_begin(int64_t k, int64_t block) { return k * block / k_blocks(k); }

// The stride between panels of B, padded so that panels written together fall into different cache sets.
template <class A>
FT_INLINE int64_t panel_stride(int64_t k) {
  return ceil_div(k, k_blocks(k)) * kNr<A> + kPad / int64_t(sizeof(A));
}

// ---- the product at each pixel: y from x, dx from dy ----

template <class A>
struct ConvolvePlan {
  int64_t k, m, blocks, pixels, channels, row,
      operand;  // pixels x channels: one block of results, rows of `row` elements

  ConvolvePlan(const AvgPoolConv1x1Sizes& s, AvgPoolConv1x1Pass pass)
      : k(pass == AvgPoolConv1x1Pass::forward ? s.c : s.o),
        m(pass == AvgPoolConv1x1Pass::forward ? s.o : s.c),
        blocks(k_blocks(k)) {
    const int64_t unit = s.nhwc ? kMr : kNr<A>, most = s.nhwc ? 18 * kMr : 512;
    const int64_t all_pixels = ceil_div(s.n * s.ho * s.wo, unit);
    pixels = min_of(all_pixels, max_of(1, min_of(most, kOperandBytes / (k * int64_t(sizeof(A)))) / unit)) * unit;
    const int64_t c_unit = s.nhwc ? kNr<A> : kMr;
    channels = min_of(ceil_div(m, c_unit), max_of(1, kResultBytes / (pixels * int64_t(sizeof(A))) / c_unit)) * c_unit;
    row = (s.nhwc ? channels : pixels) + kPad / int64_t(sizeof(A));
    operand = s.nhwc ? blocks * pixels * kRow<A> : blocks * (pixels / kNr<A>)*panel_stride<A>(k);
  }
  FT_INLINE int64_t result(bool nhwc) const { return (nhwc ? pixels : channels) * row; }
  FT_INLINE int64_t bytes(bool nhwc) const {
    return (operand + result(nhwc) + (nhwc ? 0 : scratch_for_run<A>(pixels))) * int64_t(sizeof(A));
  }
};

template <class T>
int64_t packed_weight_bytes(const AvgPoolConv1x1Sizes& s, AvgPoolConv1x1Pass pass) {
  using A = acc_t<T>;
  const ConvolvePlan<A> plan(s, pass);
  const int64_t panels = ceil_div(plan.m, kNr<A>);
  return plan.blocks * (s.nhwc ? panels * panel_stride<A>(plan.k) : plan.m * kRow<A>)*int64_t(sizeof(A));
}

// NCHW: rows of A (a row is an output channel of the pass); NHWC: panels of B (a column is one).
template <class T>
void pack_weight(const AvgPoolConv1x1Sizes& s, AvgPoolConv1x1Pass pass, const void* weight, void* packed, int64_t begin,
                 int64_t end) {
  using A = acc_t<T>;
  const ConvolvePlan<A> plan(s, pass);
  const T* w = static_cast<const T*>(weight);
  const int64_t panels = ceil_div(plan.m, kNr<A>), stride = panel_stride<A>(plan.k);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t m0 = unit * kNr<A>, width = min_of(kNr<A>, plan.m - m0);
    for (int64_t b = 0; b < plan.blocks; ++b) {
      const int64_t k0 = k_begin(plan.k, b), kc = k_begin(plan.k, b + 1) - k0;
      if (!s.nhwc) {
        A* dst = static_cast<A*>(packed) + (b * plan.m + m0) * kRow<A>;
        if (pass == AvgPoolConv1x1Pass::forward)
          for (int64_t r = 0; r < width; ++r) copy_run(w + (m0 + r) * s.c + k0, kc, dst + r * kRow<A>);
        else
          transpose(w + k0 * s.c + m0, s.c, kc, width, dst, kRow<A>);
        continue;
      }
      A* dst = static_cast<A*>(packed) + (b * panels + unit) * stride;
      if (pass == AvgPoolConv1x1Pass::forward)
        transpose(w + m0 * s.c + k0, s.c, width, kc, dst, kNr<A>);
      else
        for (int64_t k = 0; k < kc; ++k) copy_run(w + (k0 + k) * s.c + m0, width, dst + k * kNr<A>);
      for (int64_t k = 0; k < kc; ++k)
        for (int64_t q = width; q < kNr<A>; ++q) dst[k * kNr<A> + q] = A(0);
    }
  }
}

template <class T>
int64_t convolve_bytes(const AvgPoolConv1x1Sizes& s, AvgPoolConv1x1Pass pass) {
  return ConvolvePlan<acc_t<T>>(s, pass).bytes(s.nhwc);
}

// The address of columns q to q + N of a row in panels that lie `stride` apart.
template <class A>
FT_INLINE A* in_panels(A* row, int64_t stride, int64_t q) {
  return row + q / kNr<A> * stride + q % kNr<A>;
}

template <class T>
void convolve(const AvgPoolConv1x1Sizes& s, AvgPoolConv1x1Pass pass, const AvgPoolConv1x1Task& task) {
  using A = acc_t<T>;
  constexpr int N = Vec<A>::N;
  const ConvolvePlan<A> plan(s, pass);
  const bool forward = pass == AvgPoolConv1x1Pass::forward;
  const AvgPoolImage<const T> src =
      forward ? AvgPoolImage<const T>{static_cast<const T*>(task.src), s.c, s.h, s.w, s.ho, s.wo, s.stride}
              : AvgPoolImage<const T>{static_cast<const T*>(task.src), s.o, s.ho, s.wo, s.ho, s.wo, 1};
  const AvgPoolImage<T> dst = forward ? AvgPoolImage<T>{static_cast<T*>(task.dst), s.o, s.ho, s.wo, s.ho, s.wo, 1}
                                      : AvgPoolImage<T>{static_cast<T*>(task.dst), s.c, s.h, s.w, s.ho, s.wo, s.stride};
  const T* bias = static_cast<const T*>(task.bias);
  const A* weight = static_cast<const A*>(task.packed_weight);
  A* operand = static_cast<A*>(task.workspace);
  A* result = operand + plan.operand;
  A* scratch = result + plan.result(s.nhwc);
  const int64_t stride = panel_stride<A>(plan.k), panels = ceil_div(plan.m, kNr<A>);
  const int64_t length = task.p1 - task.p0, chunks = ceil_div(length, plan.pixels), unit = s.nhwc ? 1 : kNr<A>;

  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t p = task.p0 + part_begin(length, unit, chunks, chunk);
    const int64_t count = task.p0 + part_begin(length, unit, chunks, chunk + 1) - p;
    const int64_t held = s.nhwc ? count : ceil_div(count, kNr<A>);  // rows or panels of the operand
    for (int64_t b = 0; b < plan.blocks; ++b) {
      const int64_t k0 = k_begin(plan.k, b), kc = k_begin(plan.k, b + 1) - k0;
      if (s.nhwc) {
        for (int64_t r = 0; r < count; ++r) read_pixel(src, p + r, k0, kc, operand + (b * held + r) * kRow<A>);
      } else {
        for (int64_t k = 0; k < kc; ++k) {
          A* row = operand + b * held * stride + k * kNr<A>;
          read_run(src, k0 + k, p, count, scratch,
                   [&](int64_t q, Vec<A> values) { values.store(in_panels(row, stride, q)); });
          for (int64_t q = ceil_div(count, N) * N; q < held * kNr<A>; q += N)
            Vec<A>(A(0)).store(in_panels(row, stride, q));
        }
      }
    }
    for (int64_t m = task.m0; m < task.m1; m += plan.channels) {
      const int64_t channels = min_of(plan.channels, task.m1 - m);
      for (int64_t b = 0; b < plan.blocks; ++b) {
        const int64_t kc = k_begin(plan.k, b + 1) - k_begin(plan.k, b);
        if (s.nhwc)
          multiply(count, channels, kc, operand + b * held * kRow<A>, weight + (b * panels + m / kNr<A>)*stride, stride,
                   result, plan.row, b > 0, true);
        else
          multiply(channels, count, kc, weight + (b * plan.m + m) * kRow<A>, operand + b * held * stride, stride,
                   result, plan.row, b > 0, true);
      }
      if (s.nhwc) {
        for (int64_t r = 0; r < count; ++r) {
          A* values = result + r * plan.row;
          if (bias != nullptr)
            for (int64_t q = 0; q < channels; ++q) values[q] += load1(bias + m + q);
          write_pixel(dst, p + r, m, channels, values);
        }
      } else {
        for (int64_t r = 0; r < channels; ++r) {
          A* values = result + r * plan.row;
          if (bias != nullptr) {
            const A b = load1(bias + m + r);
            for (int64_t q = 0; q < count; ++q) values[q] += b;
          }
          write_run(dst, m + r, p, count, values, scratch);
        }
      }
    }
  }
}

// ---- the weight's gradient: the reduction runs over the pixels ----

template <class A>
struct WeightGradPlan {
  int64_t depth;     // most pixels of one block
  int64_t rows;      // output channels of one block
  int64_t channels;  // pooled channels of one block
  int64_t stride;    // from one panel of them to the next
  int64_t run;       // from one channel's pixels to the next

  explicit WeightGradPlan(const AvgPoolConv1x1Sizes& s)
      : depth(min_of(kKc, s.n * s.ho * s.wo)),
        rows(min_of(8, ceil_div(s.o, kMr)) * kMr),
        stride(depth * kNr<A> + kPad / int64_t(sizeof(A))),
        run(ceil_div(depth, Vec<A>::N) * Vec<A>::N + kPad / int64_t(sizeof(A))) {
    const int64_t most = max_of(1, kAvgPoolBytes / (kKc * kNr<A> * int64_t(sizeof(A))));
    channels = min_of(most, ceil_div(s.c, kNr<A>)) * kNr<A>;
  }
  FT_INLINE int64_t left() const { return rows * kRow<A>; }
  FT_INLINE int64_t right() const { return channels / kNr<A> * stride; }
  FT_INLINE int64_t runs() const { return max_of(kNr<A> * run, channels); }
  FT_INLINE int64_t scratch() const { return scratch_for_run<A>(depth); }
};

template <class T>
int64_t weight_grad_bytes(const AvgPoolConv1x1Sizes& s) {
  using A = acc_t<T>;
  const WeightGradPlan<A> plan(s);
  return (plan.left() + plan.right() + plan.runs() + plan.scratch()) * int64_t(sizeof(A));
}

template <class T>
void weight_grad(const AvgPoolConv1x1Sizes& s, const AvgPoolConv1x1WeightTask& task) {
  using A = acc_t<T>;
  constexpr int N = Vec<A>::N;
  const WeightGradPlan<A> plan(s);
  const AvgPoolImage<const T> x{static_cast<const T*>(task.x), s.c, s.h, s.w, s.ho, s.wo, s.stride};
  const AvgPoolImage<const T> dy{static_cast<const T*>(task.dy), s.o, s.ho, s.wo, s.ho, s.wo, 1};
  A* left = static_cast<A*>(task.workspace);
  A* right = left + plan.left();
  A* runs = right + plan.right();
  A* scratch = runs + plan.runs();
  A* dweight = static_cast<A*>(task.dweight);
  const int64_t length = task.p1 - task.p0, blocks = k_blocks(length);

  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t p = task.p0 + k_begin(length, block), kc = task.p0 + k_begin(length, block + 1) - p;
    for (int64_t c = task.c0; c < task.c1; c += plan.channels) {
      const int64_t channels = min_of(plan.channels, task.c1 - c);
      if (s.nhwc) {
        for (int64_t k = 0; k < kc; ++k) {
          read_pixel(x, p + k, c, channels, runs);
          for (int64_t q = channels; q % kNr<A> != 0; ++q) runs[q] = A(0);
          for (int64_t q = 0; q < channels; q += N)
            Vec<A>::load(runs + q).store(in_panels(right + k * kNr<A>, plan.stride, q));
        }
      } else {
        for (int64_t q0 = 0; q0 < channels; q0 += kNr<A>) {
          for (int64_t q = 0; q < kNr<A>; ++q) {
            A* run = runs + q * plan.run;
            if (q0 + q < channels)
              read_run(x, c + q0 + q, p, kc, scratch, [&](int64_t k, Vec<A> values) { values.store(run + k); });
            else
              for (int64_t k = 0; k < kc; ++k) run[k] = A(0);
          }
          transpose(runs, plan.run, kNr<A>, kc, right + q0 / kNr<A> * plan.stride, kNr<A>);
        }
      }
      for (int64_t o = task.o0; o < task.o1; o += plan.rows) {
        const int64_t rows = min_of(plan.rows, task.o1 - o);
        if (s.nhwc)
          transpose(dy.base + p * s.o + o, s.o, kc, rows, left, kRow<A>);
        else
          for (int64_t r = 0; r < rows; ++r)
            read_run(dy, o + r, p, kc, scratch,
                     [&](int64_t k, Vec<A> values) { values.store(left + r * kRow<A> + k); });
        multiply(rows, channels, kc, left, right, plan.stride, dweight + o * s.c + c, s.c, block > 0, false);
      }
    }
  }
}

template <class T>
void sum_slices(const void* partial, int64_t slices, int64_t numel, void* dst, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int N = Vec<A>::N;
  const A* src = static_cast<const A*>(partial);
  for (int64_t i = begin; i < end; i += N) {
    const int64_t n = min_of(N, end - i);
    Vec<A> s = load_n<A>(src + i, n);
    for (int64_t k = 1; k < slices; ++k) s = s + load_n<A>(src + k * numel + i, n);
    store_n(s, static_cast<T*>(dst) + i, n);
  }
}

// ---- the bias's gradient, and the edge that no window covers ----

// Sum of `count` rows that lie `stride` apart, n lanes of each: added pairwise, so that rounding errors grow with
// log(count).
template <class T>
Vec<acc_t<T>> sum_rows(const T* src, int64_t stride, int64_t count, int64_t n) {
  using A = acc_t<T>;
  if (count > 32)
    return sum_rows(src, stride, count / 2, n) + sum_rows(src + count / 2 * stride, stride, count - count / 2, n);
  Vec<A> part(A(0));
  for (int64_t i = 0; i < count; ++i) part = part + load_n<A>(src + i * stride, n);
  return part;
}

template <class T>
void bias_grad(const AvgPoolConv1x1Sizes& s, const void* dy, void* dbias, int64_t o0, int64_t o1) {
  using A = acc_t<T>;
  constexpr int N = Vec<A>::N;
  const T* src = static_cast<const T*>(dy);
  T* dst = static_cast<T*>(dbias);
  const int64_t plane = s.ho * s.wo, pixels = s.n * plane;
  constexpr int64_t kRun = 32;  // vectors of one partial sum
  if (s.nhwc) {
    for (int64_t o = o0; o < o1; o += N) {
      const int64_t n = min_of(N, o1 - o);
      store_n(sum_rows(src + o, s.o, pixels, n), dst + o, n);
    }
    return;
  }
  for (int64_t o = o0; o < o1; ++o) {
    A total = A(0);
    for (int64_t n = 0; n < s.n; ++n) {
      const T* run = src + (n * s.o + o) * plane;
      for (int64_t q = 0; q < plane; q += kRun * N) {
        const int64_t stop = min_of(plane, q + kRun * N);
        Vec<A> part(A(0));
        int64_t i = q;
        for (; i + N <= stop; i += N) part = part + Vec<A>::load(run + i);
        if (i < stop) part = part + Vec<A>::load(run + i, int(stop - i));
        total += sum(part);
      }
    }
    store1(dst + o, total);
  }
}

template <class T>
void zero_uncovered(const AvgPoolConv1x1Sizes& s, void* dx, int64_t n0, int64_t n1) {
  const int64_t h = min_of(s.h, s.ho * s.stride), w = min_of(s.w, s.wo * s.stride);
  const int64_t planes = s.nhwc ? 1 : s.c, inner = s.nhwc ? s.c : 1;
  const acc_t<T> zero(0);
  for (int64_t plane = n0 * planes; plane < n1 * planes; ++plane) {
    T* base = static_cast<T*>(dx) + plane * s.h * s.w * inner;
    for (int64_t r = 0; r < s.h; ++r)
      for (int64_t q = (r < h ? w : 0) * inner; q < s.w * inner; ++q) store1(base + r * s.w * inner + q, zero);
  }
}

template <class T>
constexpr AvgPoolConv1x1OfType kernels_of_type() {
  return {kMr,
          kNr<acc_t<T>>,
          packed_weight_bytes<T>,
          pack_weight<T>,
          convolve_bytes<T>,
          convolve<T>,
          weight_grad_bytes<T>,
          weight_grad<T>,
          sum_slices<T>,
          bias_grad<T>,
          zero_uncovered<T>};
}

}  // namespace

const AvgPoolConv1x1Kernels avgpool_conv1x1_kernels = {kernels_of_type<float>(), kernels_of_type<double>(),
                                                       kernels_of_type<Half>(), kernels_of_type<BFloat16>()};

}  // namespace fasttricks::cpu::FT_ISA

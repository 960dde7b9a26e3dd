// avgpool_conv1x1 for Python: csrc/cuda/avgpool_conv1x1_plan.h, the offsets of its loaders, and the launches of an op.
#include "record.h"

#pragma GCC visibility push(default)  // see record.h
#include "avgpool_conv1x1_run.cuh"
#pragma GCC visibility pop

using namespace fasttricks;
using namespace fasttricks::cuda;

namespace {

// Offsets for one pixel of the output and one channel, all but those of dy without the channel.
struct Offsets {
  int64_t nhwc, nchw;                   // the corner of the pixel's window in x
  int64_t first_of_two, second_of_two;  // NCHW: the same, of the two halves of a vector
  int64_t dy_nhwc, dy_nchw;             // its element of dy
};

Offsets avgpool_offsets(const AvgPoolShape& s, int q, int c) {
  const Half* const base = nullptr;
  const PooledPlaneLoader<Half> planes{base, s, true, true};
  const PlaneLoader<Half> gradient{base, s, s.o, true};
  const RowLoader<Half> rows{base, s.pixels(), s.o, true};
  const auto bytes = reinterpret_cast<uintptr_t>(rows.at(q, c));
  return {PooledRowLoader<Half>{base, s, true, false}.state(q).corner,
          planes.single(q).corner,
          planes.state(q).corner[0],
          planes.state(q).corner[1],
          int64_t(bytes / sizeof(Half)),
          gradient.state(q).offset + int64_t(c) * s.plane()};
}

// Of fp16: forward, or the gradient of x, or that of the weight.
std::vector<emu::Launch> launches(const AvgPoolShape& s, bool nhwc, const Device& device, AvgPoolProduct product) {
  Half* const at = reinterpret_cast<Half*>(uintptr_t{1} << 12);  // of no tensor
  float* const partial = reinterpret_cast<float*>(at);
  return emu::record({}, [&] {
    if (product == AvgPoolProduct::kForward) {
      avgpool_forward_run<Half>(at, at, nullptr, s, nhwc, device, at, nullptr);
    } else if (product == AvgPoolProduct::kInput) {
      avgpool_input_run<Half>(at, at, s, nhwc, device, at, nullptr);
    } else {
      const AvgPoolPlan plan = avgpool_plan(s, product, sizeof(Half), device.sm_count);
      avgpool_weight_run<Half>(at, at, s, nhwc, plan, partial, nullptr);
      avgpool_sum_splits_run<Half>(partial, plan.splits, int64_t(s.o) * s.c, at, nullptr);
    }
  });
}

}  // namespace

EMU_BINDINGS(m) {
  py::class_<AvgPoolShape>(m, "AvgPoolShape", py::module_local())
      .def(py::init([](int n, int c, int h, int w, int o, int stride, bool ceil_mode) {
             return AvgPoolShape(n, c, h, w, o, int(avgpool_out_size(h, stride, ceil_mode)),
                                 int(avgpool_out_size(w, stride, ceil_mode)), stride);
           }),
           py::arg("n"), py::arg("c"), py::arg("h"), py::arg("w"), py::arg("o"), py::arg("stride"),
           py::arg("ceil_mode"))
      .def_readonly("ho", &AvgPoolShape::ho)
      .def_readonly("wo", &AvgPoolShape::wo);
  py::enum_<AvgPoolProduct>(m, "AvgPoolProduct", py::module_local())
      .value("forward", AvgPoolProduct::kForward)
      .value("input", AvgPoolProduct::kInput)
      .value("weight", AvgPoolProduct::kWeight);
  py::class_<AvgPoolPlan>(m, "AvgPoolPlan", py::module_local())
      .def_readonly("tiles_m", &AvgPoolPlan::tiles_m)
      .def_readonly("tiles_n", &AvgPoolPlan::tiles_n)
      .def_readonly("depth", &AvgPoolPlan::depth)
      .def_readonly("depth_per_split", &AvgPoolPlan::depth_per_split)
      .def_readonly("splits", &AvgPoolPlan::splits);
  m.def("avgpool_plan", &avgpool_plan, py::arg("shape"), py::arg("product"), py::arg("bytes"), py::arg("sm_count"));
  py::class_<AvgPoolSlabPlan>(m, "AvgPoolSlabPlan", py::module_local())
      .def_readonly("tiles_m", &AvgPoolSlabPlan::tiles_m)
      .def_readonly("tiles_n", &AvgPoolSlabPlan::tiles_n)
      .def_readonly("tiles_per_group", &AvgPoolSlabPlan::tiles_per_group)
      .def_readonly("groups", &AvgPoolSlabPlan::groups)
      .def_readonly("shared_bytes", &AvgPoolSlabPlan::shared_bytes);
  m.def("avgpool_slab_plan", &avgpool_slab_plan, py::arg("shape"), py::arg("sm_count"), py::arg("shared_per_sm"),
        py::arg("shared_per_block"));
  m.def("avgpool_images", &avgpool_images, py::arg("ho"), py::arg("wo"));
  m.def("avgpool_bias_splits", &avgpool_bias_splits, py::arg("shape"), py::arg("sm_count"));

  py::class_<Offsets>(m, "AvgPoolOffsets", py::module_local())
      .def_readonly("nhwc", &Offsets::nhwc)
      .def_readonly("nchw", &Offsets::nchw)
      .def_readonly("first_of_two", &Offsets::first_of_two)
      .def_readonly("second_of_two", &Offsets::second_of_two)
      .def_readonly("dy_nhwc", &Offsets::dy_nhwc)
      .def_readonly("dy_nchw", &Offsets::dy_nchw);
  m.def("avgpool_offsets", &avgpool_offsets, py::arg("shape"), py::arg("pixel"), py::arg("channel"));

  m.def("avgpool_launches", &launches, py::arg("shape"), py::arg("nhwc"), py::arg("device"), py::arg("product"));
}

// bn_relu for Python: csrc/cuda/bn_relu_plan.h, the dividers of csrc/math/common.h, the launches of an op on a card,
// and the offset at which kernels access the last element of a tensor that is too large to allocate.
#include "bn_plan.h"

using namespace fasttricks;
using namespace fasttricks::cuda;

namespace {

std::vector<emu::Launch> forward_launches(const BnShape& s, const Device& device, const emu::Resident& resident,
                                          int element_bytes, bool residual) {
  return emu::record(resident, [&] {
    with_bytes(element_bytes, [&](auto t) {
      using T = decltype(t);
      using A = acc_t<T>;
      bn_forward_run<T>(somewhere<T>(), residual ? somewhere<T>() : nullptr, params<A>(), s, device, somewhere<A>(),
                        somewhere<A>(), somewhere<A>(), somewhere<T>(), residual ? somewhere<uint8_t>() : nullptr,
                        nullptr);
    });
    bn_update_stats_run(BnUpdate{}, s.channels, nullptr);
  });
}

// two: with a second gradient of the shape of x.
std::vector<emu::Launch> backward_launches(const BnShape& s, const Device& device, const emu::Resident& resident,
                                           int element_bytes, bool residual, bool two) {
  return emu::record(resident, [&] {
    with_bytes(element_bytes, [&](auto t) {
      using T = decltype(t);
      using A = acc_t<T>;
      if (two) {
        BnSecondGradient<T> other;
        other.data = somewhere<T>();
        return bn_backward_two_run<T>(somewhere<T>(), other, somewhere<T>(), residual ? somewhere<uint8_t>() : nullptr,
                                      params<A>(), s, device, somewhere<A>(), somewhere<A>(), somewhere<A>(), 1,
                                      somewhere<T>(), somewhere<T>(), residual, nullptr);
      }
      bn_backward_run<T>(somewhere<T>(), somewhere<T>(), residual ? somewhere<uint8_t>() : nullptr, params<A>(), s,
                         device, somewhere<A>(), somewhere<A>(), somewhere<A>(), 1, somewhere<T>(),
                         residual ? somewhere<T>() : nullptr, nullptr);
    });
  });
}

// The highest offset of any row of the last block, and the channel that it is taken to belong to.
__global__ void last_offset(BnShape s, BnTiling t, int64_t* out) {
  if (blockIdx.x + 1 != gridDim.x) return;
  for (BnTile tile(s, t); tile.more(); tile.next()) {
    tile.for_rows<1>([&](int64_t at, auto) {
      const int64_t end = at + tile.valid - 1;
      if (end <= out[0]) return;
      out[0] = end;
      tile.for_slots([&](int j, int slot) {
        if (j + 1 == tile.valid) out[1] = tile.channel(slot);
      });
    });
  }
}

std::tuple<int64_t, int64_t> bn_last_offset(const BnShape& s, int64_t most) {
  const BnTiling t = bn_tile(s, most);
  int64_t out[] = {-1, -1};
  launch(&last_offset, dim3(unsigned(t.blocks)), kBnThreads, 0, nullptr, s, t, &out[0]);
  return {out[0], out[1]};
}

}  // namespace

EMU_BINDINGS(m) {
  py::class_<Divider>(m, "Divider", py::module_local())
      .def(py::init<int64_t>(), py::arg("by"))
      .def("divide", &Divider::divide);
  py::class_<LongDivider>(m, "LongDivider", py::module_local())
      .def(py::init<int64_t>(), py::arg("by"))
      .def("divide", &LongDivider::divide);

  py::class_<BnShape>(m, "BnShape", py::module_local())
      .def_readonly("rows", &BnShape::rows)
      .def_readonly("cols", &BnShape::cols)
      .def_readonly("inner", &BnShape::inner)
      .def_readonly("channels", &BnShape::channels);
  m.def("bn_shape", &bn_shape, py::arg("n"), py::arg("channels"), py::arg("hw"), py::arg("channels_last"));
  py::class_<BnTiling>(m, "BnTiling", py::module_local())
      .def_readonly("tiles", &BnTiling::tiles)
      .def_readonly("units", &BnTiling::units)
      .def_readonly("blocks", &BnTiling::blocks)
      .def_readonly("parts", &BnTiling::parts)
      .def_readonly("slots", &BnTiling::slots)
      .def("first_unit", &BnTiling::first_unit)
      .def("block_of", &BnTiling::block_of);
  m.def("bn_tile", &bn_tile, py::arg("shape"), py::arg("most"));
  py::class_<BnSlabPlan>(m, "BnSlabPlan", py::module_local())
      .def_readonly("tiling", &BnSlabPlan::tiling)
      .def_readonly("rows", &BnSlabPlan::rows)
      .def_readonly("kept_rows", &BnSlabPlan::kept_rows)
      .def_readonly("bytes", &BnSlabPlan::bytes);
  m.def("bn_slab_plan", &bn_slab_plan, py::arg("shape"), py::arg("max_blocks"), py::arg("element_bytes"),
        py::arg("arrays"), py::arg("room"));
  m.def("bn_slab_saves", &bn_slab_saves, py::arg("plan"));
  m.attr("BN_SLAB_STATIC") = kBnSlabStatic;
  m.def("bn_last_offset", &bn_last_offset, py::arg("shape"), py::arg("most"));

  py::class_<Device>(m, "Device", py::module_local())
      .def(py::init<int, int, int>(), py::arg("sm_count"), py::arg("shared_per_sm"), py::arg("shared_per_block"));
  m.def("bn_forward_launches", &forward_launches, py::arg("shape"), py::arg("device"), py::arg("resident"),
        py::arg("element_bytes"), py::arg("residual"));
  m.def("bn_backward_launches", &backward_launches, py::arg("shape"), py::arg("device"), py::arg("resident"),
        py::arg("element_bytes"), py::arg("residual"), py::arg("two"));
}

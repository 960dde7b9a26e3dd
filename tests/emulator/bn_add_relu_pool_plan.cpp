// bn_add_relu_pool for Python: the launches of its forward pass on a card.
#include "bn_plan.h"

#pragma GCC visibility push(default)  // see record.h
#include "bn_add_relu_pool_run.cuh"
#pragma GCC visibility pop

using namespace fasttricks;
using namespace fasttricks::cuda;

namespace {

std::vector<emu::Launch> forward_launches(const BnShape& s, int64_t height, int64_t width, bool ceil_mode,
                                          const Device& device, const emu::Resident& resident, int element_bytes) {
  return emu::record(resident, [&] {
    with_bytes(element_bytes, [&](auto t) {
      using T = decltype(t);
      using A = acc_t<T>;
      bn_stats_run<T>(somewhere<T>(), s, device, somewhere<A>(), somewhere<A>(), somewhere<A>(), nullptr);
      bn_apply_pool_run<T>(somewhere<T>(), somewhere<T>(), params<A>(), true, s, BnWindows(height, width, ceil_mode),
                           device, somewhere<T>(), somewhere<uint8_t>(), somewhere<T>(), nullptr);
    });
    bn_update_stats_run(BnUpdate{}, s.channels, nullptr);
  });
}

}  // namespace

EMU_BINDINGS(m) {
  m.def("bn_add_relu_pool_launches", &forward_launches, py::arg("shape"), py::arg("height"), py::arg("width"),
        py::arg("ceil_mode"), py::arg("device"), py::arg("resident"), py::arg("element_bytes"));
}

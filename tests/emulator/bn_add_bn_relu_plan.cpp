// bn_add_bn_relu for Python: its launches on a card.
#include "bn_plan.h"

#pragma GCC visibility push(default)  // see record.h
#include "bn_add_bn_relu_run.cuh"
#pragma GCC visibility pop

using namespace fasttricks;
using namespace fasttricks::cuda;

namespace {

std::vector<emu::Launch> forward_launches(const BnShape& s, const Device& device, const emu::Resident& resident,
                                          int element_bytes) {
  return emu::record(resident, [&] {
    with_bytes(element_bytes, [&](auto t) {
      using T = decltype(t);
      using A = acc_t<T>;
      const BnStatistics<A> statistics{somewhere<A>(), somewhere<A>(), somewhere<A>()};
      if (bn_add_bn_forward_slab_run<T>(somewhere<T>(), somewhere<T>(), params<A>(), params<A>(), s, device, statistics,
                                        statistics, somewhere<T>(), somewhere<uint8_t>(), nullptr))
        return;
      for (int of = 0; of < 2; ++of)
        bn_stats_run<T>(somewhere<T>(), s, device, somewhere<A>(), somewhere<A>(), somewhere<A>(), nullptr);
      bn_add_bn_apply_run<T>(somewhere<T>(), somewhere<T>(), params<A>(), params<A>(), true, s, device, somewhere<T>(),
                             somewhere<uint8_t>(), nullptr);
    });
    for (int of = 0; of < 2; ++of) bn_update_stats_run(BnUpdate{}, s.channels, nullptr);
  });
}

std::vector<emu::Launch> backward_launches(const BnShape& s, const Device& device, const emu::Resident& resident,
                                           int element_bytes, bool second) {
  return emu::record(resident, [&] {
    with_bytes(element_bytes, [&](auto t) {
      using T = decltype(t);
      using A = acc_t<T>;
      BnSecondGradient<T> extra;
      if (second) extra.data = somewhere<T>();
      bn_add_bn_backward_run<T>(somewhere<T>(), extra, somewhere<T>(), somewhere<T>(), somewhere<uint8_t>(),
                                params<A>(), params<A>(), 1, s, device, somewhere<A>(), somewhere<A>(), somewhere<A>(),
                                somewhere<A>(), somewhere<A>(), somewhere<T>(), somewhere<T>(), nullptr);
    });
  });
}

}  // namespace

EMU_BINDINGS(m) {
  m.def("bn_add_bn_relu_forward_launches", &forward_launches, py::arg("shape"), py::arg("device"), py::arg("resident"),
        py::arg("element_bytes"));
  m.def("bn_add_bn_relu_backward_launches", &backward_launches, py::arg("shape"), py::arg("device"),
        py::arg("resident"), py::arg("element_bytes"), py::arg("second"));
}

// The module, and its controls: tests set the schedule of the emulated kernels and read the bytes that they moved.
#include "record.h"

using namespace emu;

EMU_BINDINGS(m) {
  py::enum_<Order>(m, "Order", py::module_local())
      .value("ascending", Order::ascending)
      .value("descending", Order::descending)
      .value("random", Order::random);
  py::enum_<Landing>(m, "Landing", py::module_local()).value("late", Landing::late).value("early", Landing::early);
  m.def(
      "schedule",
      [](Order order, unsigned seed, bool poison, Landing landing) { world.options = {order, seed, poison, landing}; },
      py::arg("order"), py::arg("seed"), py::arg("poison"), py::arg("landing"));

  py::class_<Meter>(m, "Meter", py::module_local())
      .def_readonly("loaded", &Meter::loaded)
      .def_readonly("stored", &Meter::stored)
      .def_readonly("launches", &Meter::launches)
      .def_readonly("cooperative_launches", &Meter::cooperative_launches)
      .def_readonly("first_loaded", &Meter::first_loaded)
      .def_readonly("blocks", &Meter::blocks)
      .def_readonly("wavefronts", &Meter::wavefronts)
      .def_readonly("least_wavefronts", &Meter::least_wavefronts);
  m.def(
      "take_meter",
      [](bool count_conflicts) {
        world.count_conflicts = count_conflicts;
        return std::exchange(world.meter, {});
      },
      py::arg("count_conflicts"),
      "What was counted since the last call; whether bank conflicts are counted from here.");

  py::class_<Launch>(m, "Launch", py::module_local())
      .def_property_readonly("kernel", [](const Launch& l) { return kernel_name(l.kernel); })
      .def_property_readonly("grid", [](const Launch& l) { return std::tuple(l.grid.x, l.grid.y, l.grid.z); })
      .def_readonly("threads", &Launch::threads)
      .def_readonly("dynamic_bytes", &Launch::dynamic_bytes)
      .def_readonly("cooperative", &Launch::cooperative);

  m.def("refuse_cooperative", [](bool refuse) { world.refuse_cooperative = refuse; });
  m.def("shared_per_sm", [](int64_t bytes) { world.shared_per_sm = bytes; });
}

PYBIND11_MODULE(cuda_on_cpu, m) {
  for (Bind bind : bindings()) bind(m);
}

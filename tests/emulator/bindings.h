// One Python module for each library of the emulator: a source binds what it has with EMU_BINDINGS(m) { m.def(...); }.
// Types are local to their module, so that a process can load several of these libraries.
#pragma once

#include <cuda_runtime.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

namespace py = pybind11;

namespace emu {

using Bind = void (*)(py::module_&);
inline std::vector<Bind>& bindings() {
  static std::vector<Bind> of_all_sources;
  return of_all_sources;
}
struct Binding {
  explicit Binding(Bind bind) { bindings().push_back(bind); }
};

}  // namespace emu

#define EMU_BINDINGS(m)                                    \
  static void bind_this_file(py::module_& m);              \
  static const emu::Binding of_this_file(&bind_this_file); \
  static void bind_this_file(py::module_& m)

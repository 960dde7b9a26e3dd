// sgd for Python: csrc/cuda/sgd_plan.h, and the launches of sgd_check and sgd_step.
#include "record.h"

#pragma GCC visibility push(default)  // see record.h
#include "sgd_run.cuh"
#pragma GCC visibility pop

using namespace fasttricks;
using namespace fasttricks::cuda;

namespace {

constexpr int64_t kAddress = 1 << 12;  // of no tensor

// Tensors of these sizes, fp16 with fp32 masters, or fp32.
std::vector<SgdItem> items(const std::vector<int64_t>& numels, bool half) {
  void* const somewhere = reinterpret_cast<void*>(kAddress);
  const ElementType type = half ? ElementType::kHalf : ElementType::kFloat;
  std::vector<SgdItem> all;
  for (int64_t numel : numels)
    all.push_back({int64_t(all.size()),
                   numel,
                   0,
                   {somewhere, somewhere, half ? somewhere : nullptr, somewhere, somewhere},
                   type,
                   type});
  return all;
}

std::vector<emu::Launch> check_launches(const std::vector<int64_t>& numels, bool half) {
  return emu::record({}, [&] { sgd_check_run(items(numels, half), SgdHeader{}, nullptr, nullptr); });
}
std::vector<emu::Launch> step_launches(const std::vector<int64_t>& numels, bool half) {
  return emu::record({},
                     [&] { sgd_step_run(items(numels, half), std::vector<SgdGroup>(1), SgdHeader{}, true, nullptr); });
}

}  // namespace

EMU_BINDINGS(m) {
  m.attr("SGD_BLOCK") = kSgdBlock;
  m.attr("SGD_PIECE") = kSgdPiece;
  py::class_<SgdTensor>(m, "SgdTensor", py::module_local())
      .def(py::init<int64_t, int64_t>(), py::arg("numel"), py::arg("key"));
  py::class_<SgdEntry>(m, "SgdEntry", py::module_local())
      .def_readonly("tensor", &SgdEntry::tensor)
      .def_readonly("begin", &SgdEntry::begin)
      .def_readonly("count", &SgdEntry::count)
      .def_readonly("first_block", &SgdEntry::first_block)
      .def_readonly("last", &SgdEntry::last);
  py::class_<SgdLaunch>(m, "SgdLaunch", py::module_local())
      .def_readonly("entries", &SgdLaunch::entries)
      .def_readonly("group_starts", &SgdLaunch::group_starts)
      .def_readonly("blocks", &SgdLaunch::blocks)
      .def_readonly("bytes", &SgdLaunch::bytes);
  m.def("sgd_plan", &sgd_plan, py::arg("tensors"), py::arg("pointers"), py::arg("limit"));
  py::class_<SgdLayout>(m, "SgdLayout", py::module_local())
      .def_readonly("groups", &SgdLayout::groups)
      .def_readonly("pointers", &SgdLayout::pointers)
      .def_readonly("counts", &SgdLayout::counts)
      .def_readonly("first_blocks", &SgdLayout::first_blocks)
      .def_readonly("tensors", &SgdLayout::tensors)
      .def_readonly("bytes", &SgdLayout::bytes);
  m.def("sgd_layout", &sgd_layout, py::arg("entries"), py::arg("groups"), py::arg("pointers"));
  m.def(
      "sgd_find",
      [](const std::vector<int64_t>& firsts, int64_t at) {
        return sgd_find(firsts.data(), int64_t(firsts.size()), at);
      },
      py::arg("firsts"), py::arg("at"));

  m.def("sgd_check_launches", &check_launches, py::arg("numels"), py::arg("half"));
  m.def("sgd_step_launches", &step_launches, py::arg("numels"), py::arg("half"));
}

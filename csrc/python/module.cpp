// fpi_cuda._C: the objects that the loops keep between calls, as Python classes.
//
// One class a file, free of Python; what Python sees of it is written here and in fpi_cuda/_C.pyi.
// Tensors come as addresses and sizes, so that a build serves every torch; it serves one Python.
#include <pybind11/pybind11.h>

#include "interface.h"
#include "python/device_loop.h"
#include "python/host_steps.h"
#include "python/library.h"
#include "python/row_sizes.h"

namespace py = pybind11;

namespace {

using WithoutGil = py::call_guard<py::gil_scoped_release>;

template <class Object>
struct DeleteWithoutGil {
  void operator()(Object* object) const {
    const py::gil_scoped_release released;
    delete object;
  }
};

std::int64_t captured_nodes(std::uintptr_t stream) {
  std::int64_t count = -1;
  fpi::check(fpi::library().captured_nodes(reinterpret_cast<void*>(stream), &count));
  return count;
}

void restart_capture(std::uintptr_t stream) {
  fpi::check(fpi::library().restart_capture(reinterpret_cast<void*>(stream)));
}

// Numbers that a step reads and writes, from which on other threads may run meanwhile. Handing the
// GIL over and getting it back takes as long as a step on few of them.
constexpr std::int64_t kLong = 1 << 15;

std::int64_t host_step(fpi::HostSteps& steps, std::uintptr_t gx) {
  if (steps.size() < kLong) return steps.step(gx);
  const py::gil_scoped_release released;
  return steps.step(gx);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using fpi::DeviceLoop;

  m.attr("interface") = fpi::kInterface;
  m.def("open_library", &fpi::open_library, py::arg("path"));

  m.def("why_not", [] { return fpi::library().device_loop_unsupported(); }, WithoutGil());
  m.def(
      "node_refusal", [](int type) { return fpi::library().node_refusal(type); },
      py::arg("node_type"));
  m.def("captured_nodes", &captured_nodes, py::arg("stream"), WithoutGil());
  m.def("restart_capture", &restart_capture, py::arg("stream"), WithoutGil());

  m.def("row_sizes", &fpi::row_sizes, py::arg("rows"), py::arg("batch"), py::arg("dim"),
        py::arg("factor"), py::arg("scaled_norms"));

  // Local to this file: a second copy of it in a process has types of its own.
  py::class_<DeviceLoop, std::unique_ptr<DeviceLoop, DeleteWithoutGil<DeviceLoop>>>(
      m, "DeviceLoop", py::module_local())
      .def(py::init<std::uintptr_t, std::uintptr_t, std::int64_t, std::uintptr_t, std::int64_t>(),
           py::arg("graph"), py::arg("status"), py::arg("batch"), py::arg("rounds"),
           py::arg("max_steps"), WithoutGil())
      .def("launch", &DeviceLoop::launch, py::arg("stream"), WithoutGil())
      .def("close", &DeviceLoop::close, WithoutGil());

  using fpi::HostSolve;
  py::class_<HostSolve>(m, "HostSolve", py::module_local())
      .def(py::init([](bool broyden, int state, int history, std::int64_t batch, std::int64_t dim,
                       int depth, double rtol, std::int64_t max_steps, double beta, double ridge) {
             return HostSolve{broyden,
                              static_cast<fpi::StateType>(state),
                              static_cast<fpi::StateType>(history),
                              batch,
                              dim,
                              depth,
                              rtol,
                              max_steps,
                              beta,
                              ridge};
           }),
           py::arg("broyden"), py::arg("state"), py::arg("history"), py::arg("batch"),
           py::arg("dim"), py::arg("depth"), py::arg("rtol"), py::arg("max_steps"), py::arg("beta"),
           py::arg("ridge"))
      .def_property_readonly("size", [](const HostSolve& s) { return fpi::HostArrays(s).size; })
      .def_property_readonly("atol", [](const HostSolve& s) { return fpi::HostArrays(s).atol; });

  using fpi::HostSteps;
  py::class_<HostSteps>(m, "HostSteps", py::module_local())
      .def(py::init<const HostSolve&, std::uintptr_t, std::uintptr_t, std::uintptr_t,
                    std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, double>(),
           py::arg("solve"), py::arg("memory"), py::arg("x"), py::arg("best"), py::arg("status"),
           py::arg("num_steps"), py::arg("residual"), py::arg("atol"), py::arg("tolerance"))
      .def("step", &host_step, py::arg("gx"))
      .def("gather", &HostSteps::gather, py::arg("x"), py::arg("sample_of"));
}

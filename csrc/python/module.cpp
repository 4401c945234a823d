// fpi_cuda._C: the objects that the loops keep between calls, as Python classes.
//
// One class a file, free of Python; what Python sees of it is written here and in fpi_cuda/_C.pyi.
// Tensors come as addresses and sizes, so that a build serves every torch; it serves one Python.
#include <pybind11/pybind11.h>

#include <utility>

#include "interface.h"
#include "python/cell_plan.h"
#include "python/device_loop.h"
#include "python/host_steps.h"
#include "python/library.h"
#include "python/row_sizes.h"

namespace py = pybind11;

namespace {

using fpi::CellPlan;
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

// Tuples and integers, read without pybind11's casters: a call of a small solve is short.
std::int64_t integer(PyObject* object) {
  const std::int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

template <class T>
void address(PyObject* object, T** to) {
  *to = static_cast<T*>(PyLong_AsVoidPtr(object));
  if (!*to && PyErr_Occurred()) throw py::error_already_set();
}

// The items of a tuple with `least` to `most` of them.
std::pair<PyObject**, Py_ssize_t> items(py::handle object, const char* name, Py_ssize_t least,
                                        Py_ssize_t most) {
  if (!PyTuple_Check(object.ptr())) {
    throw py::type_error(std::string("cell plan: ") + name + " must be a tuple");
  }
  const Py_ssize_t size = PyTuple_GET_SIZE(object.ptr());
  if (size < least || size > most) {
    throw py::value_error(std::string("cell plan: ") + name + " has " + std::to_string(size) +
                          " items");
  }
  return {reinterpret_cast<PyTupleObject*>(object.ptr())->ob_item, size};
}

template <class T>
void addresses(py::handle object, const char* name, T* (&to)[2]) {
  const auto [item, size] = items(object, name, 1, 2);
  for (Py_ssize_t l = 0; l < size; ++l) address(item[l], &to[l]);
}

void read_layers(const CellPlan& plan, py::handle object, FpiCellLayer* layers) {
  const auto [layer, size] = items(object, "layers", plan.num_layers(), plan.num_layers());
  for (Py_ssize_t l = 0; l < size; ++l) {
    PyObject** part = items(layer[l], "a layer", 6, 6).first;
    address(part[0], &layers[l].weight);
    layers[l].output_stride = integer(part[1]);
    layers[l].input_stride = integer(part[2]);
    address(part[3], &layers[l].bias);
    address(part[4], &layers[l].shift);
    address(part[5], &layers[l].factor);
  }
}

CellPlan* make_plan(bool float64, std::int64_t dim, std::int64_t hidden,
                    std::pair<std::int64_t, std::int64_t> activations,
                    std::pair<std::int64_t, std::int64_t> derivatives, double carry,
                    std::int64_t depth, double beta, double ridge, double rtol, double atol,
                    std::int64_t max_steps, std::int64_t precision, std::int64_t adjoint_depth,
                    double adjoint_beta, double adjoint_ridge, double adjoint_rtol,
                    std::int64_t adjoint_max_steps) {
  return new CellPlan(
      {float64,
       dim,
       hidden,
       {activations.first, activations.second},
       {derivatives.first, derivatives.second},
       carry,
       precision,
       {depth, beta, ridge, rtol, atol, max_steps},
       {adjoint_depth, adjoint_beta, adjoint_ridge, adjoint_rtol, 0, adjoint_max_steps}});
}

int solve(const CellPlan& plan, std::int64_t batch, py::handle layers, py::handle x_factor,
          py::handle x, py::handle status, py::handle num_steps, py::handle residual,
          py::handle hidden, py::handle slopes) {
  FpiCellSolve call{};
  call.batch = batch;
  read_layers(plan, layers, call.layers);
  address(x_factor.ptr(), &call.x_factor);
  address(x.ptr(), &call.x);
  address(status.ptr(), &call.status);
  address(num_steps.ptr(), &call.num_steps);
  address(residual.ptr(), &call.residual);
  address(hidden.ptr(), &call.hidden);
  addresses(slopes, "slopes", call.slopes);
  const py::gil_scoped_release released;
  return plan.solve(call);
}

FpiCellGradients read_gradients(const CellPlan& plan, std::int64_t batch, py::handle layers,
                                py::handle x, py::handle hidden, py::handle slopes, py::handle c,
                                py::handle deltas, py::handle weight_gradients,
                                py::handle bias_gradients) {
  FpiCellGradients call{};
  call.batch = batch;
  read_layers(plan, layers, call.layers);
  address(x.ptr(), &call.x);
  address(hidden.ptr(), &call.hidden);
  addresses(slopes, "slopes", call.slopes);
  address(c.ptr(), &call.c);
  addresses(deltas, "deltas", call.deltas);
  addresses(weight_gradients, "weight_gradients", call.weights);
  addresses(bias_gradients, "bias_gradients", call.biases);
  return call;
}

int adjoint(const CellPlan& plan, std::int64_t batch, py::handle layers, py::handle x,
            py::handle hidden, py::handle slopes, py::handle v, py::handle c, py::handle status,
            py::handle num_steps, py::handle residual, py::handle deltas,
            py::handle weight_gradients, py::handle bias_gradients) {
  FpiCellAdjoint call{};
  call.gradients = read_gradients(plan, batch, layers, x, hidden, slopes, c, deltas,
                                  weight_gradients, bias_gradients);
  address(v.ptr(), &call.v);
  address(status.ptr(), &call.status);
  address(num_steps.ptr(), &call.num_steps);
  address(residual.ptr(), &call.residual);
  const py::gil_scoped_release released;
  return plan.adjoint(call);
}

void gradients(const CellPlan& plan, std::int64_t batch, py::handle layers, py::handle x,
               py::handle hidden, py::handle slopes, py::handle c, py::handle deltas,
               py::handle weight_gradients, py::handle bias_gradients) {
  const FpiCellGradients call = read_gradients(plan, batch, layers, x, hidden, slopes, c, deltas,
                                               weight_gradients, bias_gradients);
  const py::gil_scoped_release released;
  plan.gradients(call);
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

  py::class_<CellPlan, std::unique_ptr<CellPlan, DeleteWithoutGil<CellPlan>>>(m, "CellPlan",
                                                                              py::module_local())
      .def(py::init(&make_plan), py::kw_only(), py::arg("float64"), py::arg("dim"),
           py::arg("hidden"), py::arg("activations"), py::arg("derivatives"), py::arg("carry"),
           py::arg("depth"), py::arg("beta"), py::arg("ridge"), py::arg("rtol"), py::arg("atol"),
           py::arg("max_steps"), py::arg("precision"), py::arg("adjoint_depth"),
           py::arg("adjoint_beta"), py::arg("adjoint_ridge"), py::arg("adjoint_rtol"),
           py::arg("adjoint_max_steps"))
      .def("solve", &solve, py::arg("batch"), py::arg("layers"), py::arg("x_factor"), py::arg("x"),
           py::arg("status"), py::arg("num_steps"), py::arg("residual"), py::arg("hidden"),
           py::arg("slopes"))
      .def("adjoint", &adjoint, py::arg("batch"), py::arg("layers"), py::arg("x"),
           py::arg("hidden"), py::arg("slopes"), py::arg("v"), py::arg("c"), py::arg("status"),
           py::arg("num_steps"), py::arg("residual"), py::arg("deltas"),
           py::arg("weight_gradients"), py::arg("bias_gradients"))
      .def("gradients", &gradients, py::arg("batch"), py::arg("layers"), py::arg("x"),
           py::arg("hidden"), py::arg("slopes"), py::arg("c"), py::arg("deltas"),
           py::arg("weight_gradients"), py::arg("bias_gradients"))
      .def("bytes", &CellPlan::bytes, WithoutGil())
      .def("clear", &CellPlan::clear, WithoutGil());

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
      .def_property_readonly("size", [](const HostSolve& s) { return fpi::HostArrays(s).size; });

  using fpi::HostSteps;
  py::class_<HostSteps>(m, "HostSteps", py::module_local())
      .def(
          py::init<const HostSolve&, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t,
                   std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, double>(),
          py::arg("solve"), py::arg("memory"), py::arg("scalars"), py::arg("x"), py::arg("best"),
          py::arg("status"), py::arg("num_steps"), py::arg("residual"), py::arg("atol"),
          py::arg("tolerance"))
      .def("step", &host_step, py::arg("gx"))
      .def("gather", &HostSteps::gather, py::arg("x"), py::arg("sample_of"));
}

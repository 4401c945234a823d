// fpi_cuda._C: the objects that the loops keep between calls, as Python classes.
//
// One class a file, free of Python; what Python sees of it is written here and in fpi_cuda/_C.pyi.
// Tensors come as addresses and sizes, or are read by their Python attributes (tensors.h), so that a
// build serves every torch; it serves one Python.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "interface.h"
#include "python/cell_plan.h"
#include "python/device_loop.h"
#include "python/host_steps.h"
#include "python/library.h"
#include "python/row_sizes.h"
#include "python/tensors.h"

namespace py = pybind11;

namespace {

using fpi::CellPlan;
using fpi::TensorReader;
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

template <class T>
void address(py::handle tensor, T** to) {
  *to = static_cast<T*>(fpi::address_of(tensor.ptr()));
}

// The items of a tuple of so many.
PyObject** items(py::handle object, Py_ssize_t size) {
  if (!PyTuple_Check(object.ptr()) || PyTuple_GET_SIZE(object.ptr()) != size) {
    throw py::value_error("cell plan: a tuple of " + std::to_string(size) + " items is needed");
  }
  return reinterpret_cast<PyTupleObject*>(object.ptr())->ob_item;
}

template <class T>
void addresses(const CellPlan& plan, py::handle object, T* (&to)[2]) {
  PyObject** const item = items(object, plan.num_layers());
  for (int l = 0; l < plan.num_layers(); ++l) address(item[l], &to[l]);
}

const void* read_weight(const CellPlan& plan, PyObject* weight, int l, TensorReader& reader,
                        FpiCellLayer& layer) {
  std::int64_t* const strides[] = {&layer.output_stride, &layer.input_stride};
  return reader.read(weight, {plan.outputs(l), plan.inputs(l)}, strides);
}

// What solve() is told of the map.
void read_map(const CellPlan& plan, py::handle tensors, TensorReader& reader, FpiCellSolve& call) {
  PyObject** part = items(tensors, 4 * plan.num_layers() + 1);
  for (int l = 0; l < plan.num_layers(); ++l, part += 4) {
    FpiCellLayer& layer = call.layers[l];
    const std::int64_t outputs = plan.outputs(l);
    layer.weight = read_weight(plan, part[0], l, reader, layer);
    layer.bias = reader.read(part[1], {outputs});
    layer.shift = reader.read(part[2], {call.batch, outputs});
    layer.factor = reader.read(part[3], {call.batch, outputs});
  }
  call.x_factor = reader.read(part[0], {call.batch, plan.dim()});
}

// What a call returns that has done nothing, for a tensor is not as it has to be.
constexpr int kUnfit = -3;

// float64 numbers for each sample, that are rounded to where Python wants them.
class Residuals {
 public:
  Residuals(py::handle tensor, std::int64_t batch)
      : rounded_(!tensor.is_none() && fpi::is_float32(tensor.ptr())) {
    address(tensor, &to_);
    if (rounded_) numbers_.resize(batch);
  }
  double* data() { return rounded_ ? numbers_.data() : static_cast<double*>(to_); }
  void round() {
    if (rounded_) std::copy(numbers_.begin(), numbers_.end(), static_cast<float*>(to_));
  }

 private:
  const bool rounded_;
  void* to_;
  std::vector<double> numbers_;
};

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

bool fits(const CellPlan& plan, std::int64_t batch, py::handle tensors) {
  TensorReader reader(plan.float64());
  FpiCellSolve call{};
  call.batch = batch;
  read_map(plan, tensors, reader, call);
  return reader.fits();
}

int solve(const CellPlan& plan, std::int64_t batch, py::handle tensors, py::handle x0, py::handle x,
          py::handle status, py::handle num_steps, py::handle residual, py::handle hidden,
          py::handle slopes) {
  TensorReader reader(plan.float64());
  FpiCellSolve call{};
  call.batch = batch;
  read_map(plan, tensors, reader, call);
  const void* const start = reader.read(x0.ptr(), {batch, plan.dim()});
  if (!reader.fits() || (batch && !start)) return kUnfit;
  address(x, &call.x);
  address(status, &call.status);
  address(num_steps, &call.num_steps);
  Residuals residuals(residual, batch);
  call.residual = residuals.data();
  address(hidden, &call.hidden);
  addresses(plan, slopes, call.slopes);
  const py::gil_scoped_release released;
  if (batch && call.x) std::memcpy(call.x, start, batch * plan.dim() * (plan.float64() ? 8 : 4));
  const int worst = plan.solve(call);
  residuals.round();
  return worst;
}

void read_gradients(const CellPlan& plan, std::int64_t batch, py::handle weights, py::handle x,
                    py::handle hidden, py::handle slopes, py::handle deltas,
                    py::handle weight_gradients, TensorReader& reader, FpiCellGradients& call) {
  call.batch = batch;
  PyObject** const weight = items(weights, plan.num_layers());
  for (int l = 0; l < plan.num_layers(); ++l) {
    call.layers[l].weight = read_weight(plan, weight[l], l, reader, call.layers[l]);
  }
  address(x, &call.x);
  address(hidden, &call.hidden);
  addresses(plan, slopes, call.slopes);
  addresses(plan, deltas, call.deltas);
  addresses(plan, weight_gradients, call.weights);
}

int adjoint(const CellPlan& plan, std::int64_t batch, py::handle weights, py::handle x,
            py::handle hidden, py::handle slopes, py::handle v, py::handle c, py::handle status,
            py::handle num_steps, py::handle residual, py::handle deltas,
            py::handle weight_gradients) {
  TensorReader reader(plan.float64());
  FpiCellAdjoint call{};
  FpiCellGradients& gradients = call.gradients;
  read_gradients(plan, batch, weights, x, hidden, slopes, deltas, weight_gradients, reader,
                 gradients);
  call.v = reader.read(v.ptr(), {batch, plan.dim()});
  if (!reader.fits()) return kUnfit;
  address(c, &gradients.c);
  address(status, &call.status);
  address(num_steps, &call.num_steps);
  Residuals residuals(residual, batch);
  call.residual = residuals.data();
  const py::gil_scoped_release released;
  const int worst = plan.adjoint(call);
  if (worst >= 0) residuals.round();
  return worst;
}

int gradients(const CellPlan& plan, std::int64_t batch, py::handle weights, py::handle x,
              py::handle hidden, py::handle slopes, py::handle c, py::handle deltas,
              py::handle weight_gradients) {
  TensorReader reader(plan.float64());
  FpiCellGradients call{};
  read_gradients(plan, batch, weights, x, hidden, slopes, deltas, weight_gradients, reader, call);
  // Read alone.
  call.c = const_cast<void*>(reader.read(c.ptr(), {batch, plan.dim()}));
  if (!reader.fits()) return kUnfit;
  const py::gil_scoped_release released;
  plan.gradients(call);
  return 0;
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
  m.def("newest_version", &fpi::newest_version, py::arg("types"));

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
      .def("fits", &fits, py::arg("batch"), py::arg("tensors"))
      .def("solve", &solve, py::arg("batch"), py::arg("tensors"), py::arg("x0"), py::arg("x"),
           py::arg("status"), py::arg("num_steps"), py::arg("residual"), py::arg("hidden"),
           py::arg("slopes"))
      .def("adjoint", &adjoint, py::arg("batch"), py::arg("weights"), py::arg("x"),
           py::arg("hidden"), py::arg("slopes"), py::arg("v"), py::arg("c"), py::arg("status"),
           py::arg("num_steps"), py::arg("residual"), py::arg("deltas"),
           py::arg("weight_gradients"))
      .def("gradients", &gradients, py::arg("batch"), py::arg("weights"), py::arg("x"),
           py::arg("hidden"), py::arg("slopes"), py::arg("c"), py::arg("deltas"),
           py::arg("weight_gradients"))
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

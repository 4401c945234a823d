#include "python/tensors.h"

#include <algorithm>

namespace py = pybind11;

namespace fpi {
namespace {

// Never freed: the interpreter may be gone when this file is.
struct Torch {
  PyObject* tensor = of_torch("Tensor");
  PyObject* parameter =
      py::module_::import("torch.nn").attr("Parameter").cast<py::object>().release().ptr();
  PyObject* float32 = of_torch("float32");
  PyObject* float64 = of_torch("float64");
  PyObject* strided = of_torch("strided");

  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* layout = PyUnicode_InternFromString("layout");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
  PyObject* contiguous = PyUnicode_InternFromString("contiguous");
  PyObject* resolve_neg = PyUnicode_InternFromString("resolve_neg");
  PyObject* detach = PyUnicode_InternFromString("detach");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");

  static PyObject* of_torch(const char* name) {
    return py::module_::import("torch").attr(name).cast<py::object>().release().ptr();
  }
};

const Torch& torch() {
  static const Torch names;
  return names;
}

py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object get(PyObject* object, PyObject* name) { return checked(PyObject_GetAttr(object, name)); }

py::object call(PyObject* object, PyObject* name) {
  return checked(PyObject_CallMethodNoArgs(object, name));
}

bool has(PyObject* object, PyObject* name, PyObject* value) {
  return get(object, name).ptr() == value;
}

bool says(PyObject* object, PyObject* method) { return call(object, method).ptr() == Py_True; }

std::int64_t item(const py::object& tuple, std::size_t place) {
  return PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), place));
}

}  // namespace

const void* TensorReader::read(PyObject* tensor, std::initializer_list<std::int64_t> shape,
                               std::int64_t* const* strides) {
  if (tensor == Py_None || !fits_) return nullptr;
  try {
    const Torch& t = torch();
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    fits_ = (type == t.tensor || type == t.parameter) &&
            has(tensor, t.dtype, float64_ ? t.float64 : t.float32) &&
            has(tensor, t.is_cpu, Py_True) && has(tensor, t.layout, t.strided);
    if (!fits_) return nullptr;
    // What holds this memory while Python runs on: .data of a parameter may be exchanged.
    held_.push_back(call(tensor, t.detach));
    tensor = held_.back().ptr();
    const py::object found = get(tensor, t.shape);
    fits_ = PyTuple_GET_SIZE(found.ptr()) == static_cast<Py_ssize_t>(shape.size());
    std::int64_t size = 1;
    for (std::size_t d = 0; fits_ && d < shape.size(); ++d) {
      fits_ = item(found, d) == shape.begin()[d];
      size *= shape.begin()[d];
    }
    if (!fits_) return nullptr;
    if (!(strides || says(tensor, t.is_contiguous)) || says(tensor, t.is_neg)) {
      held_.push_back(call(call(tensor, t.contiguous).ptr(), t.resolve_neg));
      tensor = held_.back().ptr();
    }
    if (strides) {
      const py::object steps = call(tensor, t.stride);
      for (std::size_t d = 0; d < shape.size(); ++d) *strides[d] = item(steps, d);
    }
    const void* const address = address_of(tensor);
    fits_ = address || !size;
    return address;
  } catch (const py::error_already_set&) {
    fits_ = false;  // a tensor that holds no numbers of its own
    return nullptr;
  }
}

void* address_of(PyObject* tensor) {
  if (tensor == Py_None) return nullptr;
  void* const address = PyLong_AsVoidPtr(call(tensor, torch().data_ptr).ptr());
  if (!address && PyErr_Occurred()) throw py::error_already_set();
  return address;
}

bool is_float32(PyObject* tensor) { return has(tensor, torch().dtype, torch().float32); }

std::int64_t newest_version(py::tuple types) {
  std::int64_t newest = 0;
  for (py::handle type : types) {
    const auto* of = reinterpret_cast<const PyTypeObject*>(type.ptr());
#if PY_VERSION_HEX < 0x030D0000
    if (!PyType_HasFeature(const_cast<PyTypeObject*>(of), Py_TPFLAGS_VALID_VERSION_TAG)) return 0;
#endif
    const std::int64_t version = of->tp_version_tag;
    if (!version) return 0;
    newest = std::max(newest, version);
  }
  return newest;
}

}  // namespace fpi

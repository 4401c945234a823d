// Tensors, by what Python sees of them: a build serves every torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

namespace fpi {

// Checks the tensors of a call, tells where their numbers lie, and holds that memory.
//
// float64: their dtype, else float32. They lie on the CPU, and are of no subclass.
class TensorReader {
 public:
  explicit TensorReader(bool float64) : float64_(float64) {}

  // The address of a tensor of this shape, null for None. Where `strides` has no place for those of
  // its dimensions, and it is not contiguous, the address of a copy.
  const void* read(PyObject* tensor, std::initializer_list<std::int64_t> shape,
                   std::int64_t* const* strides = nullptr);

  // Whether all that was read is as it has to be.
  bool fits() const { return fits_; }

 private:
  const bool float64_;
  bool fits_ = true;
  std::vector<pybind11::object> held_;
};

// The address of a tensor that this package has made for a call; null for None.
void* address_of(PyObject* tensor);

// Whether a tensor that this package has made is of float32.
bool is_float32(PyObject* tensor);

// The highest of the numbers that Python gives classes, a new one after each change of a class or
// of one above it; 0 where a class has none.
std::int64_t newest_version(pybind11::tuple types);

}  // namespace fpi

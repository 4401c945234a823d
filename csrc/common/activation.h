// The activations that a lowered cell may name. The order is that of fpi_cuda.elementwise.FUNCTIONS.
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"

// A header named at build time (see setup.py) may bring more: templates `T name(T u)` marked
// FPI_HD, and FPI_ADDED_ACTIVATIONS(add), which is add(name) for each of them.
#ifdef FPI_ACTIVATIONS
namespace fpi::added {
#include FPI_ACTIVATIONS
}
#else
#define FPI_ADDED_ACTIVATIONS(add)
#endif

namespace fpi {

enum class Activation : int64_t {
  kIdentity,
  kTanh,
  kRelu,
  kSigmoid,
  kGelu,
  kSoftplus,
  kTanhDerivative,
  kReluDerivative,
  kSigmoidDerivative,
  kGeluDerivative,
  kOne,  // the derivative of the identity
#define FPI_ENUMERATOR(name) kAdded_##name,
  FPI_ADDED_ACTIVATIONS(FPI_ENUMERATOR)
#undef FPI_ENUMERATOR
};
#define FPI_ONE_MORE(name) +1
constexpr int64_t kActivations = 11 FPI_ADDED_ACTIVATIONS(FPI_ONE_MORE);
#undef FPI_ONE_MORE

}  // namespace fpi

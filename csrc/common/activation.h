// The activations that a lowered cell may name. The order is that of fpi_cuda.activations.FUNCTIONS.
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"

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
};
constexpr int64_t kActivations = static_cast<int64_t>(Activation::kOne) + 1;

}  // namespace fpi

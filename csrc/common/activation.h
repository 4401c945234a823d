// The activations that a lowered cell may name. The order is that of fpi_cuda.elementwise.FUNCTIONS.
#pragma once

#include <cstdint>

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
constexpr int64_t kActivations = 11;

}  // namespace fpi

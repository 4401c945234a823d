// The activations of a lowered cell, of one number. Nothing overflows, and NaN stays NaN.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "../common/activation.h"

namespace fpi {

template <class T>
__device__ __forceinline__ T exp_minus(T magnitude) {
  return static_cast<T>(exp(-magnitude));
}

template <class T>
__device__ __forceinline__ T magnitude(T u) {
  return u < T(0) ? -u : u;
}

template <class T>
__device__ __forceinline__ T sigmoid_of(T u) {
  const T t = exp_minus(magnitude(u));
  return (u < T(0) ? t : T(1)) / (T(1) + t);
}

template <class T>
__device__ __forceinline__ T softplus_of(T u) {
  const T value = (u < T(0) ? T(0) : u) + static_cast<T>(log1p(exp_minus(magnitude(u))));
  return u > T(20) ? u : value;  // as torch has it
}

template <class T>
__device__ __forceinline__ T gelu_of(T u) {
  return T(0.5) * u * (T(1) + static_cast<T>(erf(u * T(0.70710678118654752))));
}

template <class T>
__device__ __forceinline__ T gelu_derivative(T u) {
  const T density = exp_minus(T(0.5) * u * u) * T(0.3989422804014327);
  return T(0.5) * static_cast<T>(erfc(u * T(-0.70710678118654752))) + u * density;
}

// Out of line: one copy for all kernels, so that all of them round alike.
template <class T>
__device__ __noinline__ T activate(Activation activation, T u) {
  switch (activation) {
    case Activation::kIdentity: return u;
    case Activation::kTanh: return static_cast<T>(tanh(u));
    case Activation::kRelu: return u < T(0) ? T(0) : u;
    case Activation::kSigmoid: return sigmoid_of(u);
    case Activation::kGelu: return gelu_of(u);
    case Activation::kSoftplus: return softplus_of(u);
    case Activation::kTanhDerivative: {
      const T t = static_cast<T>(tanh(u));
      return T(1) - t * t;
    }
    case Activation::kReluDerivative: return u > T(0) ? T(1) : T(0);
    case Activation::kSigmoidDerivative: {
      const T t = exp_minus(magnitude(u));
      return t / ((T(1) + t) * (T(1) + t));
    }
    case Activation::kGeluDerivative: return gelu_derivative(u);
    case Activation::kOne: break;
  }
  return T(1);
}

}  // namespace fpi

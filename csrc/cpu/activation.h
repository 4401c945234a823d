// Activations over an array, in loops that the compiler turns into vector instructions. All come
// from the exponential of a number that is not positive.
#pragma once

#include <cstdint>

#include "../common/activation.h"
#include "exponential.h"
#include "normal.h"

namespace fpi {

// The series of 2 artanh(s) / s in s^2, s <= 1/3.
template <class T, int K>
FPI_INLINE T artanh_series(T square) {
  constexpr T kTerm = T(2) / T(2 * K + 1);
  if constexpr (K == (sizeof(T) == 4 ? 8 : 17))
    return kTerm;
  else
    return kTerm + square * artanh_series<T, K + 1>(square);
}

template <class T>
FPI_INLINE T tanh_of(T u) {
  const Exponential<T> e = exponential(T(-2) * magnitude(u));
  const T expm1 = e.power * e.q + (e.power - T(1));
  return with_sign_of(u, expm1 / (T(2) + expm1));
}

template <class T>
FPI_INLINE T sigmoid_of(T u) {
  const T t = exp_minus(magnitude(u));
  return (u < T(0) ? t : T(1)) / (T(1) + t);
}

// log(1 + exp(u)) = max(u, 0) + log1p(t), and log1p(t) = 2 artanh(t / (2 + t)) by its series.
template <class T>
FPI_INLINE T softplus_of(T u) {
  const T t = exp_minus(magnitude(u));
  const T s = t / (T(2) + t);
  const T value = (u < T(0) ? T(0) : u) + s * artanh_series<T, 0>(s * s);
  return u > T(20) ? u : value;  // as torch has it
}

template <class T>
FPI_INLINE T gelu_of(T u) {
  return u * normal(u).distribution;
}

template <class T>
FPI_INLINE T gelu_derivative(T u) {
  const Normal<T> at = normal(u);
  return at.distribution + at.moment;
}

template <class T, class Function>
FPI_INLINE void map_in_place(T* u, int64_t n, Function&& f) {
  for (int64_t j = 0; j < n; ++j) u[j] = f(u[j]);
}

// u[j] = activation(u[j]); NaN stays NaN.
template <class T>
FPI_INLINE void activate(Activation activation, T* u, int64_t n) {
  switch (activation) {
    case Activation::kIdentity: return;
    case Activation::kTanh: return map_in_place(u, n, [](T v) { return tanh_of(v); });
    case Activation::kRelu: return map_in_place(u, n, [](T v) { return v < T(0) ? T(0) : v; });
    case Activation::kSigmoid: return map_in_place(u, n, [](T v) { return sigmoid_of(v); });
    case Activation::kGelu: return map_in_place(u, n, [](T v) { return gelu_of(v); });
    case Activation::kSoftplus: return map_in_place(u, n, [](T v) { return softplus_of(v); });
    case Activation::kTanhDerivative:
      return map_in_place(u, n, [](T v) {
        const T t = tanh_of(v);
        return T(1) - t * t;
      });
    case Activation::kReluDerivative:
      return map_in_place(u, n, [](T v) { return v > T(0) ? T(1) : T(0); });
    case Activation::kSigmoidDerivative:
      return map_in_place(u, n, [](T v) {
        const T t = exp_minus(magnitude(v));
        return t / ((T(1) + t) * (T(1) + t));
      });
    case Activation::kGeluDerivative:
      return map_in_place(u, n, [](T v) { return gelu_derivative(v); });
    case Activation::kOne: return map_in_place(u, n, [](T) { return T(1); });
  }
}

}  // namespace fpi

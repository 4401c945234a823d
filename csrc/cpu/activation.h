// Activations over an array, in loops that the compiler turns into vector instructions. All come
// from expm1 of a number that is not positive, so nothing overflows and nothing cancels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/activation.h"
#include "numeric.h"

namespace fpi {

template <class T>
struct ExponentialTraits;
template <>
struct ExponentialTraits<float> {
  using Bits = uint32_t;
  static constexpr float kRounder = 12582912.0f;       // 1.5 * 2^23: adding it rounds to integers
  static constexpr float kLn2High = 0.693359375f;      // 9 bits: n times it is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kLeast = -87.0f;              // exp of it is still a normal number
  static constexpr int kBias = 127, kMantissa = 23, kTerms = 7, kLogTerms = 8;
};
template <>
struct ExponentialTraits<double> {
  using Bits = uint64_t;
  static constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 0.693147180369123816490;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kLeast = -708.0;
  static constexpr int kBias = 1023, kMantissa = 52, kTerms = 13, kLogTerms = 17;
};

template <class T>
constexpr T inverse_factorial(int k) {
  double product = 1.0;
  for (int i = 2; i <= k; ++i) product *= i;
  return static_cast<T>(1.0 / product);
}

// The Taylor series of expm1(r) / r: the first term left out is below the rounding of the dtype.
template <class T, int K>
FPI_INLINE T expm1_series(T r) {
  if constexpr (K == ExponentialTraits<T>::kTerms) return inverse_factorial<T>(K);
  else return inverse_factorial<T>(K) + r * expm1_series<T, K + 1>(r);
}

// The series of 2 artanh(s) / s in s^2.
template <class T, int K>
FPI_INLINE T artanh_series(T square) {
  constexpr T kTerm = T(2) / T(2 * K + 1);
  if constexpr (K == ExponentialTraits<T>::kLogTerms) return kTerm;
  else return kTerm + square * artanh_series<T, K + 1>(square);
}

// exp(y) = 2^n (1 + q) with q = expm1(r), y = n ln 2 + r, |r| <= ln(2) / 2.
template <class T>
struct Exponential {
  T power;  // 2^n
  T q;
};

// For y <= 0 or NaN.
template <class T>
FPI_INLINE Exponential<T> exponential(T y) {
  using Traits = ExponentialTraits<T>;
  using Bits = typename Traits::Bits;
  const T clamped = y < Traits::kLeast ? Traits::kLeast : y;
  const T shifted = clamped * T(1.4426950408889634) + Traits::kRounder;
  const T n = shifted - Traits::kRounder;
  const T r = (clamped - n * Traits::kLn2High) - n * Traits::kLn2Low;
  // The low bits of `shifted` are n.
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + Traits::kBias) << Traits::kMantissa;
  Exponential<T> out;
  std::memcpy(&out.power, &bits, sizeof bits);
  // Where y is NaN the power is garbage, and what it is multiplied with is NaN.
  out.q = r * expm1_series<T, 1>(r);
  return out;
}

template <class T>
FPI_INLINE T exp_minus(T magnitude) {
  const Exponential<T> e = exponential(-magnitude);
  return e.power + e.power * e.q;
}

template <class T>
FPI_INLINE T magnitude(T u) {
  return u < T(0) ? -u : u;
}

template <class T>
FPI_INLINE T tanh_of(T u) {
  const Exponential<T> e = exponential(T(-2) * magnitude(u));
  const T expm1 = e.power * e.q + (e.power - T(1));
  const T positive = -expm1 / (T(2) + expm1);
  return u < T(0) ? -positive : positive;
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
  return T(0.5) * u * (T(1) + std::erf(u * T(0.70710678118654752)));
}

template <class T>
FPI_INLINE T gelu_derivative(T u) {
  const T density = exp_minus(T(0.5) * u * u) * T(0.3989422804014327);
  return T(0.5) * std::erfc(u * T(-0.70710678118654752)) + u * density;
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

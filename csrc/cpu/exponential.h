// exp of a number that is not positive, in code that the compiler turns into vector instructions:
// nothing overflows and nothing cancels.
#pragma once

#include <cstdint>
#include <cstring>

#include "numeric.h"

namespace fpi {

template <class T>
struct ExponentialTraits;
template <>
struct ExponentialTraits<float> {
  using Bits = uint32_t;
  static constexpr float kRounder = 12582912.0f;   // 1.5 * 2^23: adding it rounds to integers
  static constexpr float kLn2High = 0.693359375f;  // 9 bits: n times it is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kLeast = -87.0f;  // exp of it is still a normal number
  static constexpr int kBias = 127, kMantissa = 23, kTerms = 7;
};
template <>
struct ExponentialTraits<double> {
  using Bits = uint64_t;
  static constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 0.693147180369123816490;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kLeast = -708.0;
  static constexpr int kBias = 1023, kMantissa = 52, kTerms = 13;
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
  if constexpr (K == ExponentialTraits<T>::kTerms)
    return inverse_factorial<T>(K);
  else
    return inverse_factorial<T>(K) + r * expm1_series<T, K + 1>(r);
}

// exp(y) = 2^n (1 + q) with q = expm1(r), y = n ln 2 + r, |r| <= ln(2) / 2.
template <class T>
struct Exponential {
  T power;  // 2^n
  T q;
};

// Of y + low for y <= 0 or NaN, where low is what y was rounded by, if that is known.
template <class T>
FPI_INLINE Exponential<T> exponential(T y, T low = T(0)) {
  using Traits = ExponentialTraits<T>;
  using Bits = typename Traits::Bits;
  const T clamped = y < Traits::kLeast ? Traits::kLeast : y;
  const T shifted = clamped * T(1.4426950408889634) + Traits::kRounder;
  const T n = shifted - Traits::kRounder;
  const T r = (clamped - n * Traits::kLn2High) - (n * Traits::kLn2Low - low);
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

// By its bits, for a choice between u and -u is three instructions. NaN stays NaN.
template <class T>
FPI_INLINE T magnitude(T u) {
  using Bits = typename ExponentialTraits<T>::Bits;
  Bits bits;
  std::memcpy(&bits, &u, sizeof bits);
  bits &= ~(Bits(1) << (8 * sizeof(Bits) - 1));
  std::memcpy(&u, &bits, sizeof bits);
  return u;
}

// The magnitude of value with the sign of u.
template <class T>
FPI_INLINE T with_sign_of(T u, T value) {
  using Bits = typename ExponentialTraits<T>::Bits;
  constexpr Bits kSign = Bits(1) << (8 * sizeof(Bits) - 1);
  Bits sign, bits;
  std::memcpy(&sign, &u, sizeof sign);
  std::memcpy(&bits, &value, sizeof bits);
  bits = (sign & kSign) | (bits & ~kSign);
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

}  // namespace fpi

// The standard normal distribution, in code that the compiler turns into vector instructions.
#pragma once

#include <cstdint>
#include <cstring>

#include "exponential.h"

namespace fpi {

// (w + 1) Mills(w) as a polynomial in t = (w - 4) / (w + 4), lowest power first, with Mills(w) =
// Phi(-w) exp(w^2 / 2): interpolated at 80 Chebyshev nodes from w = 0 to kWidest in 40 digits and
// cut where the error, 1.3 epsilon, is that of the arithmetic.
// Source: the variable is that of Shepherd and Laframboise, Math. Comp. 36 (1981), 249-253, who
// so expand (1 + 2 x) exp(x^2) erfc(x).
template <class T>
struct MillsTraits;
template <>
struct MillsTraits<float> {
  using Bits = uint32_t;
  static constexpr Bits kUpperHalf = 0xfffff000u;  // 12 bits of the mantissa: squares are exact
  static constexpr float kWidest = 13.19f;         // exp(-w^2 / 2) is still a normal number
  static constexpr int kDegree = 9;
  static constexpr float kPolynomial[] = {
      0.4720532167f,  -0.09670346011f,  0.01399867776f,    0.02859936889f,   -0.03218383038f,
      0.01795365124f, -0.005066086026f, -0.0003911717636f, 0.0007628880532f, 0.00010646885f};
};
template <>
struct MillsTraits<double> {
  using Bits = uint64_t;
  static constexpr Bits kUpperHalf = 0xfffffffff8000000u;  // 26 bits
  static constexpr double kWidest = 37.62;
  static constexpr int kDegree = 22;
  static constexpr double kPolynomial[] = {
      0.472053206509844667,      -0.0967034773265254426,    0.0139996347244292308,
      0.0286003640535112621,     -0.0321978374282986715,    0.0179360974809114963,
      -0.00500237858631044486,   -0.000285623115470361585,  0.000694897049514070689,
      -0.0000944301205392673228, -0.0000878528041054173268, 0.0000212494558641017935,
      0.0000136252174234549987,  -3.43062801384758899e-6,   -2.60824731019132976e-6,
      4.02154071856164525e-7,    5.43500031789108448e-7,    2.83698103048239757e-9,
      -1.01328203075594774e-7,   -1.89674354512342495e-8,   1.14024910234846039e-8,
      4.39013523171239492e-9,    2.03984158001270043e-10};
};

template <class T, int K>
FPI_INLINE T mills_polynomial(T t) {
  constexpr T kTerm = MillsTraits<T>::kPolynomial[K];
  if constexpr (K == MillsTraits<T>::kDegree)
    return kTerm;
  else
    return kTerm + t * mills_polynomial<T, K + 1>(t);
}

template <class T>
struct Normal {
  T distribution;  // Phi(u)
  T moment;        // u times the density at u
};

template <class T>
FPI_INLINE Normal<T> normal(T u) {
  using Traits = MillsTraits<T>;
  const T size = u < T(0) ? -u : u;
  const T w = size > Traits::kWidest ? Traits::kWidest : size;
  typename Traits::Bits bits;
  std::memcpy(&bits, &w, sizeof bits);
  bits &= Traits::kUpperHalf;
  T upper;
  std::memcpy(&upper, &bits, sizeof upper);
  // The rounding of w^2 counts: the exponential makes an absolute error a relative one.
  const T square = w * w;
  const T rest = (upper * upper - square) + (w - upper) * (w + upper);
  const Exponential<T> e = exponential(T(-0.5) * square, T(-0.5) * rest);
  // Zero where it is no normal number: what multiplies it may be huge.
  const T power = size > Traits::kWidest ? T(0) : e.power + e.power * e.q;
  const T tail = mills_polynomial<T, 0>((w - T(4)) / (w + T(4))) / (w + T(1)) * power;
  const T moment = w * power * T(0.39894228040143268);
  return {u < T(0) ? tail : T(1) - tail, u < T(0) ? -moment : moment};
}

}  // namespace fpi

// Sums over short runs: sixteen lanes in vector registers, in an order that depends on the length
// alone.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "numeric.h"

namespace fpi {

constexpr int kLanes = 16;

// The compiler splits these where the machine's registers are narrower.
template <class T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(kLanes * sizeof(T))));
  typedef T Half __attribute__((vector_size(kLanes / 2 * sizeof(T))));
  typedef T Quarter __attribute__((vector_size(kLanes / 4 * sizeof(T))));
};

template <class Acc, class A>
FPI_INLINE void load(const A* from, typename Lanes<Acc>::Vector& to) {
  if constexpr (std::is_same_v<Acc, A>) {
    std::memcpy(&to, from, sizeof to);
  } else if constexpr (std::is_arithmetic_v<A>) {
    typename Lanes<A>::Vector narrow;
    std::memcpy(&narrow, from, sizeof narrow);
    to = __builtin_convertvector(narrow, typename Lanes<Acc>::Vector);
  } else {
    Acc wide[kLanes];
    for (int l = 0; l < kLanes; ++l) wide[l] = static_cast<Acc>(from[l]);
    std::memcpy(&to, wide, sizeof to);
  }
}

// The lanes past a run's end are zero: they add nothing to a sum of products.
template <class Acc, class A>
FPI_INLINE void load_some(const A* from, int n, typename Lanes<Acc>::Vector& to) {
  Acc wide[kLanes] = {};
  if constexpr (std::is_same_v<Acc, A>) {
    // Pieces of fixed sizes, for a copy of n elements is a call.
    int l = 0;
    if (n & 8) {
      std::memcpy(wide, from, 8 * sizeof(A));
      l = 8;
    }
    if (n & 4) {
      std::memcpy(wide + l, from + l, 4 * sizeof(A));
      l += 4;
    }
    if (n & 2) {
      std::memcpy(wide + l, from + l, 2 * sizeof(A));
      l += 2;
    }
    if (n & 1) wide[l] = from[l];
  } else {
    for (int l = 0; l < n; ++l) wide[l] = static_cast<Acc>(from[l]);
  }
  std::memcpy(&to, wide, sizeof to);
}

// For runs so short that a call to memcpy would cost more than the copy.
template <class A>
FPI_INLINE void copy_run(const A* from, int64_t n, A* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) std::memcpy(to + i, from + i, kLanes * sizeof(A));
  for (; i < n; ++i) to[i] = from[i];
}

template <class Acc>
FPI_INLINE double sum_lanes(const typename Lanes<Acc>::Vector& lanes) {
  typename Lanes<Acc>::Half half[2];
  std::memcpy(half, &lanes, sizeof lanes);
  half[0] += half[1];
  typename Lanes<Acc>::Quarter quarter[2];
  std::memcpy(quarter, half, sizeof half[0]);
  quarter[0] += quarter[1];
  return static_cast<double>((quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]));
}

template <class Acc, class A, class B>
FPI_INLINE double dot(const A* a, const B* b, int n) {
  typename Lanes<Acc>::Vector sum = {}, left, right;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    load<Acc>(a + i, left);
    load<Acc>(b + i, right);
    sum += left * right;
  }
  if (i < n) {
    load_some<Acc>(a + i, n - i, left);
    load_some<Acc>(b + i, n - i, right);
    sum += left * right;
  }
  return sum_lanes<Acc>(sum);
}

// <a, column> and <b, column> in one reading of the column.
template <class Acc, class C, class H>
FPI_INLINE void dot2(const C* a, const C* b, const H* column, int n, double& with_a,
                     double& with_b) {
  typename Lanes<Acc>::Vector sum_a = {}, sum_b = {}, left, right;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    load<Acc>(column + i, right);
    load<Acc>(a + i, left);
    sum_a += left * right;
    load<Acc>(b + i, left);
    sum_b += left * right;
  }
  if (i < n) {
    load_some<Acc>(column + i, n - i, right);
    load_some<Acc>(a + i, n - i, left);
    sum_a += left * right;
    load_some<Acc>(b + i, n - i, left);
    sum_b += left * right;
  }
  with_a += sum_lanes<Acc>(sum_a);
  with_b += sum_lanes<Acc>(sum_b);
}

}  // namespace fpi

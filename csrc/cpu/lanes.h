// Sums over short runs: sixteen lanes that the compiler turns into vector registers, in an order
// that depends on the length alone.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace fpi {

constexpr int kLanes = 16;

template <class Acc>
FPI_INLINE double sum_lanes(Acc (&lane)[kLanes]) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
  }
  return static_cast<double>(lane[0]);
}

template <class Acc, class A, class B>
FPI_INLINE double dot(const A* a, const B* b, int n) {
  Acc lane[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      lane[l] += static_cast<Acc>(a[i + l]) * static_cast<Acc>(b[i + l]);
    }
  }
  for (int l = 0; i + l < n; ++l) {
    lane[l] += static_cast<Acc>(a[i + l]) * static_cast<Acc>(b[i + l]);
  }
  return sum_lanes(lane);
}

// <a, column> and <b, column> in one reading of the column.
template <class Acc, class C, class H>
FPI_INLINE void dot2(const C* a, const C* b, const H* column, int n, double& with_a,
                     double& with_b) {
  Acc lane_a[kLanes] = {};
  Acc lane_b[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const Acc h = static_cast<Acc>(static_cast<C>(column[i + l]));
      lane_a[l] += static_cast<Acc>(a[i + l]) * h;
      lane_b[l] += static_cast<Acc>(b[i + l]) * h;
    }
  }
  for (int l = 0; i + l < n; ++l) {
    const Acc h = static_cast<Acc>(static_cast<C>(column[i + l]));
    lane_a[l] += static_cast<Acc>(a[i + l]) * h;
    lane_b[l] += static_cast<Acc>(b[i + l]) * h;
  }
  with_a += sum_lanes(lane_a);
  with_b += sum_lanes(lane_b);
}

}  // namespace fpi

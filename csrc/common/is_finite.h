// Whether a number is one.
#pragma once

#include <limits>

#include "macros.h"

namespace fpi {

template <class C>
constexpr C kLargest = std::numeric_limits<C>::max();

// By size, not by v - v == 0: where v is a product, a compiler may contract that difference into a
// fused multiply-add, which leaves the rounding of the product instead of zero.
template <class C>
FPI_HD bool is_finite(C v) {
  return v <= kLargest<C> && v >= -kLargest<C>;
}

}  // namespace fpi

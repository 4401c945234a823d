// Whether a number is one.
#pragma once

#include <limits>

#include "macros.h"

namespace fpi {

// By size, not by v - v == 0: where v is a product, a compiler may contract that difference into a
// fused multiply-add, which leaves the rounding of the product instead of zero.
template <class C>
FPI_HD bool is_finite(C v) {
  constexpr C largest = std::numeric_limits<C>::max();
  return v <= largest && v >= -largest;
}

}  // namespace fpi

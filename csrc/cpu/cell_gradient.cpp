// See cell_gradient.h.
#include "cell_gradient.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "lanes.h"

namespace fpi {
namespace {

constexpr int kRun = 512;  // elements that are summed at a time

// Rows whose largest element is from 2^-kSpare to 2^kSpare are not scaled.
template <class T>
struct Range;
template <>
struct Range<float> {
  using Bits = uint32_t;
  static constexpr float kLow = 0x1p-30f, kHigh = 0x1p30f;
};
template <>
struct Range<double> {
  using Bits = uint64_t;
  static constexpr double kLow = 0x1p-254, kHigh = 0x1p254;
};

// NaN and Inf are larger than all: numbers are ordered as their bits are.
template <class T>
FPI_INLINE typename Range<T>::Bits magnitude_bits(T value) {
  typename Range<T>::Bits bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & (static_cast<typename Range<T>::Bits>(-1) >> 1);
}

template <class T>
FPI_CLONES bool measure_rows(const T* v, int64_t first, int64_t last, int64_t dim, double rtol,
                             double* atol) {
  using Bits = typename Range<T>::Bits;
  const Bits low = magnitude_bits(Range<T>::kLow), high = magnitude_bits(Range<T>::kHigh);
  for (int64_t i = first; i < last; ++i) {
    const T* row = v + i * dim;
    Bits largest = 0;
    for (int64_t j = 0; j < dim; ++j) largest = std::max(largest, magnitude_bits(row[j]));
    if (largest != 0 && !(largest >= low && largest <= high)) return false;
    double square = 0;
    for (int64_t at = 0; at < dim; at += kRun) {
      const int n = static_cast<int>(std::min<int64_t>(kRun, dim - at));
      square += dot<double>(row + at, row + at, n);
    }
    atol[i] = rtol * std::sqrt(square);
  }
  return true;
}

template <class T>
FPI_CLONES void multiply_runs(const T* c, const T* slope, T* delta, int64_t first, int64_t last) {
  for (int64_t k = first; k < last; ++k) delta[k] = c[k] * slope[k];
}

// body(T{}) with the type of the state.
template <class Body>
auto as_type(StateType state, const Body& body) {
  return state == StateType::kFloat64 ? body(double{}) : body(float{});
}

}  // namespace

bool adjoint_tolerances_cpu(const void* v, StateType state, int64_t batch, int64_t dim, double rtol,
                            double* atol, ParallelFor run) {
  return as_type(state, [&](auto type) {
    using T = decltype(type);
    std::atomic<bool> good{true};
    run(0, batch, grain_for(dim), [&](int64_t first, int64_t last) {
      if (!measure_rows(static_cast<const T*>(v), first, last, dim, rtol, atol)) good = false;
    });
    return good.load();
  });
}

void multiply_cpu(const void* c, const void* slope, void* delta, StateType state, int64_t count,
                  ParallelFor run) {
  as_type(state, [&](auto type) {
    using T = decltype(type);
    run(0, count, grain_for(1), [&](int64_t first, int64_t last) {
      multiply_runs(static_cast<const T*>(c), static_cast<const T*>(slope), static_cast<T*>(delta),
                    first, last);
    });
  });
}

}  // namespace fpi

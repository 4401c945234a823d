// Sums over short runs: sixteen lanes in vector registers, in an order that depends on the length
// alone.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "numeric.h"

namespace fpi {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FPI_SHUFFLES
#endif
#endif

constexpr int kLanes = 16;

// The compiler splits these where the machine's registers are narrower.
template <class T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(kLanes * sizeof(T))));
  typedef T Half __attribute__((vector_size(kLanes / 2 * sizeof(T))));
  typedef T Quarter __attribute__((vector_size(kLanes / 4 * sizeof(T))));
};

// The bits of bfloat16 lanes, and of the float lanes that they are the upper halves of.
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
static_assert(sizeof(Halves) == kLanes * sizeof(BFloat16));

template <class Acc, class A>
FPI_INLINE void load(const A* from, typename Lanes<Acc>::Vector& to) {
  if constexpr (std::is_same_v<Acc, A>) {
    std::memcpy(&to, from, sizeof to);
  } else if constexpr (std::is_arithmetic_v<A>) {
    typename Lanes<A>::Vector narrow;
    std::memcpy(&narrow, from, sizeof narrow);
    to = __builtin_convertvector(narrow, typename Lanes<Acc>::Vector);
  } else {
    Words bits;
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    bits = __builtin_convertvector(halves, Words) << 16;
    Lanes<float>::Vector narrow;
    std::memcpy(&narrow, &bits, sizeof narrow);
    to = __builtin_convertvector(narrow, typename Lanes<Acc>::Vector);
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

// n elements, kLanes at most.
template <class Acc, class A>
FPI_INLINE void load_run(const A* from, int n, typename Lanes<Acc>::Vector& to) {
  n == kLanes ? load<Acc>(from, to) : load_some<Acc>(from, n, to);
}

template <class C, class A>
FPI_INLINE void store(const typename Lanes<C>::Vector& from, A* to) {
  if constexpr (std::is_same_v<C, A>) {
    std::memcpy(to, &from, sizeof from);
  } else {
    // As BFloat16 rounds.
    Words bits;
    std::memcpy(&bits, &from, sizeof bits);
    const auto nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Halves halves = __builtin_convertvector(nan ? Words{} + 0x7fc0u : rounded, Halves);
    std::memcpy(to, &halves, sizeof halves);
  }
}

// The first n lanes, kLanes at most.
template <class C, class A>
FPI_INLINE void store_run(const typename Lanes<C>::Vector& from, int n, A* to) {
  if (n == kLanes) return store<C>(from, to);
  C lanes[kLanes];
  std::memcpy(lanes, &from, sizeof from);
  for (int l = 0; l < n; ++l) to[l] = static_cast<A>(lanes[l]);
}

// Calls at(j, n) for each run of n elements from j on: kLanes of them, but for the last.
template <class At>
FPI_INLINE void for_lanes(int64_t begin, int64_t end, At&& at) {
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes) at(j, kLanes);
  if (j < end) at(j, static_cast<int>(end - j));
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

#ifdef FPI_SHUFFLES
// The two halves of u, and of v, added: u's lanes first.
template <class Vector>
FPI_INLINE void halve(const Vector& u, const Vector& v, Vector& to) {
  to = __builtin_shufflevector(u, v, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
       __builtin_shufflevector(u, v, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
#endif

// What sum_lanes gives of four, for little more than the price of one.
template <class Acc>
FPI_INLINE void sum_four(const typename Lanes<Acc>::Vector& a, const typename Lanes<Acc>::Vector& b,
                         const typename Lanes<Acc>::Vector& c, const typename Lanes<Acc>::Vector& d,
                         double* sums) {
#ifdef FPI_SHUFFLES
  typename Lanes<Acc>::Vector ab, cd, all;
  halve(a, b, ab);
  halve(c, d, cd);
  all = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
        __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  all += __builtin_shufflevector(all, all, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  all += __builtin_shufflevector(all, all, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  for (int i = 0; i < 4; ++i) sums[i] = static_cast<double>(all[4 * i]);
#else
  sums[0] = sum_lanes<Acc>(a);
  sums[1] = sum_lanes<Acc>(b);
  sums[2] = sum_lanes<Acc>(c);
  sums[3] = sum_lanes<Acc>(d);
#endif
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

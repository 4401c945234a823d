// One sample of a step: where its arrays lie, its norms, and how its step is finished. Shared by
// every CPU step kernel.
#pragma once

#include <algorithm>
#include <cmath>

#include "../common/anderson_judge.h"
#include "lanes.h"

namespace fpi {

// Float sums run over a chunk before they go to double; a panel is the unit of parallel work
// inside one sample. Both are fixed, so that no result depends on the number of threads.
constexpr int kChunk = 512;
constexpr int64_t kPanel = 32 * kChunk;

template <class T, class H>
struct Row {
  using C = typename Numeric<T>::Compute;
  T* x;
  const T* gx;
  T* best;
  T* anchor;
  H* columns_f;
  H* columns_g;
  double* gram;
  Control* control;
  int64_t sample;
  int64_t dim;
  int32_t depth;
  C* own_f_previous;
  C* own_partner_previous;

  Row(const StepParams& p, int64_t i)
      : sample(p.sample_of ? p.sample_of[i] : i), dim(p.dim), depth(p.depth) {
    x = static_cast<T*>(p.x) + i * dim;
    gx = static_cast<const T*>(p.gx) + i * dim;
    best = static_cast<T*>(p.best) + sample * dim;
    const int64_t history = sample * depth * dim;
    anchor = depth ? static_cast<T*>(p.anchor) + sample * dim : nullptr;
    const bool apart = p.f_previous != nullptr;
    own_f_previous = apart ? static_cast<C*>(p.f_previous) + sample * dim : nullptr;
    own_partner_previous = apart ? static_cast<C*>(p.partner_previous) + sample * dim : nullptr;
    columns_f = depth ? static_cast<H*>(p.columns_f) + history : nullptr;
    columns_g = depth ? static_cast<H*>(p.columns_g) + history : nullptr;
    gram = p.gram ? p.gram + sample * gram_size(depth) : nullptr;
    control = reinterpret_cast<Control*>(p.control + sample * kControlSize);
  }

  H* column_f(int slot) const { return columns_f + slot * dim; }
  H* column_g(int slot) const { return columns_g + slot * dim; }
  int columns() const { return static_cast<int>(control->columns); }
  int head() const { return static_cast<int>(control->head); }
  int fresh_slot() const { return fpi::fresh_slot(*control, depth); }
  C* f_previous() const {
    return own_f_previous ? own_f_previous : reinterpret_cast<C*>(column_f(fresh_slot()));
  }
  C* partner_previous() const {
    return own_partner_previous ? own_partner_previous
                                : reinterpret_cast<C*>(column_g(fresh_slot()));
  }
  bool has_previous() const { return depth > 0 && control->has_previous != 0; }

  FPI_INLINE C f_at(int64_t j) const { return static_cast<C>(gx[j]) - static_cast<C>(x[j]); }
};

// sqrt(sum of squares) without overflow or underflow, for the rare row that needs it.
template <class At>
inline double scaled_norm(int64_t dim, At&& at) {
  double largest = 0.0;
  for (int64_t j = 0; j < dim; ++j) {
    const double value = std::fabs(static_cast<double>(at(j)));
    if (!(value <= std::numeric_limits<double>::max())) return value;
    largest = std::max(largest, value);
  }
  if (largest == 0.0) return 0.0;
  double sum = 0.0;
  for (int64_t j = 0; j < dim; ++j) {
    const double ratio = static_cast<double>(at(j)) / largest;
    sum += ratio * ratio;
  }
  return largest * std::sqrt(sum);
}

template <class T, class H>
inline Measured measured_from(const Row<T, H>& row, double ff, double gg, double xx, bool first) {
  using C = typename Row<T, H>::C;
  Measured at;
  at.residual = trustworthy<C>(ff, row.dim) ? std::sqrt(ff) : scaled_norm(row.dim, [&](int64_t j) {
    // In double: the difference of two large floats may overflow a float.
    return static_cast<double>(static_cast<C>(row.gx[j])) -
           static_cast<double>(static_cast<C>(row.x[j]));
  });
  at.norm_gx = trustworthy<C>(gg, row.dim)
                   ? std::sqrt(gg)
                   : scaled_norm(row.dim, [&](int64_t j) { return static_cast<C>(row.gx[j]); });
  at.norm_x = !first ? 0.0
              : trustworthy<C>(xx, row.dim)
                  ? std::sqrt(xx)
                  : scaled_norm(row.dim, [&](int64_t j) { return static_cast<C>(row.x[j]); });
  return at;
}

// The point to return is x itself if it is the best, else the best seen. It is left in both, so
// that g goes on being evaluated at a harmless point where stopped samples stay in the batch.
template <class T, class H>
FPI_INLINE void finish(const Row<T, H>& row, const Decision& decision, int64_t begin, int64_t end) {
  if (decision.improved) {
    copy_run(row.x + begin, end - begin, row.best + begin);
  } else {
    copy_run(row.best + begin, end - begin, row.x + begin);
  }
}

// Halfway back to the best point; where x itself is not finite, all the way.
template <class T, class H>
FPI_INLINE void step_back(const Row<T, H>& row, int64_t begin, int64_t end) {
  using C = typename Row<T, H>::C;
  for (int64_t j = begin; j < end; ++j) {
    const C x = static_cast<C>(row.x[j]);
    const C best = static_cast<C>(row.best[j]);
    const C middle = best + C(0.5) * (x - best);
    row.x[j] = static_cast<T>(is_finite(middle) ? middle : best);
  }
}

// Moves x where the decision says, if that is not a step from x; keeps the best point and the
// anchor. True if the move is done.
template <class T, class H>
FPI_INLINE bool moved(const Row<T, H>& row, const Decision& decision, int64_t begin, int64_t end) {
  T* x = row.x + begin;
  const int64_t n = end - begin;
  switch (decision.move) {
    case Move::kStop: finish(row, decision, begin, end); return true;
    case Move::kReject: step_back(row, begin, end); return true;
    default: break;
  }
  if (decision.improved) copy_run(x, n, row.best + begin);
  switch (decision.move) {
    case Move::kReturn: copy_run(row.best + begin, n, x); return true;
    case Move::kAnchor: copy_run(row.anchor + begin, n, x); return true;
    default: break;
  }
  if (decision.anchors) copy_run(x, n, row.anchor + begin);
  return false;
}

}  // namespace fpi

// One sample of a step: where its arrays lie, and the moves that are no step from x.
#pragma once

#include "../common/judge.h"
#include "tile.cuh"

namespace fpi {

template <class T, class H>
struct Row {
  using C = typename Numeric<T>::Compute;
  T* x;
  const T* gx;
  T* best;
  T* anchor;
  H* columns_f;
  H* columns_g;
  C* own_f_previous;  // null where the previous evaluation lies in the history
  C* own_partner_previous;
  int64_t sample;
  int64_t dim;
  int32_t depth;
  bool aligned;

  __device__ Row(const StepParams& p, int64_t i, int64_t sample_, bool aligned_)
      : sample(sample_), dim(p.dim), depth(p.depth), aligned(aligned_) {
    x = static_cast<T*>(p.x) + i * dim;
    gx = static_cast<const T*>(p.gx) + i * dim;
    best = static_cast<T*>(p.best) + sample * dim;
    anchor = depth ? static_cast<T*>(p.anchor) + sample * dim : nullptr;
    const int64_t history = sample * depth * dim;
    columns_f = depth ? static_cast<H*>(p.columns_f) + history : nullptr;
    columns_g = depth ? static_cast<H*>(p.columns_g) + history : nullptr;
    const bool apart = p.f_previous != nullptr;
    own_f_previous = apart ? static_cast<C*>(p.f_previous) + sample * dim : nullptr;
    own_partner_previous = apart ? static_cast<C*>(p.partner_previous) + sample * dim : nullptr;
  }

  __device__ __forceinline__ H* column_f(int slot) const { return columns_f + slot * dim; }
  __device__ __forceinline__ H* column_g(int slot) const { return columns_g + slot * dim; }
};

template <class C, class S>
__device__ __forceinline__ void copy_tile(const Tile<C>& tile, const S* from, S* to) {
  C v[Tile<C>::kElements];
  tile.load(from, v);
  tile.store(to, v);
}

// Halfway back to the best point; where x itself is not finite, all the way.
template <class T, class H, class C>
__device__ __forceinline__ void step_back(const Row<T, H>& row, const Tile<C>& tile) {
  C x[Tile<C>::kElements], best[Tile<C>::kElements];
  tile.load(row.x, x);
  tile.load(row.best, best);
#pragma unroll
  for (int e = 0; e < Tile<C>::kElements; ++e) {
    const C middle = best[e] + C(0.5) * (x[e] - best[e]);
    x[e] = is_finite(middle) ? middle : best[e];
  }
  tile.store(row.x, x);
}

// Moves x where the decision says, if that is not a step from x; keeps the best point and the
// anchor. True if the move is done. A sample that stops leaves the point to return in both x and
// best, so that g goes on being evaluated at a harmless point where it stays in the batch.
template <class T, class H, class C>
__device__ __forceinline__ bool moved(const Row<T, H>& row, const Decision& decision,
                                      const Tile<C>& tile) {
  if (decision.move == Move::kReject) {
    step_back(row, tile);
    return true;
  }
  if (decision.improved) copy_tile(tile, row.x, row.best);
  if (decision.move == Move::kStop || decision.move == Move::kReturn) {
    if (!decision.improved) copy_tile(tile, row.best, row.x);
    return true;
  }
  if (decision.move == Move::kAnchor) {
    copy_tile(tile, row.anchor, row.x);
    return true;
  }
  if (decision.anchors) copy_tile(tile, row.x, row.anchor);
  return false;
}

}  // namespace fpi

// Anderson acceleration, type II, one sample at a time.
// Source: Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011, eq. (2.2), in difference form.
#pragma once

#include "../common/anderson_judge.h"
#include "step_sample.cuh"

namespace fpi {

// One copy for every type: nothing in it depends on them.
inline __device__ __noinline__ void decide_anderson(const StepParams& p, int64_t sample,
                                                    double epsilon, Measured at, AndersonSums& sums,
                                                    double* gram, Control& c, SmallSolve& solve,
                                                    AndersonPlan& plan) {
  judge_anderson(p, sample, epsilon, at, sums, gram, c, solve, plan);
}

template <class T, class H>
struct AndersonStep {
  using State = T;
  using History = H;
  using C = typename Numeric<T>::Compute;
  using R = Row<T, H>;
  using Sums = AndersonSums;
  using Plan = AndersonPlan;
  using SmallProblem = SmallSolve;
  static constexpr int kPasses = 1;
  static constexpr bool kUsesGram = true;
  static constexpr int kElements = Tile<C>::kElements;

  // f and g(x) one step ago: apart, or in the slot that their difference takes.
  static __device__ __forceinline__ C* f_previous(const R& row, int slot) {
    return row.own_f_previous ? row.own_f_previous : reinterpret_cast<C*>(row.column_f(slot));
  }
  static __device__ __forceinline__ C* g_previous(const R& row, int slot) {
    return row.own_partner_previous ? row.own_partner_previous
                                    : reinterpret_cast<C*>(row.column_g(slot));
  }

  // Writes the fresh difference of f and takes every sum, in one reading of the tile. A second
  // measurement (`again`) finds the difference written, and its slot without f_previous.
  template <int, class Acc, class Team>
  static __device__ __forceinline__ void measure(const R& row, const Control& c, const Plan&,
                                                 bool first, bool again, const Tile<C>& tile,
                                                 Sums& out) {
    C f[kElements];
    {
      C x[kElements], g[kElements];
      tile.load(row.x, x);
      tile.load(row.gx, g);
      Acc ff = 0;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        f[e] = g[e] - x[e];
        const Acc wide = static_cast<Acc>(g[e]) - static_cast<Acc>(x[e]);
        ff += wide * wide;
      }
      add_pair(static_cast<double>(ff), lane_dot<Acc>(g, g), &out.ff, &out.gg);
      if (first) add_one(lane_dot<Acc>(x, x), &out.xx);
    }
    if (row.depth == 0 || first) return;
    const bool differs = c.has_previous != 0;
    C df[kElements];
    if (differs) {
      const int fresh = fresh_slot(c, row.depth);
      if (again) {
        Team::load(tile, row.column_f(fresh), df);
      } else {
        tile.load(f_previous(row, fresh), df);
#pragma unroll
        for (int e = 0; e < kElements; ++e) df[e] = f[e] - df[e];
        tile.store(row.column_f(fresh), df);
        // As it is stored, so that the Gram matrix is that of the stored columns.
#pragma unroll
        for (int e = 0; e < kElements; ++e) df[e] = rounded<H>(df[e]);
      }
      add_pair(lane_dot<Acc>(df, df), lane_dot<Acc>(f, df), &out.dfdf, &out.fdf);
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) df[e] = C(0);
    }
    const int others = columns_but_fresh(c, row.depth);
    const int head = static_cast<int>(c.head);
    C column[kElements], next[kElements];
    if (others > 0) tile.load(row.column_f(head), next);
    for (int age = 0; age < others; ++age) {
      const int slot = slot_back(head, age, row.depth);
#pragma unroll
      for (int e = 0; e < kElements; ++e) column[e] = next[e];
      if (age + 1 < others) tile.load(row.column_f(slot_back(head, age + 1, row.depth)), next);
      add_pair(lane_dot<Acc>(column, df), lane_dot<Acc>(column, f), &out.dfdc[slot],
               &out.fdc[slot]);
    }
  }

  static __device__ __forceinline__ int slot_back(int head, int age, int depth) {
    return head >= age ? head - age : head - age + depth;
  }

  // Float sums left the range in which nothing is lost: take them again in double.
  template <int>
  static __device__ __forceinline__ bool needs_wide(const R& row, const Control& c,
                                                    const Sums& sums, const Plan&) {
    const bool differs = row.depth > 0 && c.has_previous != 0;
    return !(trustworthy<C>(sums.ff, row.dim) && trustworthy<C>(sums.gg, row.dim) &&
             (!differs || trustworthy<C>(sums.dfdf, row.dim)));
  }

  template <int>
  static __device__ __forceinline__ void decide(const StepParams& p, int64_t sample,
                                                const Measured& at, Sums& sums, double* gram,
                                                Control& c, SmallProblem& small, Plan& plan) {
    decide_anderson(p, sample, Numeric<T>::kEpsilon, at, sums, gram, c, small, plan);
  }

  // Writes the next point, and remembers this evaluation.
  static __device__ __forceinline__ void advance(const R& row, const Control& c, const Plan& plan,
                                                 const Tile<C>& tile) {
    C f[kElements], g[kElements], next[kElements];
    tile.load(row.gx, g);
    tile.load(row.x, f);
    const C rest = C(1) - static_cast<C>(plan.beta);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      f[e] = g[e] - f[e];
      next[e] = g[e] - rest * f[e];
    }
    if (row.depth > 0) {
      C column[kElements];
      // The fresh difference of g is first needed here, and so is formed here.
      if (plan.differs) {
        tile.load(g_previous(row, plan.fresh), column);
#pragma unroll
        for (int e = 0; e < kElements; ++e) column[e] = g[e] - column[e];
        tile.store(row.column_g(plan.fresh), column);
        const C gamma = static_cast<C>(gamma_of_fresh(plan));
#pragma unroll
        for (int e = 0; e < kElements; ++e) next[e] -= gamma * rounded<H>(column[e]);
      }
      // Two columns on their way at once; more would not fit the registers.
#pragma unroll 2
      for (int k = 0; k < plan.count; ++k) {
        const int slot = plan.slots[k];
        const C gamma = static_cast<C>(plan.gamma[k]);
        if (!(plan.differs && slot == plan.fresh)) {
          tile.load(row.column_g(slot), column);
#pragma unroll
          for (int e = 0; e < kElements; ++e) next[e] -= gamma * column[e];
        }
        if (rest == C(0)) continue;
        tile.load(row.column_f(slot), column);
#pragma unroll
        for (int e = 0; e < kElements; ++e) next[e] += rest * gamma * column[e];
      }
      // After the mixing: the slot may hold the oldest of its columns.
      const int slot = fresh_slot(c, row.depth);
      tile.store(f_previous(row, slot), f);
      tile.store(g_previous(row, slot), g);
    }
    tile.store(row.x, next);
  }

  static __device__ __forceinline__ double gamma_of_fresh(const Plan& plan) {
    for (int k = 0; k < plan.count; ++k) {
      if (plan.slots[k] == plan.fresh) return plan.gamma[k];
    }
    return 0.0;
  }
};

}  // namespace fpi

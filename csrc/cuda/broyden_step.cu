// Good Broyden with an inverse Jacobian H = -beta I + sum u_i v_i^T of limited memory, one sample
// at a time, on f(x) = g(x) - x.
// Source: Broyden, Math. Comp. 19, 1965; Bai, Kolter, Koltun, NeurIPS 2019, section 3.1.3.
#include "../common/broyden_judge.h"
#include "step_kernel.cuh"

namespace fpi {
namespace {

// One copy for every type: nothing in it depends on them.
__device__ __noinline__ void decide_broyden(const StepParams& p, int64_t sample, double epsilon,
                                            Measured at, const BroydenSums& sums, Control& c,
                                            BroydenPlan& plan) {
  judge_broyden(p, sample, epsilon, at, sums, c, plan);
}

template <class T, class H>
struct BroydenStep {
  using State = T;
  using History = H;
  using C = typename Numeric<T>::Compute;
  using R = Row<T, H>;
  using Sums = BroydenSums;
  using Plan = BroydenPlan;
  struct SmallProblem {};
  static constexpr int kPasses = 2;
  static constexpr bool kUsesGram = false;
  static constexpr int kElements = Tile<C>::kElements;

  template <int kPass, class Acc, class Team>
  static __device__ __forceinline__ void measure(const R& row, const Control& c, const Plan& plan,
                                                 bool first, bool, const Tile<C>& tile, Sums& out) {
    if (kPass == 0) {
      measure_update<Acc>(row, c, first, tile, out);
    } else if (plan.updates) {
      form<Acc>(row, plan, tile, out);
    }
  }

  template <class Acc>
  static __device__ __forceinline__ void measure_update(const R& row, const Control& c, bool first,
                                                        const Tile<C>& tile, Sums& out) {
    C f[kElements], s[kElements];
    {
      C g[kElements];
      tile.load(row.x, s);
      tile.load(row.gx, g);
      Acc ff = 0;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        f[e] = g[e] - s[e];
        const Acc wide = static_cast<Acc>(g[e]) - static_cast<Acc>(s[e]);
        ff += wide * wide;
      }
      add_pair(static_cast<double>(ff), lane_dot<Acc>(g, g), &out.ff, &out.gg);
      if (first) add_one(lane_dot<Acc>(s, s), &out.xx);
    }
    if (first) return;
    C y[kElements], column[kElements];
    if (c.has_previous != 0) {
      tile.load(row.own_partner_previous, column);
      tile.load(row.own_f_previous, y);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        s[e] -= column[e];
        y[e] = f[e] - y[e];
      }
      add_pair(lane_dot<Acc>(s, s), lane_dot<Acc>(y, y), &out.ss, &out.yy);
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) s[e] = y[e] = C(0);
    }
    const int columns = kept_columns(c, row.depth);
#pragma unroll 1
    for (int k = 0; k < columns; ++k) {
      tile.load(row.column_f(k), column);
      const double us = lane_dot<Acc>(s, column);
      tile.load(row.column_g(k), column);
      add_pair(us, lane_dot<Acc>(y, column), &out.us[k], &out.vy[k]);
      add_one(lane_dot<Acc>(f, column), &out.vf[k]);
    }
  }

  // v = H^T s into its slot, and s - H y beside it, not yet divided by s^T H y.
  template <class Acc>
  static __device__ __forceinline__ void form(const R& row, const Plan& plan, const Tile<C>& tile,
                                              Sums& out) {
    C f[kElements], y[kElements], u[kElements], v[kElements];
    const C beta = static_cast<C>(plan.beta);
    tile.load(row.x, v);
    tile.load(row.gx, f);
    tile.load(row.own_f_previous, y);
    tile.load(row.own_partner_previous, u);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      f[e] -= v[e];
      y[e] = f[e] - y[e];
      const C s = v[e] - u[e];
      u[e] = s + beta * y[e];
      v[e] = -beta * s;
    }
#pragma unroll 2
    for (int k = 0; k < plan.columns; ++k) {
      C column[kElements];
      const C vy = static_cast<C>(plan.vy[k]);
      const C us = static_cast<C>(plan.us[k]);
      tile.load(row.column_f(k), column);
#pragma unroll
      for (int e = 0; e < kElements; ++e) u[e] -= vy * column[e];
      tile.load(row.column_g(k), column);
#pragma unroll
      for (int e = 0; e < kElements; ++e) v[e] += us * column[e];
    }
    tile.store(row.column_f(plan.columns), u);
    tile.store(row.column_g(plan.columns), v);
#pragma unroll
    for (int e = 0; e < kElements; ++e) v[e] = rounded<H>(v[e]);
    add_pair(lane_dot<Acc>(v, y), lane_dot<Acc>(v, f), &out.fresh_vy, &out.fresh_vf);
    add_one(lane_dot<Acc>(v, v), &out.fresh_vv);
  }

  // Float sums left the range in which nothing is lost: take them again in double.
  template <int kPass>
  static __device__ __forceinline__ bool needs_wide(const R& row, const Control& c,
                                                    const Sums& sums, const Plan& plan) {
    if (kPass == 1) return plan.updates && !trustworthy<C>(sums.fresh_vv, row.dim);
    return !(trustworthy<C>(sums.ff, row.dim) && trustworthy<C>(sums.gg, row.dim) &&
             (c.has_previous == 0 ||
              (trustworthy<C>(sums.ss, row.dim) && trustworthy<C>(sums.yy, row.dim))));
  }

  template <int kPass>
  static __device__ __forceinline__ void decide(const StepParams& p, int64_t sample,
                                                const Measured& at, const Sums& sums, double*,
                                                Control& c, SmallProblem&, Plan& plan) {
    if (kPass == 0) {
      decide_broyden(p, sample, Numeric<T>::kEpsilon, at, sums, c, plan);
    } else {
      admit_update(sums, plan, c);
    }
  }

  // Remembers this evaluation and writes x - H f.
  static __device__ __forceinline__ void advance(const R& row, const Control&, const Plan& plan,
                                                 const Tile<C>& tile) {
    C next[kElements], column[kElements];
    const C beta = static_cast<C>(plan.beta);
    const bool mixes = plan.decision.move == Move::kMix;
    tile.load(row.x, next);
    tile.load(row.gx, column);
    tile.store(row.own_partner_previous, next);
#pragma unroll
    for (int e = 0; e < kElements; ++e) column[e] -= next[e];
    tile.store(row.own_f_previous, column);
#pragma unroll
    for (int e = 0; e < kElements; ++e) next[e] += beta * column[e];
#pragma unroll 2
    for (int k = 0; mixes && k < plan.columns; ++k) {
      const C vf = static_cast<C>(plan.vf[k]);
      tile.load(row.column_f(k), column);
#pragma unroll
      for (int e = 0; e < kElements; ++e) next[e] -= vf * column[e];
    }
    if (plan.updates) {
      // In double: the denominator is a product of two differences, and may leave a float's range.
      const double scale = 1.0 / plan.denominator;
      const C vf = mixes ? static_cast<C>(plan.fresh_vf) : C(0);
      H* fresh_u = row.column_f(plan.columns);
      tile.load(fresh_u, column);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        column[e] = static_cast<C>(scale * static_cast<double>(column[e]));
      }
      tile.store(fresh_u, column);
#pragma unroll
      for (int e = 0; e < kElements; ++e) next[e] -= vf * rounded<H>(column[e]);
    }
    tile.store(row.x, next);
  }
};

}  // namespace

const char* broyden_step_cuda(const StepParams& p, StateType state, StateType history,
                              void* scratch, void* stream) {
  return run_step<BroydenStep, false>(p, state, history, scratch, stream);
}

}  // namespace fpi

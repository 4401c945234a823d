// Good Broyden with an inverse Jacobian H = -beta I + sum u_i v_i^T of limited memory, one sample
// at a time, on f(x) = g(x) - x.
// Source: Broyden, Math. Comp. 19, 1965; Bai, Kolter, Koltun, NeurIPS 2019, section 3.1.3.
#include "../common/broyden_judge.h"
#include "launch.h"
#include "row.h"

namespace fpi {
namespace {

struct Sums : BroydenSums {
  Sums() : BroydenSums{} {}

  void add(const Sums& o, int depth) {
    ff += o.ff;
    gg += o.gg;
    xx += o.xx;
    ss += o.ss;
    yy += o.yy;
    fresh_vy += o.fresh_vy;
    fresh_vf += o.fresh_vf;
    fresh_vv += o.fresh_vv;
    for (int k = 0; k < depth; ++k) {
      us[k] += o.us[k];
      vy[k] += o.vy[k];
      vf[k] += o.vf[k];
    }
  }
};

struct Plan : BroydenPlan {
  Plan() : BroydenPlan{} {}
};

template <class Acc, class T, class H>
FPI_INLINE void measure(const Row<T, H>& row, int64_t begin, int64_t end, bool first, Sums& out) {
  using C = typename Row<T, H>::C;
  C f[kChunk], s[kChunk], y[kChunk], wide[kChunk];
  const bool differs = row.has_previous();
  const int columns = kept_columns(*row.control, row.depth);
  for (int64_t at = begin; at < end; at += kChunk) {
    const int n = static_cast<int>(std::min<int64_t>(kChunk, end - at));
    const T* x = row.x + at;
    const T* gx = row.gx + at;
    for (int j = 0; j < n; ++j) {
      wide[j] = static_cast<C>(gx[j]);
      f[j] = wide[j] - static_cast<C>(x[j]);
    }
    out.ff += dot<Acc>(f, f, n);
    out.gg += dot<Acc>(wide, wide, n);
    for (int j = 0; j < n; ++j) wide[j] = static_cast<C>(x[j]);
    if (first) out.xx += dot<Acc>(wide, wide, n);
    if (differs) {
      for (int j = 0; j < n; ++j) {
        s[j] = wide[j] - row.own_partner_previous[at + j];
        y[j] = f[j] - row.own_f_previous[at + j];
      }
      out.ss += dot<Acc>(s, s, n);
      out.yy += dot<Acc>(y, y, n);
    }
    for (int k = 0; k < columns; ++k) {
      if (!differs) {
        for (int j = 0; j < n; ++j) wide[j] = static_cast<C>(row.column_g(k)[at + j]);
        out.vf[k] += dot<Acc>(f, wide, n);
        continue;
      }
      out.us[k] += dot<Acc>(s, row.column_f(k) + at, n);
      dot2<Acc>(y, f, row.column_g(k) + at, n, out.vy[k], out.vf[k]);
    }
  }
}

// v = H^T s into its slot, and s - H y beside it, not yet divided by s^T H y. A second time finds
// both written, and takes the sums alone.
template <class Acc, bool kAgain, class T, class H>
FPI_INLINE void form(const Row<T, H>& row, const Plan& plan, int64_t begin, int64_t end,
                     Sums& out) {
  using C = typename Row<T, H>::C;
  if (!plan.updates) return;
  C f[kChunk], y[kChunk], u[kChunk], v[kChunk];
  const C beta = static_cast<C>(plan.beta);
  for (int64_t at = begin; at < end; at += kChunk) {
    const int n = static_cast<int>(std::min<int64_t>(kChunk, end - at));
    for (int j = 0; j < n; ++j) {
      f[j] = row.f_at(at + j);
      y[j] = f[j] - row.own_f_previous[at + j];
      const C s = static_cast<C>(row.x[at + j]) - row.own_partner_previous[at + j];
      u[j] = s + beta * y[j];
      v[j] = -beta * s;
    }
    for (int k = 0; k < plan.columns && !kAgain; ++k) {
      const C vy = static_cast<C>(plan.vy[k]);
      const C us = static_cast<C>(plan.us[k]);
      const H* column_u = row.column_f(k) + at;
      const H* column_v = row.column_g(k) + at;
      for (int j = 0; j < n; ++j) {
        u[j] -= vy * static_cast<C>(column_u[j]);
        v[j] += us * static_cast<C>(column_v[j]);
      }
    }
    H* fresh_u = row.column_f(plan.columns) + at;
    H* fresh_v = row.column_g(plan.columns) + at;
    for (int j = 0; j < n; ++j) {
      if (!kAgain) {
        fresh_u[j] = static_cast<H>(u[j]);
        fresh_v[j] = static_cast<H>(v[j]);
      }
      v[j] = static_cast<C>(fresh_v[j]);
    }
    out.fresh_vv += dot<Acc>(v, v, n);
    dot2<Acc>(y, f, v, n, out.fresh_vy, out.fresh_vf);
  }
}

// Remembers this evaluation and writes x - H f.
template <class T, class H>
FPI_INLINE void advance(const Row<T, H>& row, const Plan& plan, int64_t begin, int64_t end) {
  using C = typename Row<T, H>::C;
  if (moved(row, plan.decision, begin, end)) return;
  C next[kChunk];
  const C beta = static_cast<C>(plan.beta);
  const bool mixes = plan.decision.move == Move::kMix;
  for (int64_t at = begin; at < end; at += kChunk) {
    const int n = static_cast<int>(std::min<int64_t>(kChunk, end - at));
    for (int j = 0; j < n; ++j) {
      const C x = static_cast<C>(row.x[at + j]);
      const C f = row.f_at(at + j);
      next[j] = x + beta * f;
      row.own_f_previous[at + j] = f;
      row.own_partner_previous[at + j] = x;
    }
    for (int k = 0; k < plan.columns && mixes; ++k) {
      const C vf = static_cast<C>(plan.vf[k]);
      const H* column_u = row.column_f(k) + at;
      for (int j = 0; j < n; ++j) next[j] -= vf * static_cast<C>(column_u[j]);
    }
    if (plan.updates) {
      // In double: the denominator is a product of two differences, and may leave a float's range.
      const double scale = 1.0 / plan.denominator;
      const C vf = mixes ? static_cast<C>(plan.fresh_vf) : C(0);
      H* fresh_u = row.column_f(plan.columns) + at;
      for (int j = 0; j < n; ++j) {
        fresh_u[j] =
            static_cast<H>(static_cast<C>(scale * static_cast<double>(static_cast<C>(fresh_u[j]))));
        next[j] -= vf * static_cast<C>(fresh_u[j]);
      }
    }
    for (int j = 0; j < n; ++j) row.x[at + j] = static_cast<T>(next[j]);
  }
}

template <class T, class H>
struct BroydenStep {
  using State = T;
  using History = H;
  using Partial = Sums;
  using Scratch = Plan;
  static constexpr int kPasses = 3;

  static FPI_INLINE void pass(int which, const StepParams& p, const Row<T, H>& row,
                              const Plan& plan, int64_t begin, int64_t end, Sums& out) {
    using C = typename Numeric<T>::Compute;
    if (which == 0) {
      measure<C>(row, begin, end, p.num_steps[row.sample] == 0, out);
    } else if (which == 1) {
      form<C, false>(row, plan, begin, end, out);
    } else {
      advance(row, plan, begin, end);
    }
  }

  static FPI_INLINE void wide_pass(int which, const StepParams& p, const Row<T, H>& row,
                                   const Plan& plan, int64_t begin, int64_t end, Sums& out) {
    if (which == 1) return form<double, true>(row, plan, begin, end, out);
    measure<double>(row, begin, end, p.num_steps[row.sample] == 0, out);
  }

  static bool needs_wide(const Row<T, H>& row, int pass, const Sums& sums, const Plan& plan) {
    using C = typename Numeric<T>::Compute;
    if (sizeof(C) != 4) return false;
    if (pass == 1) return plan.updates && !trustworthy<C>(sums.fresh_vv, row.dim);
    return !(trustworthy<C>(sums.ff, row.dim) && trustworthy<C>(sums.gg, row.dim) &&
             (!row.has_previous() ||
              (trustworthy<C>(sums.ss, row.dim) && trustworthy<C>(sums.yy, row.dim))));
  }

  static void between(int which, const StepParams& p, const Row<T, H>& row, Sums& sums,
                      Plan& plan) {
    if (which == 0) {
      const bool first = p.num_steps[row.sample] == 0;
      const Measured at = measured_from(row, sums.ff, sums.gg, sums.xx, first);
      judge_broyden(p, row.sample, Numeric<T>::kEpsilon, at, sums, *row.control, plan);
    } else {
      admit_update(sums, plan, *row.control);
    }
  }
};

}  // namespace

void broyden_step_cpu(const StepParams& p, StateType state, StateType history, ParallelFor run) {
  launch<BroydenStep, false>(p, state, history, run);
}

}  // namespace fpi

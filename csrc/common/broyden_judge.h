// What one Broyden step decides for one sample, after each of its two sets of sums.
// Source: Broyden, Math. Comp. 19, 1965; Bai, Kolter, Koltun, NeurIPS 2019, section 3.1.3.
#pragma once

#include "judge.h"

namespace fpi {

// Sums of the first pass (norms, and products of the update with the columns kept so far), and of
// the second (products of the fresh column).
struct BroydenSums {
  double ff, gg, xx;
  double ss, yy;
  double us[kMaxDepth], vy[kMaxDepth], vf[kMaxDepth];
  double fresh_vy, fresh_vf, fresh_vv;
};

struct BroydenPlan {
  Decision decision;
  double beta;
  int columns;   // that take part in the step, without the fresh one
  bool updates;  // a fresh column is being formed
  double us[kMaxDepth], vy[kMaxDepth], vf[kMaxDepth];
  double yy, denominator, fresh_vf;
};

// A memory that is full starts afresh, as the method's theory has no rule for dropping one update.
FPI_HD int kept_columns(const Control& c, int depth) {
  return c.columns >= depth ? 0 : static_cast<int>(c.columns);
}

FPI_HD void judge_broyden(const StepParams& p, int64_t sample, double epsilon, const Measured& at,
                          const BroydenSums& sums, Control& c, BroydenPlan& plan) {
  const bool differs = p.num_steps[sample] > 0 && c.has_previous != 0;
  plan.columns = 0;
  plan.updates = false;
  plan.decision = judge(p, sample, epsilon, at, c);
  plan.beta = p.beta * c.mixing_scale;
  if (plan.decision.move == Move::kStop) return;
  if (goes_elsewhere(plan.decision.move)) {
    c.has_previous = 0;
    return;
  }
  c.has_previous = 1;
  plan.columns = kept_columns(c, p.depth);
  c.columns = static_cast<float>(plan.columns);
  // A difference that is rounding noise would fill H with it.
  const double noise = 0.5 * epsilon * at.norm_gx;
  plan.updates = differs && is_finite(sums.yy) && sqrt(sums.yy) > noise && sums.ss > 0.0;
  plan.yy = sums.yy;
  for (int k = 0; k < plan.columns; ++k) {
    plan.us[k] = sums.us[k];
    plan.vy[k] = sums.vy[k];
    plan.vf[k] = sums.vf[k];
  }
}

// Takes the fresh column unless s^T H y is too small to divide by.
FPI_HD void admit_update(const BroydenSums& sums, BroydenPlan& plan, Control& c) {
  if (!plan.updates) return;
  constexpr double kSmallestCosine = 1e-8;
  const double size = sqrt(sums.fresh_vv) * sqrt(plan.yy);
  plan.denominator = sums.fresh_vy;
  plan.fresh_vf = sums.fresh_vf;
  plan.updates = is_finite(size) && is_finite(plan.fresh_vf) &&
                 fabs(plan.denominator) > kSmallestCosine * size;
  if (plan.updates) c.columns = static_cast<float>(plan.columns + 1);
}

}  // namespace fpi

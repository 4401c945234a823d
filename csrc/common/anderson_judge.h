// What one Anderson step decides for one sample, between its sums and its next point.
// Source: Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011, eq. (2.2), in difference form.
#pragma once

#include "judge.h"
#include "small_solve.h"

namespace fpi {

// Sums over one sample, all that a step has to know of it.
struct AndersonSums {
  double ff, gg, xx;
  double dfdf, fdf;                        // with the fresh difference
  double dfdc[kMaxDepth], fdc[kMaxDepth];  // with the column in each slot
};

struct AndersonPlan {
  Decision decision;
  double beta;
  double gamma[kMaxDepth];
  int slots[kMaxDepth];  // of the columns that take part, and gamma likewise
  int count;
  bool differs;  // a fresh difference was formed,
  int fresh;     // in this slot
};

// The slot that the next difference takes: the oldest one's, once the history is full.
FPI_HD int fresh_slot(const Control& c, int depth) {
  return c.columns == 0 ? 0 : (static_cast<int>(c.head) + 1) % depth;
}

FPI_HD int columns_but_fresh(const Control& c, int depth) {
  const int columns = static_cast<int>(c.columns);
  return columns < depth ? columns : depth - 1;
}

// Takes the fresh difference into the history, unless it is rounding noise: ||dF|| <= eps/2 ||g||.
FPI_HD void admit_difference(const AndersonSums& sums, const Measured& at, double epsilon,
                             int depth, double* gram, Control& c) {
  const int fresh = fresh_slot(c, depth);
  const int head = static_cast<int>(c.head);
  const int others = columns_but_fresh(c, depth);  // the oldest was overwritten
  const bool useful = is_finite(sums.dfdf) && sqrt(sums.dfdf) > 0.5 * epsilon * at.norm_gx;
  c.columns = static_cast<float>(others);
  if (!useful) return;
  for (int age = 0; age < others; ++age) {
    const int slot = (head - age + depth) % depth;
    gram[gram_place(fresh, slot)] = sums.dfdc[slot];
  }
  gram[gram_place(fresh, fresh)] = sums.dfdf;
  c.columns = static_cast<float>(others + 1);
  c.head = static_cast<float>(fresh);
}

FPI_HD void judge_anderson(const StepParams& p, int64_t sample, double epsilon, const Measured& at,
                           AndersonSums& sums, double* gram, Control& c, SmallSolve& solve,
                           AndersonPlan& plan) {
  const int depth = p.depth;
  plan.differs = depth > 0 && p.num_steps[sample] > 0 && c.has_previous != 0;
  plan.fresh = depth > 0 ? fresh_slot(c, depth) : 0;
  plan.count = 0;
  plan.decision = judge(p, sample, epsilon, at, c);
  plan.beta = p.beta * c.mixing_scale;
  if (plan.decision.move == Move::kStop || depth == 0) return;
  if (goes_elsewhere(plan.decision.move)) {
    // The slot of the fresh difference was written over.
    if (plan.differs) c.columns = static_cast<float>(columns_but_fresh(c, depth));
    c.has_previous = 0;
    return;
  }
  if (plan.differs) {
    sums.fdc[plan.fresh] = sums.fdf;
    admit_difference(sums, at, epsilon, depth, gram, c);
  }
  c.has_previous = 1;
  if (plan.decision.move != Move::kMix || c.columns == 0) return;
  const int columns = static_cast<int>(c.columns < p.dim ? c.columns : p.dim);
  solve_small(gram, sums.fdc, depth, columns, static_cast<int>(c.head), p.ridge, solve);
  if (!worth_mixing(solve, sums.fdc, depth, sums.ff)) return;
  for (int slot = 0; slot < depth; ++slot) {
    if (solve.gamma[slot] == 0.0) continue;
    plan.slots[plan.count] = slot;
    plan.gamma[plan.count++] = solve.gamma[slot];
  }
}

}  // namespace fpi

// One evaluation of g at one sample: how it is judged, and what is written down of it. For every
// solver and every backend.
#pragma once

#include "decide.h"
#include "step_params.h"

namespace fpi {

// `epsilon` is that of the state's dtype; patience with a floor grows with the history. A step is
// computed in float64 for float64 states alone.
FPI_HD Rules rules_for(const StepParams& p, int64_t sample, double epsilon) {
  Rules rules;
  rules.atol = p.atol[sample];
  rules.rtol = p.rtol;
  rules.epsilon = epsilon;
  rules.largest = epsilon > std::numeric_limits<double>::epsilon()
                      ? static_cast<double>(kLargest<float>)
                      : kLargest<double>;
  rules.max_steps = p.max_steps;
  rules.stall_steps = 3 * p.depth > 20 ? 3 * p.depth : 20;
  rules.safeguarded = p.depth > 0;
  return rules;
}

// Counts the evaluation, decides, and writes the account of it.
FPI_HD Decision judge(const StepParams& p, int64_t sample, double epsilon, const Measured& at,
                      Control& c) {
  const int32_t step = ++p.num_steps[sample];
  const Decision decision = decide(c, at, rules_for(p, sample, epsilon), step);
  p.status[sample] = decision.status;
  const bool returns_x = decision.move != Move::kStop || decision.improved;
  p.residual[sample] = returns_x ? at.residual : c.best;
  return decision;
}

// True for the moves that leave x for another point that is at hand, and so take no step from it.
FPI_HD bool goes_elsewhere(Move move) {
  return move == Move::kReject || move == Move::kReturn || move == Move::kAnchor;
}

// Plain sums of squares tell the norm unless they left the range where nothing is lost.
template <class Acc>
FPI_HD bool trustworthy(double square, int64_t dim) {
  const double least = sizeof(Acc) == 4 ? 1e-30 : 1e-280;
  const double most = sizeof(Acc) == 4 ? 1e34 : 1e300;
  return square != square || (square >= least * static_cast<double>(dim) && square <= most);
}

}  // namespace fpi

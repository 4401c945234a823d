// The rules that end a sample's solve or choose its next step: one copy for every backend.
#pragma once

#include <cmath>
#include <cstdint>

#include "control.h"
#include "is_finite.h"
#include "macros.h"
#include "status.h"

namespace fpi {

enum class Move : int {
  kStop,    // the status is final
  kMix,     // the accelerated step
  kPicard,  // x + beta f
  kReject,  // g was not finite: back halfway to the best point
  kReturn,  // to the best point, with an empty history
  kAnchor,  // to the anchor
};

struct Measured {
  double residual;   // ||g(x) - x||, NaN or Inf when g(x) is not finite
  double norm_gx;    // ||g(x)||
  double norm_x;     // ||x||, read at the first step only
};

struct Rules {
  double atol;
  double rtol;
  double epsilon;       // of the state's dtype
  int64_t max_steps;
  int32_t stall_steps;  // steps without a gain of a tenth before a floor is called
  bool safeguarded;     // false for Picard: there is nothing to fall back to
};

struct Decision {
  Move move;
  Status status;
  bool improved;  // x is the best point so far
  bool anchors;   // x is to be kept as the anchor
};

struct Safeguard {
  static constexpr double kCap = 0.1;          // relative tolerance against the starting scale
  static constexpr double kHidden = 0.25;      // of the starting scale
  static constexpr double kGrowth = 10.0;      // over the best residual, borne without a restart
  static constexpr double kPatience = 3.0;
  static constexpr double kProgress = 0.9;     // of the best residual, to count as a new best
  static constexpr double kLetGo = 0.35;        // of the best residual at the anchor, to forget it
  static constexpr double kFirstPicard = 9.0;   // plain steps at the start
  static constexpr double kFirstLeast = 4.0;    // fewer, where the residual has fallen to
  static constexpr double kFirstGain = 0.05;    // this part of the first
  static constexpr double kFirstGrowth = 8.0;   // times kPicardGrowth: a transient may pass
  static constexpr double kPicardLength = 8.0;
  static constexpr double kPicardGrowth = 4.0;  // since the phase began; ends it early
  static constexpr double kDivergence = 1e6;
  static constexpr int kDivergenceSteps = 8;
  static constexpr int kRejections = 8;
  static constexpr int kGrowths = 16;
  static constexpr double kGain = 0.9;
  static constexpr double kFloor = 64.0;       // epsilons, relative to ||g||
};

FPI_HD double larger(double a, double b) { return a > b ? a : b; }
FPI_HD double smaller(double a, double b) { return a < b ? a : b; }

FPI_HD void start(Control& c, const Measured& at) {
  c.scale0 = larger(at.norm_x, at.norm_gx);
  c.first = c.best = c.gain_residual = at.residual;
  c.previous = Safeguard::kFirstGrowth * at.residual;
  c.gain_step = 1;
  c.since_best = 0;
  c.patience = Safeguard::kPatience;
  c.picard_length = Safeguard::kPicardLength;
  c.picard_left = Safeguard::kFirstPicard;
  c.mixing_scale = 1;
  c.rejections = c.growths = 0;
  c.columns = c.head = 0;
  c.has_previous = c.anchored = 0;
}

// The residual cannot be told from rounding any more and has not fallen for a long while: longer
// than the last Picard phase, whose residual may rise before it falls.
FPI_HD bool at_floor(const Control& c, const Measured& at, const Rules& rules, int64_t step) {
  const double patience = rules.safeguarded ? c.picard_length : 0.0;
  return step - c.gain_step >= larger(rules.stall_steps, patience) &&
         c.best <= Safeguard::kFloor * rules.epsilon * at.norm_gx;
}

FPI_HD bool ran_away(const Control& c, const Measured& at, const Rules& rules, int64_t step) {
  const double reference = larger(c.first, Safeguard::kFloor * rules.epsilon * c.scale0);
  return step > Safeguard::kDivergenceSteps && at.residual > Safeguard::kDivergence * reference;
}

// x has run so far from where it started that rounding may hide a residual of the cap's size: a
// map without a fixed point must not pass for converged there.
FPI_HD bool hidden_by_rounding(const Control& c, const Measured& at, const Rules& rules) {
  return rules.epsilon * at.norm_gx > rules.atol + Safeguard::kHidden * c.scale0;
}

// The first Picard phase is there for the transients of a map; where it has none, the phase ends.
FPI_HD bool first_phase_gained(const Control& c, const Measured& at) {
  return c.patience == Safeguard::kPatience &&
         c.picard_left <= Safeguard::kFirstPicard - (Safeguard::kFirstLeast - 1.0) &&
         at.residual <= Safeguard::kFirstGain * c.first;
}

// Picks between the accelerated step and a phase of plain Picard steps. Patience and the phase
// both double each time, so that a problem which acceleration does not help is soon left to
// Picard, and one bad stretch costs little: where it gained little, x goes back to the point where
// the last phase ended, as if the stretch had not been.
FPI_HD Move next_move(Control& c, const Measured& at, Decision& out) {
  const bool in_phase = c.picard_left > 0;
  const bool picard_grew = at.residual > Safeguard::kPicardGrowth * c.previous;
  const bool grew = at.residual > Safeguard::kGrowth * c.best;
  c.growths = grew && !in_phase ? c.growths + 1 : 0;
  if (c.growths >= Safeguard::kGrowths) {
    out.status = kDiverged;
    return Move::kStop;
  }
  if (in_phase) {
    c.picard_left = picard_grew || first_phase_gained(c, at) ? 0 : c.picard_left - 1;
    if (c.picard_left > 0) return Move::kPicard;
    c.since_best = 0;
    if (picard_grew && grew) {
      c.anchored = c.columns = 0;
      return Move::kReturn;
    }
    c.anchored = c.best;
    out.anchors = true;
    return Move::kMix;
  }
  if (c.best <= Safeguard::kLetGo * c.anchored) c.anchored = 0;
  if (grew || c.since_best >= c.patience) {
    c.picard_left = c.picard_length;
    c.patience *= 2;
    c.picard_length *= 2;
    c.since_best = 0;
    c.previous = at.residual;
    if (c.anchored == 0) return Move::kPicard;
    // One step more, for the anchor's own evaluation. The phase is Picard's own course from there,
    // and runs to its end whatever the residual does.
    c.picard_left += 1;
    c.previous = HUGE_VAL;
    c.anchored = 0;
    return Move::kAnchor;
  }
  return Move::kMix;
}

// Rules on the evaluation number `step` (from 1) of one sample.
FPI_HD Decision decide(Control& c, const Measured& at, const Rules& rules, int64_t step) {
  if (step == 1) start(c, at);
  if (!is_finite(at.residual)) {
    c.rejections += 1;
    if (step == 1 || c.rejections >= Safeguard::kRejections) {
      return {Move::kStop, kNonfinite, step == 1, false};
    }
    if (step >= rules.max_steps) return {Move::kStop, kMaxSteps, false, false};
    c.mixing_scale *= 0.5;
    return {Move::kReject, kActive, false, false};
  }
  c.rejections = 0;
  const double tolerance =
      rules.atol + smaller(rules.rtol * at.norm_gx, Safeguard::kCap * c.scale0);
  const bool improved = step == 1 || at.residual < c.best;
  const bool progressed = step == 1 || at.residual < Safeguard::kProgress * c.best;
  c.since_best = progressed ? 0 : c.since_best + 1;
  if (improved) {
    c.best = at.residual;
    c.mixing_scale = smaller(1.0, 2.0 * c.mixing_scale);
  }
  if (c.best <= Safeguard::kGain * c.gain_residual) {
    c.gain_residual = c.best;
    c.gain_step = static_cast<double>(step);
  }
  if (at.residual <= tolerance) {
    if (hidden_by_rounding(c, at, rules)) return {Move::kStop, kDiverged, improved, false};
    return {Move::kStop, kConverged, true, false};
  }
  if (ran_away(c, at, rules, step)) return {Move::kStop, kDiverged, improved, false};
  if (at_floor(c, at, rules, step)) return {Move::kStop, kStalled, improved, false};
  if (step >= rules.max_steps) return {Move::kStop, kMaxSteps, improved, false};
  Decision out{Move::kPicard, kActive, improved, false};
  if (rules.safeguarded) out.move = next_move(c, at, out);
  return out;
}

}  // namespace fpi

// The rules that end a sample's solve or choose its next step: one copy for the CPU and CUDA.
// fpi_cuda/ops/rules.py says the same in torch, and tests hold the two together.
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
  double residual;  // ||g(x) - x||, NaN or Inf when g(x) is not finite
  double norm_gx;   // ||g(x)||
  double norm_x;    // ||x||, read at the first step only
};

struct Rules {
  double atol;
  double rtol;
  double epsilon;  // of the state's dtype
  double largest;  // number of the dtype that a step is computed in
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
  static constexpr double kCap = 0.1;      // relative tolerance against the starting scale
  static constexpr double kFall = 0.01;    // or against the peak, where ||g|| has since grown
  static constexpr double kSettled = 4.0;  // by no more than this
  static constexpr double kDriftFraction = 0.25;  // of that scale
  static constexpr double kLeastFall = 0.125;     // of the peak, where rounding ends the fall
  static constexpr double kGrowth = 10.0;         // over the best residual, borne without a restart
  static constexpr double kPatience = 3.0;
  static constexpr double kProgress = 0.9;  // of the best residual, to count as a new best
  static constexpr double kAnchorRelease =
      0.35;                                    // of the best residual at the anchor, to forget it
  static constexpr double kFirstPicard = 9.0;  // plain steps at the start
  static constexpr double kMinFirstPicard = 4.0;  // fewer, where the residual has fallen to
  static constexpr double kFirstGain = 0.05;      // this part of the first
  static constexpr double kFirstGrowth = 8.0;     // times kPicardGrowth: a transient may pass
  static constexpr double kPicardLength = 8.0;
  static constexpr double kPicardGrowth = 4.0;  // since the phase began; ends it early
  static constexpr double kDivergence = 1e6;    // of the first residual
  static constexpr double kRise = 1.1;          // of the peak, to count as growth
  static constexpr double kNearPeak = 0.5;      // of it, to be as large as ever
  static constexpr double kOverflow = 1e-3;     // of the largest number
  static constexpr int kRejections = 8;
  static constexpr double kGain = 0.9;
  static constexpr double kFloor = 64.0;        // epsilons, relative to ||g||
  static constexpr double kHalfFloor = 8.0;     // of a dtype of 16 bits
  static constexpr double kHalfEpsilon = 1e-4;  // above it, a dtype has 16 bits
};

FPI_HD double larger(double a, double b) { return a > b ? a : b; }
FPI_HD double smaller(double a, double b) { return a < b ? a : b; }

// The residual over ||g||, as it is kept; nobody asks by how much it is more than all of it.
FPI_HD float relative(const Measured& at) {
  return static_cast<float>(smaller(at.residual / at.norm_gx, 1.0));
}

// Remembers nothing but `floor`, which is given.
FPI_HD void start(Control& c, const Measured& at) {
  c.scale0 = larger(at.norm_x, at.norm_gx);
  c.first = c.best = c.gain_residual = c.peak = at.residual;
  c.peak_norm = at.norm_gx;
  c.best_relative = relative(at);
  c.previous = Safeguard::kFirstGrowth * at.residual;
  c.gain_step = c.growth_step = 1;
  c.since_best = 0;
  c.patience = Safeguard::kPatience;
  c.picard_length = Safeguard::kPicardLength;
  c.picard_left = Safeguard::kFirstPicard;
  c.mixing_scale = 1;
  c.rejections = 0;
  c.columns = c.head = 0;
  c.has_previous = c.anchored = 0;
}

// The part of ||g|| below which the state's rounding decides about a residual. A bound of many
// epsilons would call half of ||g|| a floor where the state has 16 bits.
FPI_HD double least_floor(const Rules& rules) {
  const double epsilons =
      rules.epsilon > Safeguard::kHalfEpsilon ? Safeguard::kHalfFloor : Safeguard::kFloor;
  return epsilons * rules.epsilon;
}

// The best residual cannot be told from rounding at its own point, and has not fallen for a long
// while: longer than the last Picard phase, whose residual may rise before it falls. Where the
// noise of g was measured there is nothing to wait for.
FPI_HD bool at_floor(const Control& c, const Rules& rules, int64_t step) {
  const double least = least_floor(rules);
  const double phase = rules.safeguarded && c.floor <= least ? c.picard_length : 0.0;
  return static_cast<double>(step) - c.gain_step >= larger(rules.stall_steps, phase) &&
         c.best_relative <= larger(least, c.floor);
}

// The residual has grown by orders over the first, and grows still: a cycle does not, nor does a
// sample that has left its peak behind.
FPI_HD bool grows(const Control& c, const Measured& at, const Rules& rules, int64_t step) {
  const double reference = larger(c.first, Safeguard::kFloor * rules.epsilon * c.scale0);
  return c.peak > Safeguard::kDivergence * reference &&
         static_cast<double>(step) - c.growth_step < rules.stall_steps &&
         !(at.residual < Safeguard::kNearPeak * c.peak);
}

// Growth alone is no divergence: from a small start a state may grow by any number of orders on
// its way to a fixed point. It is where nothing can follow but overflow, unless the safeguard goes
// back, and where no step is left.
FPI_HD bool ran_away(const Control& c, const Measured& at, const Rules& rules, int64_t step) {
  return !rules.safeguarded && at.residual > Safeguard::kOverflow * rules.largest &&
         grows(c, at, rules, step);
}

FPI_HD Status at_last_step(const Control& c, const Measured& at, const Rules& rules, int64_t step) {
  return grows(c, at, rules, step) ? kDiverged : kMaxSteps;
}

// The peak counts from where ||g|| last grew by far. Points of the accelerated step do not count:
// one that overshoots says nothing of the map's own way.
FPI_HD void watch_peak(Control& c, const Measured& at, const Rules& rules, int64_t step) {
  if (rules.safeguarded && c.picard_left == 0) return;
  const bool rose = at.residual > Safeguard::kRise * c.peak;
  if (rose) c.growth_step = static_cast<float>(step);
  if (!rose && at.norm_gx <= Safeguard::kSettled * c.peak_norm) return;
  c.peak = at.residual;
  c.peak_norm = at.norm_gx;
}

// This part of the peak, where it may stand in for the starting scale: a map without a fixed point
// keeps its residual, or loses it no faster than ||g|| grows; one that goes from a small start to a
// fixed point of another size loses it while ||g|| stays.
FPI_HD double of_peak(const Control& c, const Measured& at, double part) {
  return at.norm_gx <= Safeguard::kSettled * c.peak_norm ? part * c.peak : 0.0;
}

// The same where rounding keeps the residual from falling that far.
FPI_HD double of_rounding(const Control& c, const Measured& at, const Rules& rules) {
  const double rounding = rules.epsilon * at.norm_gx;
  if (!(rounding <= of_peak(c, at, Safeguard::kDriftFraction))) return 0.0;
  return smaller(Safeguard::kHalfFloor * rounding, of_peak(c, at, Safeguard::kLeastFall));
}

// Drifting off is no convergence, however large ||g|| becomes.
FPI_HD double tolerance(const Control& c, const Measured& at, const Rules& rules) {
  const double fallen = larger(of_peak(c, at, Safeguard::kFall), of_rounding(c, at, rules));
  const double cap = larger(Safeguard::kCap * c.scale0, fallen);
  return rules.atol + smaller(rules.rtol * at.norm_gx, cap);
}

// x has run so far from where it started that rounding may hide a residual of the cap's size: a
// map without a fixed point must not pass for converged there.
FPI_HD bool hidden_by_rounding(const Control& c, const Measured& at, const Rules& rules) {
  const double scale = larger(c.scale0, of_peak(c, at, 1.0));
  return rules.epsilon * at.norm_gx > rules.atol + Safeguard::kDriftFraction * scale;
}

// The first Picard phase is there for the transients of a map; where it has none, the phase ends.
FPI_HD bool first_phase_gained(const Control& c, const Measured& at) {
  return c.patience == Safeguard::kPatience &&
         c.picard_left <= Safeguard::kFirstPicard - (Safeguard::kMinFirstPicard - 1.0) &&
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
  if (in_phase) {
    c.picard_left = picard_grew || first_phase_gained(c, at) ? 0 : c.picard_left - 1;
    if (c.picard_left > 0) return Move::kPicard;
    c.since_best = 0;
    if (picard_grew && grew) {
      c.anchored = 0;
      c.columns = 0;
      return Move::kReturn;
    }
    c.anchored = c.best;
    out.anchors = true;
    return Move::kMix;
  }
  if (c.best <= Safeguard::kAnchorRelease * c.anchored) c.anchored = 0;
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
    if (step >= rules.max_steps)
      return {Move::kStop, at_last_step(c, at, rules, step), false, false};
    c.mixing_scale *= 0.5;
    return {Move::kReject, kActive, false, false};
  }
  watch_peak(c, at, rules, step);
  const bool improved = step == 1 || at.residual < c.best;
  const bool progressed = step == 1 || at.residual < Safeguard::kProgress * c.best;
  c.since_best = progressed ? 0 : c.since_best + 1;
  // A Picard iteration that runs into overflow would go on for ever, thrown back each time.
  if (improved || rules.safeguarded) c.rejections = 0;
  if (improved) {
    c.best = at.residual;
    c.best_relative = relative(at);
    c.mixing_scale = static_cast<float>(smaller(1.0, 2.0 * c.mixing_scale));
  }
  if (c.best <= Safeguard::kGain * c.gain_residual) {
    c.gain_residual = c.best;
    c.gain_step = static_cast<float>(step);
  }
  if (at.residual <= tolerance(c, at, rules)) {
    if (hidden_by_rounding(c, at, rules)) return {Move::kStop, kDiverged, improved, false};
    return {Move::kStop, kConverged, true, false};
  }
  if (ran_away(c, at, rules, step)) return {Move::kStop, kDiverged, improved, false};
  if (at_floor(c, rules, step)) return {Move::kStop, kStalled, improved, false};
  if (step >= rules.max_steps) {
    return {Move::kStop, at_last_step(c, at, rules, step), improved, false};
  }
  Decision out{Move::kPicard, kActive, improved, false};
  if (rules.safeguarded) out.move = next_move(c, at, out);
  return out;
}

}  // namespace fpi

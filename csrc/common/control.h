// What the rules remember about one sample between steps: one row of the `control` tensor.
#pragma once

#include "macros.h"

namespace fpi {

// The tensor is float64; what needs no more than float32 lies two to a number at its end. Counters
// are exact to 2^24, and far beyond it off by a part in as many. The order is that of
// fpi_cuda/ops/solver_state.py.
struct Control {
  double scale0;         // max(||x0||, ||g(x0)||)
  double first;          // residual at x0
  double best;           // smallest residual so far
  double previous;       // residual that the present Picard phase is held against
  double gain_residual;  // residual when it last fell by a tenth
  double peak;           // largest residual, to a tenth, since ||g|| last grew by far
  double peak_norm;      // ||g|| there
  double anchored;       // `best` when the anchor was kept; 0 where there is none to return to
  float best_relative;   // `best` over ||g|| at that point
  float floor;           // of a relative residual, where g is noisier than the state; else 0
  float gain_step;       // step at which the residual last fell by a tenth
  float growth_step;     // and at which `peak` last rose by a tenth
  float since_best;      // steps since `best` fell by a tenth
  float patience;        // steps without a new best that are borne before the next Picard phase
  float picard_length;   // length of the next Picard phase
  float picard_left;     // steps left of the present Picard phase
  float mixing_scale;    // factor on beta: halved by a non-finite g
  float rejections;      // non-finite evaluations in a row, or, of Picard, since `best` fell
  float columns;         // differences in the history
  float head;            // slot of the newest difference
  float has_previous;    // 1 where f_previous and its partner hold the evaluation before this one
  float unused;          // fills the last number
};

constexpr int kMaxDepth = 16;  // of a history; fpi_cuda.options.MAX_DEPTH
constexpr int kControlSize = sizeof(Control) / sizeof(double);

}  // namespace fpi

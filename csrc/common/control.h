// What the rules remember about one sample between steps: one row of the `control` tensor.
#pragma once

#include "macros.h"

namespace fpi {

// All doubles, so that the row is a plain float64 tensor that any backend can read. Counters are
// exact far beyond any step cap. The order is that of fpi_cuda/control.py.
struct Control {
  double scale0;         // max(||x0||, ||g(x0)||): caps the relative tolerance
  double first;          // residual at x0
  double best;           // smallest residual so far
  double previous;       // residual that the present Picard phase is held against
  double gain_residual;  // residual when it last fell by a tenth
  double gain_step;      // and the step at which it did
  double since_best;     // steps since `best` fell by a tenth
  double patience;       // steps without a new best that are borne before the next Picard phase
  double picard_length;  // length of the next Picard phase
  double picard_left;    // steps left of the present Picard phase
  double mixing_scale;   // factor on beta: halved by a non-finite g
  double rejections;     // non-finite evaluations in a row
  double growths;        // steps in a row that grew the residual past the bound
  double columns;        // differences in the history
  double head;           // slot of the newest difference
  double has_previous;   // 1 where f_previous and its partner hold the evaluation before this one
  double anchored;       // `best` when the anchor was kept; 0 where there is none to return to
};

constexpr int kMaxDepth = 16;  // of a history; fpi_cuda.options.MAX_DEPTH
constexpr int kControlSize = sizeof(Control) / sizeof(double);

}  // namespace fpi

// Arguments of one step over a batch: plain pointers and sizes, strides in elements.
#pragma once

#include <cstdint>

namespace fpi {

// x and gx hold `rows` samples; every other array holds all of the batch, and row i of x is sample
// sample_of[i] of it (or i where sample_of is null). All arrays are contiguous.
struct StepParams {
  void* x;                   // (rows, dim) state dtype: the point; overwritten with the next
  const void* gx;            // (rows, dim) state dtype
  const int64_t* sample_of;  // (rows,) or null
  void* best;                // (batch, dim) state dtype; the point to return, once stopped
  void* anchor;              // (batch, dim) state dtype; null for Picard
  // The evaluation before this one, f and g(x) (Anderson) or f and x (Broyden). Null for Anderson
  // where the history is in the compute dtype: it then lies in the slot of the next difference.
  void* f_previous;        // (batch, dim) compute dtype
  void* partner_previous;  // (batch, dim) compute dtype
  void* columns_f;         // (batch, depth, dim) history dtype: dF, or Broyden's u
  void* columns_g;         // (batch, depth, dim) history dtype: dG, or Broyden's v
  double* gram;            // (batch, gram_size(depth)); null for Broyden and Picard
  double* control;         // (batch, kControlSize)
  const double* atol;      // (batch,)
  int8_t* status;          // (batch,)
  int32_t* num_steps;      // (batch,)
  double* residual;        // (batch,) of the point to return once stopped, else of x
  int64_t rows;
  int64_t dim;
  int32_t depth;  // 0 for Picard
  double rtol;
  int64_t max_steps;
  double beta;
  double ridge;
};

}  // namespace fpi

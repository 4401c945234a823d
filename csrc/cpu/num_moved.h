// How many stopped samples have another residual than the one that they stopped with.
#pragma once

#include <cstdint>

#include "../common/state_type.h"
#include "parallel.h"

namespace fpi {

// All arrays are contiguous and hold the whole batch.
struct NumMovedParams {
  const void* x;           // (rows, dim) state dtype
  const void* gx;          // (rows, dim) state dtype
  const int8_t* status;    // (rows,)
  const double* residual;  // (rows,) as it was recorded
  int64_t rows;
  int64_t dim;
  double rounding;  // share of a residual that another order of its sum may change
};

int64_t num_moved_cpu(const NumMovedParams& p, StateType state, ParallelFor run);

}  // namespace fpi

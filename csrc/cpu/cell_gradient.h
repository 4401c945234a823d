// What an adjoint of a lowered cell needs around its loop and its products, on the CPU. State in
// float32 or float64, as every array of it.
#pragma once

#include <cstdint>

#include "../common/state_type.h"
#include "parallel.h"

namespace fpi {

// atol[i] = rtol ||v[i]|| for rows (batch, dim). False where a row is not finite, or so far from 1
// that products lose digits and it is to be scaled: fpi_cuda.autograd.scaling.factor_of says when.
bool adjoint_tolerances_cpu(const void* v, StateType state, int64_t batch, int64_t dim, double rtol,
                            double* atol, ParallelFor run);

// delta = c * slope for (count,) each.
void multiply_cpu(const void* c, const void* slope, void* delta, StateType state, int64_t count,
                  ParallelFor run);

}  // namespace fpi

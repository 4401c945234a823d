// fpi_cuda._C.HostSteps: the arrays of one solve on the CPU, and the steps that are taken on them.
#pragma once

#include <cstdint>

#include "common/state_type.h"
#include "common/step_params.h"
#include "python/library.h"

namespace fpi {

// What one solve is: sizes, and the solver's numbers, as StepParams has them.
struct HostSolve {
  bool broyden;
  StateType state, history;
  std::int64_t batch, dim;
  int depth;
  double rtol;
  std::int64_t max_steps;
  double beta, ridge;
};

// Where an array begins in the memory of a solve, in bytes, and how much there is in all.
struct HostArrays {
  explicit HostArrays(const HostSolve& solve);
  std::int64_t gram, anchor, f_previous, partner_previous, columns_f, columns_g, size;
};

// Holds addresses: whoever makes it keeps the arrays. Free of Python.
class HostSteps {
 public:
  // x, best (batch, dim), status, num_steps, residual and atol (batch,) are as in StepParams;
  // memory has HostArrays(solve).size bytes, and scalars (batch, kControlSize + 1) takes control,
  // and behind it atol. All but x is written to: best gets x, for every sample begins there. atol
  // may be 0, and then `tolerance` is that of every sample.
  HostSteps(const HostSolve& solve, std::uintptr_t memory, std::uintptr_t scalars, std::uintptr_t x,
            std::uintptr_t best, std::uintptr_t status, std::uintptr_t num_steps,
            std::uintptr_t residual, std::uintptr_t atol, double tolerance);

  // A step from gx (rows, dim). Returns how many of the rows are active.
  std::int64_t step(std::uintptr_t gx);

  // Copies the active rows to x and their samples to sample_of (int64), in order; the next steps
  // advance these.
  void gather(std::uintptr_t x, std::uintptr_t sample_of);

  // Numbers that a step reads and writes: by that a caller knows whether others should run meanwhile.
  std::int64_t size() const { return params_.rows * params_.dim * (2 * params_.depth + 4); }

 private:
  const Library& library_;
  StepParams params_{};
  const bool broyden_;
  const StateType state_, history_;
};

}  // namespace fpi

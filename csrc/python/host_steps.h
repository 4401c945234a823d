// fpi_cuda._C.HostSteps: the arrays of one solve on the CPU, and the steps that are taken on them.
#pragma once

#include <array>
#include <cstdint>

#include "common/state_type.h"
#include "common/step_params.h"
#include "python/library.h"

namespace fpi {

// Holds addresses: whoever makes it keeps the arrays, and hands over no others than the ops of
// csrc/step_ops.cpp take. Free of Python.
class HostSteps {
 public:
  // Those of StepParams from `best` on, in its order; 0 for null.
  static constexpr int kArrays = 12;
  using Arrays = std::array<std::uintptr_t, kArrays>;

  HostSteps(bool broyden, StateType state, StateType history, const Arrays& arrays,
            std::int64_t dim, int depth, double rtol, std::int64_t max_steps, double beta,
            double ridge);

  // x (rows, dim) is what the next steps advance; sample_of (rows,) int64 names its samples, 0 all.
  void hold(std::uintptr_t x, std::uintptr_t sample_of, std::int64_t rows);

  // A step from gx (rows, dim). Returns how many of the rows are active.
  std::int64_t step(std::uintptr_t gx);

  // Copies the active rows to x and their samples to sample_of, in order, and holds these.
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

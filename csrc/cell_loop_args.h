// What the cell loop op was given, checked, as its kernels take it.
#pragma once

#include "array_checker.h"
#include "common/state_type.h"

namespace fpi {

constexpr const char* kCellLoop = "cell_loop_";

// By the names of the schema.
struct CellLoopTensors {
  torch::stable::Tensor x;
  std::optional<torch::stable::Tensor> x_factor;
  CellLayerTensors layers[2];
  torch::stable::Tensor atol, status, num_steps, residual;
};

// Every array of `t`, all on the device of x. What is no array is left to the caller.
CellLoopParams checked_arrays(const CellLoopTensors& t);

// Of x, which is float32 or float64.
StateType cell_state(const torch::stable::Tensor& x);

}  // namespace fpi

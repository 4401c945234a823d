// What the cell loop op was given, checked, as its kernels take it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/cell_loop_params.h"
#include "common/state_type.h"

namespace fpi {

constexpr const char* kCellLoop = "cell_loop_";

struct CellLayerTensors {
  std::optional<torch::stable::Tensor> weight, bias, shift, factor;
  int64_t activation;
};

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

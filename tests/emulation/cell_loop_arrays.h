// The arrays of a loop of a lowered cell, for every driver of its kernels.
#pragma once

#include "../../csrc/common/cell_loop_params.h"

// In the order of the op's schema; a layer has weight, bias, shift and factor.
enum CellLoopArray {
  kX,
  kXFactor,
  kLayer1,
  kLayer2 = kLayer1 + 4,
  kAtol = kLayer2 + 4,
  kStatus,
  kNumSteps,
  kResidual,
  kCellLoopArrays,
};

// data(CellLoopArray) is where an array lies, or null; two layers where `hidden` is not 0. Strides,
// activations and options are left to the caller.
template <class Data>
fpi::CellLoopParams cell_loop_params_of(const Data& data, int64_t batch, int64_t dim,
                                        int64_t hidden) {
  fpi::CellLoopParams p{};
  p.num_layers = hidden ? 2 : 1;
  for (int l = 0; l < p.num_layers; ++l) {
    fpi::CellLayer& layer = p.layers[l];
    const int first = l ? kLayer2 : kLayer1;
    layer.weight = data(first);
    layer.bias = data(first + 1);
    layer.shift = data(first + 2);
    layer.factor = data(first + 3);
    layer.outputs = l == 0 && hidden ? hidden : dim;
    layer.inputs = l == 0 ? dim : hidden;
  }
  p.x_factor = data(kXFactor);
  p.x = data(kX);
  p.atol = static_cast<double*>(data(kAtol));
  p.status = static_cast<int8_t*>(data(kStatus));
  p.num_steps = static_cast<int32_t*>(data(kNumSteps));
  p.residual = static_cast<double*>(data(kResidual));
  p.batch = batch;
  p.dim = dim;
  return p;
}

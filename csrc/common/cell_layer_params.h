// Arguments of one layer of a lowered cell, and of its derivatives: plain pointers and sizes.
#pragma once

#include <cstdint>

#include "cell_loop_params.h"

namespace fpi {

// out = layer(h), and slope = factor * derivative(weight h + bias + shift).
struct CellLayerParams {
  CellLayer layer;
  const void* h;          // (batch, inputs)
  void* out;              // (batch, outputs) or null
  void* slope;            // (batch, outputs) or null
  Activation derivative;  // of the layer's activation
  int64_t batch;
};

// out[j][k] = sum over i of delta[i][j] h[i][k].
struct WeightGradientParams {
  const void* delta;  // (batch, outputs)
  const void* h;      // (batch, inputs)
  void* out;          // (outputs, inputs)
  int64_t batch;
  int64_t outputs;
  int64_t inputs;
};

}  // namespace fpi

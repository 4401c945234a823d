// Arguments of a whole solve of a lowered cell: plain pointers and sizes, strides in elements.
#pragma once

#include <cstdint>

#include "activation.h"
#include "precision.h"

namespace fpi {

// y = factor * activation(weight h + bias + shift), row by row; null stands for no such term.
struct CellLayer {
  const void* weight;  // (outputs, inputs)
  int64_t outputs;
  int64_t inputs;
  int64_t output_stride;
  int64_t input_stride;
  const void* bias;    // (outputs,)
  const void* shift;   // (batch, outputs)
  const void* factor;  // (batch, outputs)
  Activation activation;
};

// The map x -> last layer(... first layer(x_factor * x)) + carry * x.
struct CellLoopParams {
  CellLayer layers[2];
  int32_t num_layers;    // 1 or 2
  const void* x_factor;  // (batch, dim) or null
  double carry;
  void* x;             // (batch, dim) where to start; overwritten with the point to return
  const double* atol;  // (batch,)
  int8_t* status;      // (batch,)
  int32_t* num_steps;  // (batch,)
  double* residual;    // (batch,) of the point returned
  int64_t batch;
  int64_t dim;
  int32_t depth;  // of Anderson's history; 0 for Picard
  double rtol;
  int64_t max_steps;
  double beta;
  double ridge;
  Precision precision;  // of the products with the weights
};

}  // namespace fpi

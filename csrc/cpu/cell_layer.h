// One layer of a lowered cell for the whole batch, and the gradient of its weight, on the CPU.
#pragma once

#include "../common/cell_layer_params.h"
#include "../common/state_type.h"
#include "parallel.h"
#include "workspace.h"

namespace fpi {

// In float32 or float64, as every array of it.
//
// packed: the weight, as cell_loop_cpu leaves it, not rounded; null: it is packed here.
void cell_layer_cpu(const CellLayerParams& p, const void* packed, StateType state, int64_t threads,
                    ParallelFor run, Workspace& memory);

// Sums of this many samples are added up: no sum of rounded terms grows longer.
constexpr int64_t kSamplesPerSum = 256;

void weight_gradient_cpu(const WeightGradientParams& p, StateType state, int64_t threads,
                         ParallelFor run, Workspace& memory);

}  // namespace fpi

// The whole fixed-point loop of a lowered cell on the CPU: a tile of samples per thread.
#pragma once

#include "../common/cell_loop_params.h"
#include "parallel.h"
#include "step.h"
#include "workspace.h"

namespace fpi {

// Samples that one thread iterates at a time.
int64_t cell_loop_tile(const CellLoopParams& p, StateType state, int64_t threads);

// Solves for every sample. State in float32 or float64, and so every other array of the map. The
// packed weights stay in memory.weights.
void cell_loop_cpu(const CellLoopParams& p, StateType state, int64_t threads, ParallelFor run,
                   Workspace& memory);

}  // namespace fpi

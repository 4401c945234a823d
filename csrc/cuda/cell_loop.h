// The whole fixed-point loop of a lowered cell on a CUDA device, for callers without CUDA headers.
#pragma once

#include "../common/cell_loop_params.h"
#include "../common/state_type.h"
#include "cell_loop_plan.h"

namespace fpi {

// Those of the current device. Returns what went wrong, or null.
const char* device_limits(DeviceLimits& limits);

// Solves for every sample, on `stream` (a cudaStream_t) of the current device. State in float32 or
// float64, and so every other array of the map. `workspace` holds plan.workspace_bytes, aligned to
// 128 bytes. Returns what went wrong with the launch, or null.
const char* cell_loop_cuda(const CellLoopParams& p, StateType state, const CellLoopPlan& plan,
                           void* workspace, void* stream);

}  // namespace fpi

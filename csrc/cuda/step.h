// The CUDA step kernels, for callers without CUDA headers.
#pragma once

#include "../common/state_type.h"
#include "../common/step_params.h"

namespace fpi {

// One Anderson step (Picard where depth is 0) of every active sample, in place, on `stream` (a
// cudaStream_t) of the current device. `scratch` holds step_scratch_bytes(). Returns what went wrong
// with the launch, or null.
const char* anderson_step_cuda(const StepParams& p, StateType state, StateType history,
                               void* scratch, void* stream);

// One limited-memory Broyden step of every active sample, likewise.
const char* broyden_step_cuda(const StepParams& p, StateType state, StateType history,
                              void* scratch, void* stream);

}  // namespace fpi

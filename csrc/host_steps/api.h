// Steps on the CPU, for callers of any language: plain C, so that one build serves every Python and
// every torch. csrc/python calls it, with what the ops of step_ops.cpp and look_ops.cpp check.
//
// A function returns null, or what went wrong: a text that is valid until the same thread's next
// call. Nothing is thrown.
#pragma once

#include <cstdint>

#include "common/state_type.h"
#include "common/step_params.h"

#define FPI_API extern "C" __attribute__((visibility("default")))

// One step of Broyden's method, else of Anderson's (Picard's where depth is 0), of every active
// sample of p, with the threads of torch. `active` tells how many of its rows are left.
FPI_API const char* fpi_host_step(const fpi::StepParams* p, bool broyden, fpi::StateType state,
                                  fpi::StateType history, int64_t* active);

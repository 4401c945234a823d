// The CPU step kernels. Types are chosen by the launchers in the .cpp files of the same names.
#pragma once

#include "../common/state_type.h"
#include "../common/step_params.h"
#include "parallel.h"

namespace fpi {

// One Anderson step (Picard where depth is 0) of every active sample, in place.
void anderson_step_cpu(const StepParams& p, StateType state, StateType history, ParallelFor run);

// The same for rows [first, last), on the calling thread; the history is stored as the state.
void anderson_rows_cpu(const StepParams& p, StateType state, int64_t first, int64_t last);

// What the two above do where there is no history.
void picard_step_cpu(const StepParams& p, StateType state, ParallelFor run);
void picard_rows_cpu(const StepParams& p, StateType state, int64_t first, int64_t last);

// One limited-memory Broyden step of every active sample, in place.
void broyden_step_cpu(const StepParams& p, StateType state, StateType history, ParallelFor run);

}  // namespace fpi

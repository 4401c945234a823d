#include "anderson_step.cuh"
#include "step_kernel.cuh"

namespace fpi {

const char* anderson_step_cuda(const StepParams& p, StateType state, StateType history,
                               void* scratch, void* stream) {
  return run_step<AndersonStep, true>(p, state, history, scratch, stream);
}

}  // namespace fpi

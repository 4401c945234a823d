// See api.h.
#include <exception>
#include <string>

#include "../common/status.h"
#include "../cpu/step.h"
#include "../on_cpu.h"
#include "api.h"

const char* fpi_host_step(const fpi::StepParams* p, bool broyden, fpi::StateType state,
                          fpi::StateType history, int64_t* active) {
  static thread_local std::string error;
  try {
    const auto step = broyden ? fpi::broyden_step_cpu : fpi::anderson_step_cpu;
    step(*p, state, history, fpi::on_torch_threads);
  } catch (const std::exception& raised) {
    error = raised.what();
    return error.c_str();
  }
  int64_t left = 0;
  for (int64_t i = 0; i < p->rows; ++i) {
    left += p->status[p->sample_of ? p->sample_of[i] : i] == fpi::kActive;
  }
  *active = left;
  return nullptr;
}

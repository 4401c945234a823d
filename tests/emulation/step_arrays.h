// The arrays of a step, for every driver of the step kernels.
#pragma once

#include "../../csrc/common/step_params.h"

// In the order of the ops' schema.
enum StepArray {
  kX,
  kGx,
  kSampleOf,
  kBest,
  kAnchor,
  kFPrevious,
  kPartner,
  kColumnsF,
  kColumnsG,
  kGram,
  kControl,
  kAtol,
  kStatus,
  kNumSteps,
  kResidual,
  kScratch,
  kStepArrays,
};

// data(StepArray) is where an array lies, or null. Sizes and options are left to the caller.
template <class Data>
fpi::StepParams step_params_of(const Data& data) {
  fpi::StepParams p{};
  p.x = data(kX);
  p.gx = data(kGx);
  p.sample_of = static_cast<int64_t*>(data(kSampleOf));
  p.best = data(kBest);
  p.anchor = data(kAnchor);
  p.f_previous = data(kFPrevious);
  p.partner_previous = data(kPartner);
  p.columns_f = data(kColumnsF);
  p.columns_g = data(kColumnsG);
  p.gram = static_cast<double*>(data(kGram));
  p.control = static_cast<double*>(data(kControl));
  p.atol = static_cast<double*>(data(kAtol));
  p.status = static_cast<int8_t*>(data(kStatus));
  p.num_steps = static_cast<int32_t*>(data(kNumSteps));
  p.residual = static_cast<double*>(data(kResidual));
  return p;
}

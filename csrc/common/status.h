// How one sample's solve ended. The values are those of fpi_cuda.Status.
#pragma once

#include <cstdint>

namespace fpi {

enum Status : int8_t {
  kActive = 0,
  kConverged = 1,
  kMaxSteps = 2,
  kStalled = 3,
  kDiverged = 4,
  kNonfinite = 5,
};

}  // namespace fpi

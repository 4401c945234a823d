// The threads of torch, for the kernels behind an op.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cpu/parallel.h"

namespace fpi {

// A ParallelFor, see cpu/parallel.h.
inline void on_torch_threads(int64_t begin, int64_t end, int64_t grain, const RangeBody& body) {
  if (end - begin <= grain) {
    if (end > begin) body(begin, end);
    return;
  }
  torch::stable::parallel_for(begin, end, grain, body);
}

}  // namespace fpi

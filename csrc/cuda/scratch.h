// Where the blocks that share one sample leave their partial sums and the plan, and how much room
// that takes. Needs no CUDA.
#pragma once

#include "../common/anderson_judge.h"
#include "../common/broyden_judge.h"
#include "../common/state_type.h"
#include "launch_config.h"

namespace fpi {

// One per sample; the partial sums of each part, `kSums` doubles, follow it.
template <class Plan, class Sums>
struct Rendezvous {
  static constexpr int kSums = sizeof(Sums) / sizeof(double);

  Plan plan;
  unsigned arrived;  // blocks of the present kernel that are done; 0 between kernels
  int live;          // 0 where the sample had stopped before this step

  static FPI_HD size_t bytes(int parts) {
    return sizeof(Rendezvous) + static_cast<size_t>(parts) * kSums * sizeof(double);
  }
  static FPI_HD Rendezvous& of(void* scratch, int64_t row, int parts) {
    return *reinterpret_cast<Rendezvous*>(static_cast<char*>(scratch) + row * bytes(parts));
  }
  FPI_HD double* partial(int part) {
    return reinterpret_cast<double*>(this + 1) + static_cast<int64_t>(part) * kSums;
  }
};

inline size_t compute_bytes(StateType state) {
  return state == StateType::kFloat64 ? sizeof(double) : sizeof(float);
}

// Room for a step of any solver over `rows` samples, in bytes; 0 where no sample is shared. It is
// zeroed once, and serves any number of steps, one after another.
inline size_t step_scratch_bytes(int64_t rows, int64_t dim, StateType state) {
  const LaunchConfig config = launch_config(dim, compute_bytes(state));
  if (config.shape != Shape::kSplit) return 0;
  const size_t anderson = Rendezvous<AndersonPlan, AndersonSums>::bytes(config.parts);
  const size_t broyden = Rendezvous<BroydenPlan, BroydenSums>::bytes(config.parts);
  return static_cast<size_t>(rows) * (anderson > broyden ? anderson : broyden);
}

}  // namespace fpi

// The slots of a tile: what a block keeps of each sample, who comes and goes, and their steps.
#pragma once

#include "../common/cell_loop_params.h"
#include "anderson_step.cuh"
#include "cell_loop_plan.h"

namespace fpi {

constexpr int64_t kNobody = -1;  // in a slot without a sample

// At the start of shared memory.
struct TileHeader {
  StepParams step;  // row and sample i of it are slot i
  int64_t samples[kMostSlots];
  int slots[kMostSlots];  // that hold a sample, side by side
};

static_assert(sizeof(TileHeader) <= kHeaderBytes);

// Where a block finds the arrays of its tile.
struct TileMemory {
  unsigned char* shared;
  unsigned char* part;  // of the workspace

  __device__ unsigned char* operator[](const Place& place) const {
    return (place.shared ? shared : part) + place.at;
  }
};

// A bit for every slot that holds a sample; by a whole warp.
inline __device__ uint64_t seated(const TileHeader& tile) {
  static_assert(kMostSlots == 2 * kWarpThreads);
  const unsigned low = __ballot_sync(kAllLanes, tile.samples[lane_index()] != kNobody);
  const unsigned high =
      __ballot_sync(kAllLanes, tile.samples[lane_index() + kWarpThreads] != kNobody);
  return low | static_cast<uint64_t>(high) << kWarpThreads;
}

// How many of them come before this one.
__device__ __forceinline__ int column_of(uint64_t seats, int slot) {
  return __popcll(seats & ((uint64_t{1} << slot) - 1));
}

// Sets up the step's view of the tile; by one thread.
inline __device__ void describe_step(const CellLoopParams& p, const CellLoopPlan& plan,
                                     const TileMemory& memory, StepParams& step) {
  step = StepParams{};
  step.x = memory[plan.x];
  step.gx = memory[plan.gx];
  step.best = memory[plan.best];
  step.anchor = memory[plan.anchor];
  step.columns_f = memory[plan.columns_f];
  step.columns_g = memory[plan.columns_g];
  step.gram = reinterpret_cast<double*>(memory[plan.gram]);
  step.control = reinterpret_cast<double*>(memory[plan.control]);
  step.atol = reinterpret_cast<const double*>(memory[plan.atol]);
  step.residual = reinterpret_cast<double*>(memory[plan.residual]);
  step.num_steps = reinterpret_cast<int32_t*>(memory[plan.num_steps]);
  step.status = reinterpret_cast<int8_t*>(memory[plan.status]);
  step.rows = plan.slots;
  step.dim = p.dim;
  step.depth = p.depth;
  step.rtol = p.rtol;
  step.max_steps = p.max_steps;
  step.beta = p.beta;
  step.ridge = p.ridge;
}

// Starts the solve of `sample` in an empty slot; by one warp.
template <class T>
__device__ void seat(const CellLoopParams& p, TileHeader& tile, int slot, int64_t sample) {
  const StepParams& step = tile.step;
  const T* x0 = static_cast<const T*>(p.x) + sample * p.dim;
  T* x = static_cast<T*>(step.x) + slot * p.dim;
  T* best = static_cast<T*>(step.best) + slot * p.dim;
  for (int64_t k = lane_index(); k < p.dim; k += kWarpThreads) x[k] = best[k] = x0[k];
  double* control = step.control + slot * kControlSize;
  for (int k = lane_index(); k < kControlSize; k += kWarpThreads) control[k] = 0.0;
  if (lane_index() == 0) {
    const_cast<double*>(step.atol)[slot] = p.atol[sample];
    step.status[slot] = kActive;
    step.num_steps[slot] = 0;
    tile.samples[slot] = sample;
  }
  __syncwarp();
}

// Hands over the sample that has stopped in a slot; by one warp.
template <class T>
__device__ void dismiss(const CellLoopParams& p, TileHeader& tile, int slot) {
  const StepParams& step = tile.step;
  const int64_t sample = tile.samples[slot];
  const T* best = static_cast<const T*>(step.best) + slot * p.dim;
  T* x = static_cast<T*>(p.x) + sample * p.dim;
  for (int64_t k = lane_index(); k < p.dim; k += kWarpThreads) x[k] = best[k];
  if (lane_index() == 0) {
    p.status[sample] = step.status[slot];
    p.num_steps[sample] = step.num_steps[slot];
    p.residual[sample] = step.residual[slot];
  }
  __syncwarp();  // everyone has read which sample it was
}

// The next sample of the batch that no tile has taken, or kNobody.
inline __device__ int64_t next_sample(int64_t batch, unsigned long long* queue) {
  unsigned long long sample = 0;
  if (lane_index() == 0) sample = atomicAdd(queue, 1ull);
  sample = __shfl_sync(kAllLanes, sample, 0);
  return sample < static_cast<unsigned long long>(batch) ? static_cast<int64_t>(sample) : kNobody;
}

// Takes the steps of the slots that fall to this warp. Samples that stop make room for others. One
// copy for each dtype, so that all kernels round alike. `room` is this warp's, in shared memory.
template <class T>
__device__ __noinline__ void take_steps(const CellLoopParams& p, TileHeader& tile, int slots,
                                        unsigned char* room, unsigned long long* queue) {
  using Step = AndersonStep<T, T>;
  static_assert(sizeof(TeamMemory<Step>) <= kStepFixedBytes);
  const Shared<Step, OneWarp> shared(room, p.depth);
  const int64_t tiles = ceil_div(p.dim, tile_elements(sizeof(T)));
  for (int slot = warp_index(); slot < slots; slot += warp_count()) {
    if (tile.samples[slot] == kNobody) continue;
    step_sample(tile.step, slot, slot, shared, tiles, true);
    __syncwarp();
    if (tile.step.status[slot] == kActive) continue;
    dismiss<T>(p, tile, slot);
    const int64_t sample = next_sample(p.batch, queue);
    if (sample != kNobody) {
      seat<T>(p, tile, slot, sample);
    } else if (lane_index() == 0) {
      tile.samples[slot] = kNobody;
    }
  }
}

}  // namespace fpi

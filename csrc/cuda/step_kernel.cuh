// The kernels that run a step, whatever the solver: one where a block holds a whole sample, and a
// chain of them where several blocks share one.
#pragma once

#include "launch.h"
#include "scratch.h"
#include "step.h"
#include "step_sample.cuh"

extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];

namespace fpi {

constexpr int kMostThreads = kMostWarps * kWarpThreads;
constexpr int kBlocksPerCore = 2;  // resident at once: bounds the registers of a thread

template <class Step>
using BlockShared = Shared<Step, WholeBlock>;

template <class Step>
using Meeting = Rendezvous<typename Step::Plan, typename Step::Sums>;

__device__ __forceinline__ int64_t sample_at(const StepParams& p, int64_t row) {
  return p.sample_of ? p.sample_of[row] : row;
}

template <class Step>
__global__ void __launch_bounds__(kMostThreads, kBlocksPerCore)
    step_kernel(const __grid_constant__ StepParams p, int64_t tiles, bool aligned) {
  const int64_t sample = sample_at(p, blockIdx.x);
  if (p.status[sample] != kActive) return;
  const BlockShared<Step> shared(dynamic_shared_memory, p.depth);
  step_sample(p, blockIdx.x, sample, shared, tiles, aligned);
}

// Sums of one part of a sample; the last of its blocks to finish decides for the sample.
template <class Step, int kPass>
__global__ void __launch_bounds__(kMostThreads, kBlocksPerCore)
    sums_kernel(const __grid_constant__ StepParams p, LaunchConfig config, int64_t tiles,
                bool aligned, void* scratch) {
  const int64_t i = blockIdx.x / config.parts;
  const int part = static_cast<int>(blockIdx.x % config.parts);
  const int64_t sample = sample_at(p, i);
  auto& meeting = Meeting<Step>::of(scratch, i, config.parts);
  if (kPass == 0 ? p.status[sample] != kActive : meeting.live == 0) {
    if (part == 0 && threadIdx.x == 0) meeting.live = 0;
    return;
  }
  const typename Step::R row(p, i, sample, aligned);
  const BlockShared<Step> shared(dynamic_shared_memory, p.depth);
  auto& m = shared.memory;
  shared.fetch(p, sample);
  if (kPass > 0 && threadIdx.x == 0) m.plan = meeting.plan;
  __syncthreads();
  // num_steps counts this step once the first pass is through; only that pass needs to know.
  const bool first = kPass == 0 && p.num_steps[sample] == 0;
  const int64_t begin = part * config.tiles_per_part;
  const int64_t end = begin + config.tiles_per_part;
  take_sums<kPass, typename Step::C>(shared, row, first, false,
                                     TileRange{begin, end < tiles ? end : tiles});
  constexpr int kSums = BlockShared<Step>::kSums;
  double* sums = reinterpret_cast<double*>(&m.sums);
  for (int k = threadIdx.x; k < kSums; k += blockDim.x) meeting.partial(part)[k] = sums[k];
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    m.last = atomicAdd(&meeting.arrived, 1u) == static_cast<unsigned>(config.parts - 1);
  }
  __syncthreads();
  if (!m.last) return;
  __threadfence();

  // Past the first-level cache, which does not see what other blocks wrote.
  for (int k = lane_index(); k < kSums; k += kWarpThreads) {
    double sum = 0.0;
    for (int q = warp_index(); q < config.parts; q += warp_count()) {
      sum += __ldcg(meeting.partial(q) + k);
    }
    shared.slab[warp_index() * kSums + k] = sum;
  }
  shared.combine();
  settle<kPass>(p, shared, row, first, TileRange{0, tiles});
  shared.write_back(p, sample);
  if (threadIdx.x == 0) {
    meeting.plan = m.plan;
    meeting.arrived = 0;
    meeting.live = 1;
  }
}

template <class Step>
__global__ void __launch_bounds__(kMostThreads, kBlocksPerCore)
    advance_kernel(const __grid_constant__ StepParams p, LaunchConfig config, int64_t tiles,
                   bool aligned, void* scratch) {
  const int64_t i = blockIdx.x / config.parts;
  const int part = static_cast<int>(blockIdx.x % config.parts);
  const int64_t sample = sample_at(p, i);
  auto& meeting = Meeting<Step>::of(scratch, i, config.parts);
  if (meeting.live == 0) return;
  const typename Step::R row(p, i, sample, aligned);
  const BlockShared<Step> shared(dynamic_shared_memory, p.depth);
  shared.fetch(p, sample);
  if (threadIdx.x == 0) shared.memory.plan = meeting.plan;
  __syncthreads();
  const int64_t begin = part * config.tiles_per_part;
  const int64_t end = begin + config.tiles_per_part;
  advance(shared, row, TileRange{begin, end < tiles ? end : tiles});
}

// Whether every array of the step may be read and written by fours.
template <class T, class H>
bool all_aligned(const StepParams& p) {
  using C = typename Numeric<T>::Compute;
  const auto fits = [](const void* pointer, size_t alignment) {
    return reinterpret_cast<uintptr_t>(pointer) % alignment == 0;
  };
  return fits(p.x, alignof(Quad<T>)) && fits(p.gx, alignof(Quad<T>)) &&
         fits(p.best, alignof(Quad<T>)) && fits(p.anchor, alignof(Quad<T>)) &&
         fits(p.columns_f, alignof(Quad<H>)) && fits(p.columns_g, alignof(Quad<H>)) &&
         fits(p.f_previous, alignof(Quad<C>)) && fits(p.partner_previous, alignof(Quad<C>));
}

template <class Step>
const char* run_step(const StepParams& p, void* scratch, void* stream) {
  using C = typename Step::C;
  if (p.rows == 0) return nullptr;
  const LaunchConfig config = launch_config(p.dim, sizeof(C));
  const int64_t tiles = ceil_div(p.dim, tile_elements(sizeof(C)));
  const bool aligned = all_aligned<typename Step::State, typename Step::History>(p);
  const size_t shared = BlockShared<Step>::bytes(p.depth, config.threads / kWarpThreads);
  if (config.shape != Shape::kSplit) {
    return launch(step_kernel<Step>, p.rows, config.threads, shared, stream, p, tiles, aligned);
  }
  if (!scratch) return "samples of this size need scratch, and none was given";
  const int64_t blocks = p.rows * config.parts;
  const char* error = launch(sums_kernel<Step, 0>, blocks, config.threads, shared, stream, p,
                             config, tiles, aligned, scratch);
  if constexpr (Step::kPasses == 2) {
    if (error) return error;
    error = launch(sums_kernel<Step, Step::kPasses - 1>, blocks, config.threads, shared, stream, p,
                   config, tiles, aligned, scratch);
  }
  if (error) return error;
  return launch(advance_kernel<Step>, blocks, config.threads, shared, stream, p, config, tiles,
                aligned, scratch);
}

// The history is stored as the state, or, where it may be narrow, in bfloat16 under float32.
template <template <class, class> class Step, bool kMayBeNarrow>
const char* run_step(const StepParams& p, StateType state, StateType history, void* scratch,
                     void* stream) {
  switch (state) {
    case StateType::kFloat64: return run_step<Step<double, double>>(p, scratch, stream);
    case StateType::kBFloat16: return run_step<Step<BFloat16, BFloat16>>(p, scratch, stream);
    case StateType::kFloat16: return run_step<Step<Float16, Float16>>(p, scratch, stream);
    case StateType::kFloat32: break;
  }
  if constexpr (kMayBeNarrow) {
    if (history == StateType::kBFloat16) {
      return run_step<Step<float, BFloat16>>(p, scratch, stream);
    }
  }
  if (history != StateType::kFloat32) return "the history must have the dtype of the state";
  return run_step<Step<float, float>>(p, scratch, stream);
}

}  // namespace fpi

// The kernels that run a step, whatever the solver: one where a block holds a whole sample, and a
// chain of them where several blocks share one.
//
// A Step says what is summed (measure), what is decided from the sums (decide), and how the next
// point is written (advance). Anderson takes one set of sums, Broyden two.
#pragma once

#include "block.cuh"
#include "launch.h"
#include "scratch.h"
#include "step.h"

namespace fpi {

constexpr int kMostThreads = kMostWarps * kWarpThreads;
constexpr int kBlocksPerCore = 2;  // resident at once: bounds the registers of a thread

template <class Step>
using Meeting = Rendezvous<typename Step::Plan, typename Step::Sums>;

__device__ __forceinline__ int64_t sample_at(const StepParams& p, int64_t row) {
  return p.sample_of ? p.sample_of[row] : row;
}

template <class Step, int kPass, class Acc>
__device__ __forceinline__ void take_sums(const Block<Step>& block, const typename Step::R& row,
                                          bool first, bool again, const TileRange& range) {
  block.clear();
  for_each_tile<typename Step::C>(range, row.dim, row.aligned, [&](const Tile<typename Step::C>& t) {
    Step::template measure<kPass, Acc>(row, block.memory.control, block.memory.plan, first, again,
                                       t, block.warp_sums());
  });
  block.combine();
}

// Kept out of line: it is seldom run, and would cost the usual course its registers. Arguments by
// value, or the caller would have to keep them in memory.
template <class Step, int kPass>
__device__ __noinline__ void take_wide_sums(Block<Step> block, typename Step::R row, bool first,
                                            TileRange range) {
  take_sums<Step, kPass, double>(block, row, first, true, range);
}

// From the sums of a whole sample in block.memory.sums to its plan.
template <class Step, int kPass>
__device__ __forceinline__ void settle(const StepParams& p, const Block<Step>& block,
                                       const typename Step::R& row, bool first,
                                       const TileRange& whole) {
  auto& m = block.memory;
  if constexpr (sizeof(typename Step::C) == 4) {
    if (Step::template needs_wide<kPass>(row, m.control, m.sums, m.plan)) {
      take_wide_sums<Step, kPass>(block, row, first, whole);
    }
  }
  Measured at{};
  if constexpr (kPass == 0) at = measured_from(block, row, first, whole);
  __syncthreads();  // everyone has read what decide() changes
  if (threadIdx.x == 0) {
    Step::template decide<kPass>(p, row.sample, at, m.sums, block.gram, m.control, m.small, m.plan);
  }
  __syncthreads();
}

template <class Step>
__device__ __forceinline__ void advance(const Block<Step>& block, const typename Step::R& row,
                                        const TileRange& range) {
  for_each_tile<typename Step::C>(range, row.dim, row.aligned, [&](const Tile<typename Step::C>& t) {
    if (moved(row, block.memory.plan.decision, t)) return;
    Step::advance(row, block.memory.control, block.memory.plan, t);
  });
}

template <class Step>
__global__ void __launch_bounds__(kMostThreads, kBlocksPerCore) step_kernel(
    const __grid_constant__ StepParams p, int64_t tiles, bool aligned) {
  const int64_t sample = sample_at(p, blockIdx.x);
  if (p.status[sample] != kActive) return;
  const typename Step::R row(p, blockIdx.x, sample, aligned);
  const Block<Step> block(p.depth);
  const TileRange whole{0, tiles};
  block.fetch(p, sample);
  const bool first = p.num_steps[sample] == 0;
  take_sums<Step, 0, typename Step::C>(block, row, first, false, whole);
  settle<Step, 0>(p, block, row, first, whole);
  if constexpr (Step::kPasses == 2) {
    constexpr int kSecond = Step::kPasses - 1;
    take_sums<Step, kSecond, typename Step::C>(block, row, first, false, whole);
    settle<Step, kSecond>(p, block, row, first, whole);
  }
  advance(block, row, whole);
  block.write_back(p, sample);
}

// Sums of one part of a sample; the last of its blocks to finish decides for the sample.
template <class Step, int kPass>
__global__ void __launch_bounds__(kMostThreads, kBlocksPerCore) sums_kernel(
    const __grid_constant__ StepParams p, LaunchConfig config, int64_t tiles, bool aligned,
    void* scratch) {
  const int64_t i = blockIdx.x / config.parts;
  const int part = static_cast<int>(blockIdx.x % config.parts);
  const int64_t sample = sample_at(p, i);
  auto& meeting = Meeting<Step>::of(scratch, i, config.parts);
  if (kPass == 0 ? p.status[sample] != kActive : meeting.live == 0) {
    if (part == 0 && threadIdx.x == 0) meeting.live = 0;
    return;
  }
  const typename Step::R row(p, i, sample, aligned);
  const Block<Step> block(p.depth);
  auto& m = block.memory;
  block.fetch(p, sample);
  if (kPass > 0 && threadIdx.x == 0) m.plan = meeting.plan;
  __syncthreads();
  // num_steps counts this step once the first pass is through; only that pass needs to know.
  const bool first = kPass == 0 && p.num_steps[sample] == 0;
  const int64_t begin = part * config.tiles_per_part;
  const int64_t end = begin + config.tiles_per_part;
  take_sums<Step, kPass, typename Step::C>(block, row, first, false,
                                           TileRange{begin, end < tiles ? end : tiles});
  constexpr int kSums = Block<Step>::kSums;
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
    block.slab[warp_index() * kSums + k] = sum;
  }
  block.combine();
  settle<Step, kPass>(p, block, row, first, TileRange{0, tiles});
  block.write_back(p, sample);
  if (threadIdx.x == 0) {
    meeting.plan = m.plan;
    meeting.arrived = 0;
    meeting.live = 1;
  }
}

template <class Step>
__global__ void __launch_bounds__(kMostThreads, kBlocksPerCore) advance_kernel(
    const __grid_constant__ StepParams p, LaunchConfig config, int64_t tiles, bool aligned,
    void* scratch) {
  const int64_t i = blockIdx.x / config.parts;
  const int part = static_cast<int>(blockIdx.x % config.parts);
  const int64_t sample = sample_at(p, i);
  auto& meeting = Meeting<Step>::of(scratch, i, config.parts);
  if (meeting.live == 0) return;
  const typename Step::R row(p, i, sample, aligned);
  const Block<Step> block(p.depth);
  block.fetch(p, sample);
  if (threadIdx.x == 0) block.memory.plan = meeting.plan;
  __syncthreads();
  const int64_t begin = part * config.tiles_per_part;
  const int64_t end = begin + config.tiles_per_part;
  advance(block, row, TileRange{begin, end < tiles ? end : tiles});
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
  const size_t shared = Block<Step>::bytes(p.depth, config.threads);
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

// The history is stored as the state, or in bfloat16 under a float32 state.
template <template <class, class> class Step>
const char* run_step(const StepParams& p, StateType state, StateType history, void* scratch,
                     void* stream) {
  switch (state) {
    case StateType::kFloat64: return run_step<Step<double, double>>(p, scratch, stream);
    case StateType::kBFloat16: return run_step<Step<BFloat16, BFloat16>>(p, scratch, stream);
    case StateType::kFloat16: return run_step<Step<Float16, Float16>>(p, scratch, stream);
    case StateType::kFloat32: break;
  }
  if (history == StateType::kBFloat16) {
    return run_step<Step<float, BFloat16>>(p, scratch, stream);
  }
  return run_step<Step<float, float>>(p, scratch, stream);
}

}  // namespace fpi

// One step of a whole sample by one team of threads, whatever the solver.
//
// A Step says what is summed (measure), what is decided from the sums (decide), and how the next
// point is written (advance). Anderson takes one set of sums, Broyden two.
#pragma once

#include "shared.cuh"

namespace fpi {

template <int kPass, class Acc, class Step, class Team>
__device__ __forceinline__ void take_sums(const Shared<Step, Team>& shared,
                                          const typename Step::R& row, bool first, bool again,
                                          const TileRange& range) {
  using C = typename Step::C;
  shared.clear();
  for_each_tile<Team, C>(range, row.dim, row.aligned, [&](const Tile<C>& tile) {
    Step::template measure<kPass, Acc, Team>(row, shared.memory.control, shared.memory.plan, first,
                                             again, tile, shared.warp_sums());
  });
  shared.combine();
}

// Kept out of line: it is seldom run, and would cost the usual course its registers. Arguments by
// value, or the caller would have to keep them in memory.
template <int kPass, class Step, class Team>
__device__ __noinline__ void take_wide_sums(Shared<Step, Team> shared, typename Step::R row,
                                            bool first, TileRange range) {
  take_sums<kPass, double>(shared, row, first, true, range);
}

// From the sums of a whole sample in shared.memory.sums to its plan.
template <int kPass, class Step, class Team>
__device__ __forceinline__ void settle(const StepParams& p, const Shared<Step, Team>& shared,
                                       const typename Step::R& row, bool first,
                                       const TileRange& whole) {
  auto& m = shared.memory;
  if constexpr (sizeof(typename Step::C) == 4) {
    if (Step::template needs_wide<kPass>(row, m.control, m.sums, m.plan)) {
      take_wide_sums<kPass>(shared, row, first, whole);
    }
  }
  Measured at{};
  if constexpr (kPass == 0) at = measured_from(shared, row, first, whole);
  Team::sync();  // everyone has read what decide() changes
  if (Team::thread() == 0) {
    Step::template decide<kPass>(p, row.sample, at, m.sums, shared.gram, m.control, m.small,
                                 m.plan);
  }
  Team::sync();
}

template <class Step, class Team>
__device__ __forceinline__ void advance(const Shared<Step, Team>& shared,
                                        const typename Step::R& row, const TileRange& range) {
  using C = typename Step::C;
  for_each_tile<Team, C>(range, row.dim, row.aligned, [&](const Tile<C>& tile) {
    if (moved(row, shared.memory.plan.decision, tile)) return;
    Step::advance(row, shared.memory.control, shared.memory.plan, tile);
  });
}

// Takes the step of an active sample, which is row `row_index` of x and gx.
template <class Step, class Team>
__device__ __forceinline__ void step_sample(const StepParams& p, int64_t row_index, int64_t sample,
                                            const Shared<Step, Team>& shared, int64_t tiles,
                                            bool aligned) {
  const typename Step::R row(p, row_index, sample, aligned);
  const TileRange whole{0, tiles};
  shared.fetch(p, sample);
  const bool first = p.num_steps[sample] == 0;
  take_sums<0, typename Step::C>(shared, row, first, false, whole);
  settle<0>(p, shared, row, first, whole);
  if constexpr (Step::kPasses == 2) {
    constexpr int kSecond = Step::kPasses - 1;
    take_sums<kSecond, typename Step::C>(shared, row, first, false, whole);
    settle<kSecond>(p, shared, row, first, whole);
  }
  advance(shared, row, whole);
  shared.write_back(p, sample);
}

}  // namespace fpi

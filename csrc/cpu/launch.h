// Runs a step kernel over a batch: a sample per task while samples are small, panels of one
// sample in parallel once they are large. Results do not depend on which, nor on the threads.
#pragma once

#include <vector>

#include "row.h"
#include "step.h"

namespace fpi {

// Takes the sums of a pass again, in double. Out of line and one for every machine: it is rare, and
// a copy in each clone of its callers doubles the time that they take to compile.
template <class Kernel>
__attribute__((noinline)) void run_wide_pass(const StepParams& p, int64_t i, int pass,
                                             int64_t begin, int64_t end,
                                             const typename Kernel::Scratch& scratch,
                                             typename Kernel::Partial& out) {
  using R = Row<typename Kernel::State, typename Kernel::History>;
  Kernel::wide_pass(pass, p, R(p, i), scratch, begin, end, out);
}

template <class Kernel>
FPI_CLONES void run_rows(const StepParams& p, int64_t first, int64_t last) {
  using R = Row<typename Kernel::State, typename Kernel::History>;
  for (int64_t i = first; i < last; ++i) {
    const R row(p, i);
    if (p.status[row.sample] != kActive) continue;
    typename Kernel::Scratch scratch;
    for (int pass = 0; pass < Kernel::kPasses; ++pass) {
      typename Kernel::Partial sums;
      Kernel::pass(pass, p, row, scratch, 0, row.dim, sums);
      if (pass + 1 == Kernel::kPasses) break;
      if (Kernel::needs_wide(row, pass, sums, scratch)) {
        // Copies: what an address was taken of would be read from memory in every loop above.
        const typename Kernel::Scratch plan = scratch;
        typename Kernel::Partial again;
        run_wide_pass<Kernel>(p, i, pass, 0, row.dim, plan, again);
        sums = again;
      }
      Kernel::between(pass, p, row, sums, scratch);
    }
  }
}

template <class Kernel>
FPI_CLONES void run_panel(const StepParams& p, int64_t i, int pass, int64_t begin, int64_t end,
                          const typename Kernel::Scratch& scratch, typename Kernel::Partial& out) {
  using R = Row<typename Kernel::State, typename Kernel::History>;
  const R row(p, i);
  Kernel::pass(pass, p, row, scratch, begin, end, out);
}

template <class Kernel>
void run_panels(const StepParams& p, ParallelFor run) {
  using R = Row<typename Kernel::State, typename Kernel::History>;
  const int64_t panels = (p.dim + kPanel - 1) / kPanel;
  std::vector<char> active(p.rows);
  for (int64_t i = 0; i < p.rows; ++i) active[i] = p.status[R(p, i).sample] == kActive;
  std::vector<typename Kernel::Scratch> scratch(p.rows);
  std::vector<typename Kernel::Partial> partial(p.rows * panels);
  std::vector<char> wide(p.rows);
  const auto sweep = [&](int pass, bool again) {
    const auto run_part = again ? run_wide_pass<Kernel> : run_panel<Kernel>;
    run(0, p.rows * panels, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t i = task / panels;
        if (!active[i] || (again && !wide[i])) continue;
        const int64_t begin = (task % panels) * kPanel;
        partial[task] = {};
        run_part(p, i, pass, begin, std::min(begin + kPanel, p.dim), scratch[i], partial[task]);
      }
    });
  };
  const auto total = [&](int64_t i) {
    typename Kernel::Partial sums;
    for (int64_t k = 0; k < panels; ++k) sums.add(partial[i * panels + k], p.depth);
    return sums;
  };
  for (int pass = 0; pass < Kernel::kPasses; ++pass) {
    sweep(pass, false);
    if (pass + 1 == Kernel::kPasses) break;
    bool any_wide = false;
    for (int64_t i = 0; i < p.rows; ++i) {
      wide[i] = active[i] && Kernel::needs_wide(R(p, i), pass, total(i), scratch[i]);
      any_wide = any_wide || wide[i];
    }
    if (any_wide) sweep(pass, true);
    for (int64_t i = 0; i < p.rows; ++i) {
      if (!active[i]) continue;
      typename Kernel::Partial sums = total(i);
      Kernel::between(pass, p, R(p, i), sums, scratch[i]);
    }
  }
}

template <class Kernel>
void run_step(const StepParams& p, ParallelFor run) {
  if (p.dim > kPanel) return run_panels<Kernel>(p, run);
  run(0, p.rows, grain_for(p.dim * (2 * p.depth + 4)),
      [&p](int64_t first, int64_t last) { run_rows<Kernel>(p, first, last); });
}

// The history is stored as the state, or, where it may be narrow, in bfloat16 under float32.
template <template <class, class> class Kernel, bool kMayBeNarrow>
void launch(const StepParams& p, StateType state, StateType history, ParallelFor run) {
  switch (state) {
    case StateType::kFloat64: return run_step<Kernel<double, double>>(p, run);
    case StateType::kBFloat16: return run_step<Kernel<BFloat16, BFloat16>>(p, run);
    default: break;
  }
  if constexpr (kMayBeNarrow) {
    if (history == StateType::kBFloat16) return run_step<Kernel<float, BFloat16>>(p, run);
  }
  run_step<Kernel<float, float>>(p, run);
}

}  // namespace fpi

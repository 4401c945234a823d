// Anderson acceleration, type II, one sample at a time.
// Source: Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011, eq. (2.2), in difference form.
#include <vector>

#include "../common/anderson_judge.h"
#include "launch.h"
#include "row.h"

namespace fpi {
namespace {

struct Sums : AndersonSums {
  Sums() : AndersonSums{} {}

  void add(const Sums& other, int depth) {
    ff += other.ff;
    gg += other.gg;
    xx += other.xx;
    dfdf += other.dfdf;
    fdf += other.fdf;
    for (int s = 0; s < depth; ++s) {
      dfdc[s] += other.dfdc[s];
      fdc[s] += other.fdc[s];
    }
  }
};

struct Plan : AndersonPlan {
  SmallSolve solve;
  Plan() : AndersonPlan{} {}
};

// Writes the fresh differences and takes every sum, in one reading of the sample's arrays. A second
// measurement finds the differences written, and their slot no longer holds the last evaluation.
template <class Acc, bool kAgain, class T, class H>
FPI_INLINE void measure(const Row<T, H>& row, int64_t begin, int64_t end, bool first, Sums& out) {
  using C = typename Row<T, H>::C;
  C f[kChunk], df[kChunk], dg[kChunk];
  const bool differs = row.has_previous();
  const int fresh = row.depth ? row.fresh_slot() : 0;
  const int columns = row.columns();
  for (int64_t at = begin; at < end; at += kChunk) {
    const int n = static_cast<int>(std::min<int64_t>(kChunk, end - at));
    const T* x = row.x + at;
    const T* gx = row.gx + at;
    for (int j = 0; j < n; ++j) f[j] = static_cast<C>(gx[j]) - static_cast<C>(x[j]);
    out.ff += dot<Acc>(f, f, n);
    // A chunk at a time, by way of C: bfloat16 has no arithmetic of its own.
    C wide[kChunk];
    for (int j = 0; j < n; ++j) wide[j] = static_cast<C>(gx[j]);
    out.gg += dot<Acc>(wide, wide, n);
    if (differs) {
      H* column_f = row.column_f(fresh) + at;
      if (!kAgain) {
        const C* f_previous = row.f_previous() + at;
        const C* g_previous = row.partner_previous() + at;
        for (int j = 0; j < n; ++j) {
          df[j] = f[j] - f_previous[j];
          dg[j] = wide[j] - g_previous[j];
        }
        H* column_g = row.column_g(fresh) + at;
        for (int j = 0; j < n; ++j) {
          column_f[j] = static_cast<H>(df[j]);
          column_g[j] = static_cast<H>(dg[j]);
        }
      }
      // The difference as it is stored, so that the Gram matrix is that of the stored columns.
      if (kAgain || sizeof(H) != sizeof(C)) {
        for (int j = 0; j < n; ++j) df[j] = static_cast<C>(column_f[j]);
      }
      out.dfdf += dot<Acc>(df, df, n);
      out.fdf += dot<Acc>(f, df, n);
    }
    if (first) {
      for (int j = 0; j < n; ++j) wide[j] = static_cast<C>(x[j]);
      out.xx += dot<Acc>(wide, wide, n);
    }
    for (int age = 0; age < columns; ++age) {
      const int slot = (row.head() - age + row.depth) % row.depth;
      if (!differs) {
        for (int j = 0; j < n; ++j) wide[j] = static_cast<C>(row.column_f(slot)[at + j]);
        out.fdc[slot] += dot<Acc>(f, wide, n);
      } else if (slot != fresh) {
        dot2<Acc>(df, f, row.column_f(slot) + at, n, out.dfdc[slot], out.fdc[slot]);
      }
    }
  }
}

// Writes the next point, and remembers this evaluation.
template <class T, class H>
FPI_INLINE void advance(const Row<T, H>& row, const Plan& plan, int64_t begin, int64_t end) {
  using C = typename Row<T, H>::C;
  if (moved(row, plan.decision, begin, end)) return;
  const C beta = static_cast<C>(plan.beta);
  const C rest = C(1) - beta;
  C f[kChunk], g[kChunk], next[kChunk];
  for (int64_t at = begin; at < end; at += kChunk) {
    const int n = static_cast<int>(std::min<int64_t>(kChunk, end - at));
    T* x = row.x + at;
    const T* gx = row.gx + at;
    for (int j = 0; j < n; ++j) {
      next[j] = g[j] = static_cast<C>(gx[j]);
      f[j] = g[j] - static_cast<C>(x[j]);
    }
    for (int k = 0; k < plan.count; ++k) {
      const C gamma = static_cast<C>(plan.gamma[k]);
      const H* column_g = row.column_g(plan.slots[k]) + at;
      for (int j = 0; j < n; ++j) next[j] -= gamma * static_cast<C>(column_g[j]);
    }
    if (rest != C(0)) {
      for (int j = 0; j < n; ++j) next[j] -= rest * f[j];
      for (int k = 0; k < plan.count; ++k) {
        const C gamma = rest * static_cast<C>(plan.gamma[k]);
        const H* column_f = row.column_f(plan.slots[k]) + at;
        for (int j = 0; j < n; ++j) next[j] += gamma * static_cast<C>(column_f[j]);
      }
    }
    // After the mixing: the slot may hold the oldest of its columns.
    if (row.depth) {
      copy_run(f, n, row.f_previous() + at);
      copy_run(g, n, row.partner_previous() + at);
    }
    for (int j = 0; j < n; ++j) x[j] = static_cast<T>(next[j]);
  }
}

template <class T, class H>
struct AndersonStep {
  using State = T;
  using History = H;
  using Partial = Sums;
  using Scratch = Plan;
  static constexpr int kPasses = 2;

  static FPI_INLINE void pass(int which, const StepParams& p, const Row<T, H>& row,
                              const Plan& plan, int64_t begin, int64_t end, Sums& out) {
    using C = typename Numeric<T>::Compute;
    if (which == 1) return advance(row, plan, begin, end);
    measure<C, false>(row, begin, end, p.num_steps[row.sample] == 0, out);
  }

  static FPI_INLINE void wide_pass(int, const StepParams& p, const Row<T, H>& row, const Plan&,
                                   int64_t begin, int64_t end, Sums& out) {
    measure<double, true>(row, begin, end, p.num_steps[row.sample] == 0, out);
  }

  // Float sums left the range in which nothing is lost: take them again in double.
  static bool needs_wide(const Row<T, H>& row, int, const Sums& sums, const Plan&) {
    using C = typename Numeric<T>::Compute;
    return sizeof(C) == 4 &&
           !(trustworthy<C>(sums.ff, row.dim) && trustworthy<C>(sums.gg, row.dim) &&
             (!row.has_previous() || trustworthy<C>(sums.dfdf, row.dim)));
  }

  static void between(int, const StepParams& p, const Row<T, H>& row, Sums& sums, Plan& plan) {
    const Measured at = measured_from(row, sums.ff, sums.gg, sums.xx, p.num_steps[row.sample] == 0);
    judge_anderson(p, row.sample, Numeric<T>::kEpsilon, at, sums, row.gram, *row.control,
                   plan.solve, plan);
  }
};

}  // namespace

void anderson_step_cpu(const StepParams& p, StateType state, StateType history, ParallelFor run) {
  launch<AndersonStep, true>(p, state, history, run);
}

void anderson_rows_cpu(const StepParams& p, StateType state, int64_t first, int64_t last) {
  switch (state) {
    case StateType::kFloat64: return run_rows<AndersonStep<double, double>>(p, first, last);
    case StateType::kBFloat16: return run_rows<AndersonStep<BFloat16, BFloat16>>(p, first, last);
    default: return run_rows<AndersonStep<float, float>>(p, first, last);
  }
}

}  // namespace fpi

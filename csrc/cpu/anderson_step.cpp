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

// <df, column> and <f, column> of four columns at a time, as dot2 takes them of one. What df and f
// hold past n is zero.
template <class Acc, class C, class H>
FPI_INLINE void dot2_of_four(const C* df, const C* f, const H* const* columns, int n,
                             double* const* with_df, double* const* with_f) {
  using Vector = typename Lanes<Acc>::Vector;
  Vector sum_df[4] = {}, sum_f[4] = {};
  for_lanes(0, n, [&](int64_t j, int run) {
    Vector left, right, column;
    load<Acc>(df + j, left);
    load<Acc>(f + j, right);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      load_run<Acc>(columns[k] + j, run, column);
      sum_df[k] += left * column;
      sum_f[k] += right * column;
    }
  });
  double of_df[4], of_f[4];
  sum_four<Acc>(sum_df[0], sum_df[1], sum_df[2], sum_df[3], of_df);
  sum_four<Acc>(sum_f[0], sum_f[1], sum_f[2], sum_f[3], of_f);
  for (int k = 0; k < 4; ++k) {
    *with_df[k] += of_df[k];
    *with_f[k] += of_f[k];
  }
}

// Writes the fresh differences and takes every sum, in one reading of the sample's arrays. A second
// measurement finds the differences written, and their slot no longer holds the last evaluation.
template <class Acc, bool kAgain, class T, class H>
FPI_INLINE void measure(const Row<T, H>& row, int64_t begin, int64_t end, bool first, Sums& out) {
  using C = typename Row<T, H>::C;
  using Narrow = typename Lanes<C>::Vector;
  using Vector = typename Lanes<Acc>::Vector;
  C f[kChunk], df[kChunk];
  const bool differs = row.has_previous();
  const int fresh = row.fresh_slot();
  // The columns that the fresh one is multiplied with, or all where there is none.
  const int columns = differs ? columns_but_fresh(*row.control, row.depth) : row.columns();
  const H* column[kMaxDepth];
  double *with_df[kMaxDepth], *with_f[kMaxDepth];
  for (int age = 0, slot = row.head(); age < columns;
       ++age, slot = slot ? slot - 1 : row.depth - 1) {
    column[age] = row.column_f(slot) + begin;
    with_df[age] = out.dfdc + slot;
    with_f[age] = out.fdc + slot;
  }
  H* column_f = row.column_f(fresh);
  H* column_g = row.column_g(fresh);
  const C* f_previous = differs ? row.f_previous() : nullptr;
  const C* g_previous = differs ? row.partner_previous() : nullptr;
  for (int64_t at = begin; at < end; at += kChunk) {
    const int n = static_cast<int>(std::min<int64_t>(kChunk, end - at));
    Vector ff = {}, gg = {}, dfdf = {}, fdf = {};
    for_lanes(0, n, [&](int64_t j, int run) {
      const int64_t here = at + j;
      Narrow x, g;
      load_run<C>(row.x + here, run, x);
      load_run<C>(row.gx + here, run, g);
      const Narrow narrow = g - x;
      std::memcpy(f + j, &narrow, sizeof narrow);
      const Vector wide_f = __builtin_convertvector(narrow, Vector);
      const Vector wide_g = __builtin_convertvector(g, Vector);
      ff += wide_f * wide_f;
      gg += wide_g * wide_g;
      if (!differs) return;
      Narrow d;
      if (!kAgain) {
        Narrow f_before, g_before;
        load_run<C>(f_previous + here, run, f_before);
        load_run<C>(g_previous + here, run, g_before);
        d = narrow - f_before;
        store_run<C>(d, run, column_f + here);
        store_run<C>(g - g_before, run, column_g + here);
      }
      // The difference as it is stored, so that the Gram matrix is that of the stored columns.
      if (kAgain || sizeof(H) != sizeof(C)) load_run<C>(column_f + here, run, d);
      std::memcpy(df + j, &d, sizeof d);
      const Vector wide_d = __builtin_convertvector(d, Vector);
      dfdf += wide_d * wide_d;
      fdf += wide_f * wide_d;
    });
    double sums[4];
    sum_four<Acc>(ff, gg, dfdf, fdf, sums);
    out.ff += sums[0];
    out.gg += sums[1];
    out.dfdf += sums[2];
    out.fdf += sums[3];
    if (first) {
      C wide[kChunk];
      for (int j = 0; j < n; ++j) wide[j] = static_cast<C>(row.x[at + j]);
      out.xx += dot<Acc>(wide, wide, n);
    }
    const H* here[kMaxDepth];
    for (int k = 0; k < columns; ++k) here[k] = column[k] + (at - begin);
    if (!differs) {
      for (int k = 0; k < columns; ++k) {
        C wide[kChunk];
        for (int j = 0; j < n; ++j) wide[j] = static_cast<C>(here[k][j]);
        *with_f[k] += dot<Acc>(f, wide, n);
      }
      continue;
    }
    int k = 0;
    for (; k + 4 <= columns; k += 4) {
      dot2_of_four<Acc>(df, f, here + k, n, with_df + k, with_f + k);
    }
    for (; k < columns; ++k) {
      dot2<Acc>(df, f, here[k], n, *with_df[k], *with_f[k]);
    }
  }
}

// The next point of `Runs` runs of lanes, of which the last has n elements; remembers this
// evaluation, after the mixing: its slot may hold the oldest of the columns.
template <int Runs, class T, class H>
FPI_INLINE void mix(const Row<T, H>& row, const Plan& plan, int64_t at, int n) {
  using C = typename Row<T, H>::C;
  using Vector = typename Lanes<C>::Vector;
  const C rest = C(1) - static_cast<C>(plan.beta);
  Vector f[Runs], g[Runs], next[Runs], column;
#pragma GCC unroll 4
  for (int r = 0; r < Runs; ++r) {
    load_run<C>(row.gx + at + r * kLanes, n, g[r]);
    load_run<C>(row.x + at + r * kLanes, n, f[r]);
    f[r] = g[r] - f[r];
    next[r] = g[r];
  }
  for (int k = 0; k < plan.count; ++k) {
    const C gamma = static_cast<C>(plan.gamma[k]);
    const H* column_g = row.column_g(plan.slots[k]) + at;
#pragma GCC unroll 4
    for (int r = 0; r < Runs; ++r) {
      load_run<C>(column_g + r * kLanes, n, column);
      next[r] -= gamma * column;
    }
  }
  if (rest != C(0)) {
    for (int r = 0; r < Runs; ++r) next[r] -= rest * f[r];
    for (int k = 0; k < plan.count; ++k) {
      const C gamma = rest * static_cast<C>(plan.gamma[k]);
      const H* column_f = row.column_f(plan.slots[k]) + at;
      for (int r = 0; r < Runs; ++r) {
        load_run<C>(column_f + r * kLanes, n, column);
        next[r] += gamma * column;
      }
    }
  }
  C* f_previous = row.f_previous() + at;
  C* g_previous = row.partner_previous() + at;
#pragma GCC unroll 4
  for (int r = 0; r < Runs; ++r) {
    store_run<C>(f[r], n, f_previous + r * kLanes);
    store_run<C>(g[r], n, g_previous + r * kLanes);
    store_run<C>(next[r], n, row.x + at + r * kLanes);
  }
}

// Writes the next point, and remembers this evaluation.
template <class T, class H>
FPI_INLINE void advance(const Row<T, H>& row, const Plan& plan, int64_t begin, int64_t end) {
  if (moved(row, plan.decision, begin, end)) return;
  int64_t at = begin;
  for (; at + 4 * kLanes <= end; at += 4 * kLanes) mix<4>(row, plan, at, kLanes);
  for (; at < end; at += kLanes) {
    mix<1>(row, plan, at, static_cast<int>(std::min<int64_t>(kLanes, end - at)));
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
  if (p.depth == 0) return picard_step_cpu(p, state, run);
  launch<AndersonStep, true>(p, state, history, run);
}

void anderson_rows_cpu(const StepParams& p, StateType state, int64_t first, int64_t last) {
  if (p.depth == 0) return picard_rows_cpu(p, state, first, last);
  switch (state) {
    case StateType::kFloat64: return run_rows<AndersonStep<double, double>>(p, first, last);
    case StateType::kBFloat16: return run_rows<AndersonStep<BFloat16, BFloat16>>(p, first, last);
    default: return run_rows<AndersonStep<float, float>>(p, first, last);
  }
}

}  // namespace fpi

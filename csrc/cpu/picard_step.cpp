// Picard iteration, x + beta (g(x) - x), one sample at a time: Anderson's step without a history.
#include "launch.h"
#include "row.h"

namespace fpi {
namespace {

struct Sums {
  double ff = 0, gg = 0, xx = 0;

  void add(const Sums& other, int) {
    ff += other.ff;
    gg += other.gg;
    xx += other.xx;
  }
};

struct Plan {
  Decision decision;
  double beta;
};

template <class Acc, class T>
FPI_INLINE void measure(const Row<T, T>& row, int64_t begin, int64_t end, bool first, Sums& out) {
  using C = typename Row<T, T>::C;
  using Vector = typename Lanes<Acc>::Vector;
  for (int64_t at = begin; at < end; at += kChunk) {
    Vector ff = {}, gg = {}, xx = {};
    for_lanes(at, std::min<int64_t>(at + kChunk, end), [&](int64_t j, int n) {
      typename Lanes<C>::Vector x, g;
      load_run<C>(row.x + j, n, x);
      load_run<C>(row.gx + j, n, g);
      const Vector f = __builtin_convertvector(g - x, Vector);
      const Vector wide = __builtin_convertvector(g, Vector);
      ff += f * f;
      gg += wide * wide;
    });
    out.ff += sum_lanes<Acc>(ff);
    out.gg += sum_lanes<Acc>(gg);
    if (!first) continue;
    for_lanes(at, std::min<int64_t>(at + kChunk, end), [&](int64_t j, int n) {
      Vector x;
      load_run<Acc>(row.x + j, n, x);
      xx += x * x;
    });
    out.xx += sum_lanes<Acc>(xx);
  }
}

// Writes the next point.
template <class T>
FPI_INLINE void advance(const Row<T, T>& row, const Plan& plan, int64_t begin, int64_t end) {
  using C = typename Row<T, T>::C;
  if (moved(row, plan.decision, begin, end)) return;
  const C rest = C(1) - static_cast<C>(plan.beta);
  if (rest == C(0)) return copy_run(row.gx + begin, end - begin, row.x + begin);
  for (int64_t j = begin; j < end; ++j) {
    row.x[j] = static_cast<T>(static_cast<C>(row.gx[j]) - rest * row.f_at(j));
  }
}

template <class T, class H>
struct PicardStep {
  using State = T;
  using History = H;
  using Partial = Sums;
  using Scratch = Plan;
  static constexpr int kPasses = 2;

  static FPI_INLINE void pass(int which, const StepParams& p, const Row<T, H>& row,
                              const Plan& plan, int64_t begin, int64_t end, Sums& out) {
    using C = typename Numeric<T>::Compute;
    if (which == 1) return advance(row, plan, begin, end);
    measure<C>(row, begin, end, p.num_steps[row.sample] == 0, out);
  }

  static FPI_INLINE void wide_pass(int, const StepParams& p, const Row<T, H>& row, const Plan&,
                                   int64_t begin, int64_t end, Sums& out) {
    measure<double>(row, begin, end, p.num_steps[row.sample] == 0, out);
  }

  static bool needs_wide(const Row<T, H>& row, int, const Sums& sums, const Plan&) {
    using C = typename Numeric<T>::Compute;
    return sizeof(C) == 4 &&
           !(trustworthy<C>(sums.ff, row.dim) && trustworthy<C>(sums.gg, row.dim));
  }

  static void between(int, const StepParams& p, const Row<T, H>& row, Sums& sums, Plan& plan) {
    const Measured at = measured_from(row, sums.ff, sums.gg, sums.xx, p.num_steps[row.sample] == 0);
    plan.decision = judge(p, row.sample, Numeric<T>::kEpsilon, at, *row.control);
    plan.beta = p.beta * row.control->mixing_scale;
  }
};

}  // namespace

void picard_step_cpu(const StepParams& p, StateType state, ParallelFor run) {
  launch<PicardStep, false>(p, state, state, run);
}

void picard_rows_cpu(const StepParams& p, StateType state, int64_t first, int64_t last) {
  switch (state) {
    case StateType::kFloat64: return run_rows<PicardStep<double, double>>(p, first, last);
    case StateType::kBFloat16: return run_rows<PicardStep<BFloat16, BFloat16>>(p, first, last);
    default: return run_rows<PicardStep<float, float>>(p, first, last);
  }
}

}  // namespace fpi

// See num_moved.h.
#include "num_moved.h"

#include <atomic>
#include <cmath>

#include "../common/judge.h"
#include "../common/status.h"
#include "launch.h"

namespace fpi {
namespace {

// A norm that is not finite tells nothing: a row of NaN differs from itself.
FPI_INLINE bool differs(double now, double recorded, double rounding) {
  if (now == recorded || !is_finite(now)) return false;
  return !(std::fabs(now - recorded) <= rounding * larger(now, recorded));
}

template <class T>
FPI_CLONES int64_t count_rows(const NumMovedParams& p, int64_t first, int64_t last) {
  using C = typename Numeric<T>::Compute;
  int64_t count = 0;
  for (int64_t i = first; i < last; ++i) {
    if (p.status[i] == kActive) continue;
    const T* x = static_cast<const T*>(p.x) + i * p.dim;
    const T* gx = static_cast<const T*>(p.gx) + i * p.dim;
    double ff = 0;
    C f[kChunk];
    for (int64_t at = 0; at < p.dim; at += kChunk) {
      const int n = static_cast<int>(std::min<int64_t>(kChunk, p.dim - at));
      for (int j = 0; j < n; ++j) f[j] = static_cast<C>(gx[at + j]) - static_cast<C>(x[at + j]);
      ff += dot<C>(f, f, n);
    }
    double now = std::sqrt(ff);
    if (!trustworthy<C>(ff, p.dim)) {
      now = scaled_norm(p.dim, [&](int64_t j) {
        return static_cast<double>(static_cast<C>(gx[j])) -
               static_cast<double>(static_cast<C>(x[j]));
      });
    }
    count += differs(now, p.residual[i], p.rounding);
  }
  return count;
}

template <class T>
int64_t count(const NumMovedParams& p, ParallelFor run) {
  const int64_t grain = grain_for(p.dim);
  if (p.rows <= grain) return count_rows<T>(p, 0, p.rows);
  std::atomic<int64_t> total{0};
  run(0, p.rows, grain,
      [&](int64_t first, int64_t last) { total += count_rows<T>(p, first, last); });
  return total;
}

}  // namespace

int64_t num_moved_cpu(const NumMovedParams& p, StateType state, ParallelFor run) {
  switch (state) {
    case StateType::kFloat64: return count<double>(p, run);
    case StateType::kBFloat16: return count<BFloat16>(p, run);
    default: return count<float>(p, run);
  }
}

}  // namespace fpi

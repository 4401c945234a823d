// How the CPU kernels share work: the caller passes torch's own parallel loop.
#pragma once

#include <cstdint>
#include <functional>

namespace fpi {

// run(begin, end, grain, body): body(first, last) over disjoint ranges that cover [begin, end).
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain,
                             const std::function<void(int64_t, int64_t)>& body);

// Rows per task, so that a task outweighs the cost of handing it out.
inline int64_t grain_for(int64_t elements_per_row) {
  constexpr int64_t kElementsPerTask = 65536;
  const int64_t grain = kElementsPerTask / (elements_per_row > 0 ? elements_per_row : 1);
  return grain > 0 ? grain : 1;
}

}  // namespace fpi

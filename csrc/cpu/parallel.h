// How the CPU kernels share work: the caller passes torch's own parallel loop.
#pragma once

#include <cstdint>

namespace fpi {

// A function of a range, by reference: it must outlive this. Unlike std::function it allocates
// nothing.
class RangeBody {
 public:
  template <class F>
  RangeBody(const F& function)
      : function_(&function), call_([](const void* function, int64_t first, int64_t last) {
          (*static_cast<const F*>(function))(first, last);
        }) {}

  void operator()(int64_t first, int64_t last) const { call_(function_, first, last); }

 private:
  const void* function_;
  void (*call_)(const void*, int64_t, int64_t);
};

// run(begin, end, grain, body): body(first, last) over disjoint ranges that cover [begin, end).
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, const RangeBody& body);

// Rows per task, so that a task outweighs the cost of handing it out.
inline int64_t grain_for(int64_t elements_per_row) {
  constexpr int64_t kElementsPerTask = 65536;
  const int64_t grain = kElementsPerTask / (elements_per_row > 0 ? elements_per_row : 1);
  return grain > 0 ? grain : 1;
}

}  // namespace fpi

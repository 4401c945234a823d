// Which bytes of device memory were written. The accesses of the kernels arrive by the calls that a
// compiler puts in front of each for a kernel's address sanitizer, for which this stands in: see
// INITCHECK in tests/project/test_sanitize_driver.py. This and the scheduler are compiled without them.
#include "initcheck.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <vector>

#include "cuda_runtime.h"

namespace emulation {
namespace {

std::map<uintptr_t, std::vector<bool>> allocations;  // a bit for each byte, by the first address

// The allocation that holds an address, or the end: memory of the host, or shared.
std::map<uintptr_t, std::vector<bool>>::iterator find(uintptr_t address) {
  auto next = allocations.upper_bound(address);
  if (next == allocations.begin()) return allocations.end();
  const auto found = std::prev(next);
  return address - found->first < found->second.size() ? found : allocations.end();
}

void check(const void* address, size_t bytes, const void* reader) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  const auto found = find(at);
  if (found == allocations.end()) return;
  const auto first = found->second.begin() + static_cast<std::ptrdiff_t>(at - found->first);
  const auto last = first + static_cast<std::ptrdiff_t>(bytes);
  if (std::find(first, last, false) == last) return;
  std::fprintf(stderr,
               "initcheck: a read of %zu bytes at %zu of an allocation of %zu, not all of which "
               "were written (block %u, thread %u, addr2line %p)\n",
               bytes, static_cast<size_t>(at - found->first), found->second.size(), blockIdx.x,
               threadIdx.x, reader);
  std::abort();
}

}  // namespace

void is_allocated(const void* address, size_t bytes) {
  allocations[reinterpret_cast<uintptr_t>(address)].assign(bytes, false);
}

void is_freed(const void* address) { allocations.erase(reinterpret_cast<uintptr_t>(address)); }

void is_written(const void* address, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  const auto found = find(at);
  if (found == allocations.end()) return;
  const auto first = found->second.begin() + static_cast<std::ptrdiff_t>(at - found->first);
  std::fill(first, first + static_cast<std::ptrdiff_t>(bytes), true);
}

void is_read(const void* address, size_t bytes) {
  check(address, bytes, __builtin_return_address(0));
}

}  // namespace emulation

extern "C" {

#define ACCESS(bytes)                                              \
  void __asan_load##bytes##_noabort(const void* address) {         \
    emulation::check(address, bytes, __builtin_return_address(0)); \
  }                                                                \
  void __asan_store##bytes##_noabort(const void* address) { emulation::is_written(address, bytes); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
#undef ACCESS
void __asan_loadN_noabort(const void* address, size_t bytes) {
  emulation::check(address, bytes, __builtin_return_address(0));
}
void __asan_storeN_noabort(const void* address, size_t bytes) {
  emulation::is_written(address, bytes);
}
void __asan_handle_no_return() {}

// The scheduler tells ASan of its fibers.
void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
}

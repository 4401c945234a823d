// Copies from global to shared memory that a thread does not wait for.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fpi {

#ifdef __CUDACC__

// 16 bytes, aligned to as many.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const size_t from = __cvta_generic_to_global(global);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

// Ends a group of copies; it may be empty.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all but the newest `kPending` groups of this thread have arrived, for this thread to see.
template <int kPending>
__device__ __forceinline__ void await_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

#else  // the emulation of tests/emulation

inline void copy_async(void* shared, const void* global) {
  emulation::copy_later(shared, global, 16);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kPending>
void await_copies() {
  emulation::await_copies(kPending);
}

#endif

}  // namespace fpi

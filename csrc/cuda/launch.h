// A checked launch of a kernel with any arguments.
#pragma once

#include <cuda_runtime.h>

namespace fpi {

// What went wrong, or null.
inline const char* described(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // or the next call that checks would report it as its own
  return cudaGetErrorString(error);
}

// Returns what went wrong, or null.
template <class... Args>
const char* launch(void (*kernel)(Args...), int64_t blocks, int threads, size_t shared_bytes,
                   void* stream, Args... args) {
  constexpr int64_t kMostBlocks = 2147483647;
  if (blocks > kMostBlocks) return "more blocks than a grid can hold";
  void* pointers[] = {&args...};
  return described(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)),
                                    dim3(static_cast<unsigned>(threads)), pointers, shared_bytes,
                                    static_cast<cudaStream_t>(stream)));
}

}  // namespace fpi

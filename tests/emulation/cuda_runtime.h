// Stands in for CUDA's header of this name, so that a .cu file compiles as C++ and runs on the CPU
// under sanitizers: each CUDA thread is a fiber, each block runs by itself.
//
// What it finds: out-of-bounds and misaligned accesses (ASan, UBSan, with dynamic shared memory
// cut to the size of the launch), reads of memory that nobody wrote (it holds NaNs; initcheck.h
// finds those that change nothing, too), missing barriers (threads run in an order that the seed
// picks, so that a race changes results), barriers and shuffles that part of a warp or block does
// not reach (the run aborts). What it cannot show: races between blocks, memory ordering, speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include <cmath>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// One per system thread, and so shared by the fibers of a block.
#define __shared__ thread_local

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulation {

// What a thread waits for: those that wait together must wait for the same.
enum class Wait { kNothing, kBlock, kWarp, kShuffle };

// Returns once every thread of the block (or of `mask` in the warp) waits likewise.
void wait(Wait what, unsigned mask);

// Puts `bytes` of a lane's value where the other lanes of its warp can read it once all have
// passed the barrier; returns the value that lane `from` put there.
void exchange(const void* value, void* received, size_t bytes, int from, unsigned mask);

// The same by a whole warp, of which each lane receives what all 32 put there.
void exchange_all(const void* value, void* received, size_t bytes);

// Runs body once per thread of the grid.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument);

// Order of blocks and of threads; 0 is the plain one.
void set_seed(unsigned seed);

// What a kernel may ask for of dynamic shared memory, in bytes.
void allow_shared(const void* kernel, size_t bytes);
size_t allowed_shared(const void* kernel);

// Copies that this thread asks for are made when it waits for their group, and not before.
void copy_later(void* to, const void* from, size_t bytes);
void commit_copies();
void await_copies(int pending);

// The products of csrc/cuda/mma.cuh, all lanes of a warp together.
void mma_tf32(float (&sum)[4], const uint4& a, unsigned b0, unsigned b1);
void mma_bf16(float (&sum)[4], const uint4& a, unsigned b0, unsigned b1);

int lane();

template <class T>
T from_lane(T value, int from, unsigned mask) {
  T received;
  exchange(&value, &received, sizeof(T), from, mask);
  return received;
}

}  // namespace emulation

constexpr int warpSize = 32;

inline void __syncthreads() { emulation::wait(emulation::Wait::kBlock, ~0u); }
inline void __syncwarp(unsigned mask = ~0u) { emulation::wait(emulation::Wait::kWarp, mask); }
inline void __threadfence() {}

template <class T>
T __ldcg(const T* address) {
  return *address;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int = warpSize) {
  return emulation::from_lane(value, emulation::lane() ^ lane_mask, mask);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int = warpSize) {
  return emulation::from_lane(value, from % warpSize, mask);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int = warpSize) {
  const int from = emulation::lane() + static_cast<int>(delta);
  return emulation::from_lane(value, from < warpSize ? from : emulation::lane(), mask);
}

inline unsigned __ballot_sync(unsigned, bool holds) {
  bool all[32];
  emulation::exchange_all(&holds, all, sizeof holds);
  unsigned ballot = 0;
  for (int l = 0; l < warpSize; ++l) ballot |= static_cast<unsigned>(all[l]) << l;
  return ballot;
}
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }

// Threads run one at a time, so that plain arithmetic is atomic.
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    default: return "invalid configuration argument";
  }
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

// Each allocation ends where it says, for ASan to see.
cudaError_t cudaMalloc(void** address, size_t bytes);
cudaError_t cudaFree(void* address);

enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemset(void* to, int value, size_t bytes);

// That of an H100, for a block that asks for it.
constexpr int kMostSharedOfDevice = 227 * 1024;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount      ? 132
           : which == cudaDevAttrComputeCapabilityMajor ? 9
                                                        : kMostSharedOfDevice;
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes > kMostSharedOfDevice) return cudaErrorInvalidValue;
  // A device lowers it, and then fails the larger launch that another thread is about to make.
  if (static_cast<size_t>(bytes) < emulation::allowed_shared(kernel)) return cudaErrorInvalidValue;
  emulation::allow_shared(kernel, static_cast<size_t>(bytes));
  return cudaSuccess;
}

namespace emulation {

template <class... Args>
struct Call {
  void (*kernel)(Args...);
  void** pointers;
  template <size_t... I>
  void run(std::index_sequence<I...>) const {
    kernel(*static_cast<std::remove_const_t<Args>*>(pointers[I])...);
  }
};

}  // namespace emulation

template <class... Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args...), dim3 grid, dim3 block, void** pointers,
                             size_t shared_bytes, cudaStream_t) {
  constexpr unsigned kMostThreads = 1024;
  if (grid.x == 0 || grid.y == 0 || block.x == 0 || block.x * block.y * block.z > kMostThreads ||
      grid.x > 2147483647u || grid.y > 65535u ||
      shared_bytes > emulation::allowed_shared(reinterpret_cast<const void*>(kernel))) {
    return cudaErrorInvalidConfiguration;
  }
  emulation::Call<Args...> call{kernel, pointers};
  emulation::run_grid(
      grid, block, shared_bytes,
      [](void* it) {
        static_cast<emulation::Call<Args...>*>(it)->run(std::index_sequence_for<Args...>{});
      },
      &call);
  return cudaSuccess;
}

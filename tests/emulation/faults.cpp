// Kernels that are wrong on purpose, one per argument of the program: what the emulation is for.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../csrc/cuda/copy_async.cuh"
#include "../../csrc/cuda/mma.cuh"
#include "cuda_runtime.h"

extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];

namespace {

float* shared() { return reinterpret_cast<float*>(dynamic_shared_memory); }

// Each thread reads what its neighbour wrote.
__global__ void neighbour(float* out, bool waits) {
  shared()[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (waits) __syncthreads();
  out[threadIdx.x] = shared()[(threadIdx.x + 1) % blockDim.x];
}

// Each thread reads what the other warp wrote, after a barrier of its own warp alone.
__global__ void other_warp(float* out) {
  shared()[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncwarp();
  out[threadIdx.x] = shared()[(threadIdx.x + 32) % blockDim.x];
}

__global__ void past_the_end(float* out, int index) { out[index] = shared()[0]; }
__global__ void past_shared(float* out, int index) { out[0] = shared()[index]; }
__global__ void some_wait(bool) {
  if (threadIdx.x < 7) __syncthreads();
  if (threadIdx.x >= 7) __syncwarp();
}
__global__ void lane_has_left(float* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}
__global__ void crooked(float* out) { *reinterpret_cast<float4*>(out + 1) = float4{1, 2, 3, 4}; }
__global__ void butterfly(float* out) {
  float sum = static_cast<float>(threadIdx.x);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  out[threadIdx.x] = sum;
}

// Each lane copies 16 bytes, and reads those of its neighbour.
__global__ void copied(float* out, const float* in, bool waits) {
  const int lane = static_cast<int>(threadIdx.x);
  fpi::copy_async(shared() + 4 * lane, in + 4 * lane);
  fpi::commit_copies();
  if (waits) fpi::await_copies<0>();
  __syncwarp();
  out[lane] = shared()[4 * ((lane + 1) % 32)];
  fpi::await_copies<0>();
}
__global__ void never_awaited(float*, const float* in) {
  fpi::copy_async(shared() + 4 * threadIdx.x, in);
  fpi::commit_copies();
}
__global__ void crooked_copy(float*, const float* in) { fpi::copy_async(shared() + 1, in); }

// A row of ones times a matrix whose column n is n in every row: 8 n, or 16 n in bf16.
__global__ void tensor_product(float* out, bool bf16, unsigned low_bits) {
  const unsigned one = bf16 ? 0x3f803f80u : 0x3f800000u | low_bits;
  const float column = static_cast<float>(threadIdx.x / 4);
  unsigned bits;
  std::memcpy(&bits, &column, sizeof bits);
  if (bf16) bits = bits >> 16 | (bits & 0xffff0000u);
  float sum[4] = {};
  // Rows from 8 on are zeros.
  const uint4 a{one, 0, one, 0};
  bf16 ? fpi::mma_bf16(sum, a, bits, bits) : fpi::mma_tf32(sum, a, bits, bits);
  out[2 * threadIdx.x] = sum[0] + sum[2];
  out[2 * threadIdx.x + 1] = sum[1] + sum[3];
}

template <class... Args>
void go(void (*kernel)(Args...), int threads, Args... args) {
  void* pointers[] = {&args...};
  if (cudaLaunchKernel(kernel, 1, threads, pointers, 4 * threads * sizeof(float), nullptr)) {
    std::fprintf(stderr, "the launch was refused\n");
    std::exit(3);
  }
}

}  // namespace

int main(int count, char** arguments) {
  constexpr int kThreads = 64;
  const char* which = count > 1 ? arguments[1] : "";
  const auto is = [which](const char* name) { return std::strcmp(which, name) == 0; };
  float* out = new float[kThreads]();
  emulation::set_seed(count > 2 ? std::atoi(arguments[2]) : 0);
  if (is("with barrier")) go(neighbour, kThreads, out, true);
  if (is("without barrier")) go(neighbour, kThreads, out, false);
  if (is("warps apart")) go(other_warp, kThreads, out);
  if (is("butterfly")) go(butterfly, 32, out);
  if (is("past the end")) go(past_the_end, 1, out, kThreads);
  if (is("past shared memory")) go(past_shared, kThreads, out, 4 * kThreads + 1);
  if (is("never written")) go(past_shared, kThreads, out, 5);
  if (is("some wait")) go(some_wait, 32, true);
  if (is("lane has left")) go(lane_has_left, 32, out);
  if (is("crooked vector")) go(crooked, 1, out);
  alignas(16) float in[4 * kThreads];
  for (int i = 0; i < 4 * kThreads; ++i) in[i] = static_cast<float>(i / 4);
  const float* from = in;
  if (is("copy awaited")) go(copied, 32, out, from, true);
  if (is("copy read too early")) go(copied, 32, out, from, false);
  if (is("copy never awaited")) go(never_awaited, 32, out, from);
  if (is("crooked copy")) go(crooked_copy, 1, out, from);
  if (is("tf32 product")) go(tensor_product, 32, out, false, 0u);
  if (is("bf16 product")) go(tensor_product, 32, out, true, 0u);
  if (is("not in tf32")) go(tensor_product, 32, out, false, 1u);
  if (is("too many threads")) go(past_the_end, 2048, out, 0);
  for (int i = 0; i < kThreads; ++i) std::printf("%g ", out[i]);
  delete[] out;
  return 0;
}

// Number types of the CUDA kernels: what is stored, and what is computed in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fpi {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

template <class T>
struct Numeric;
template <>
struct Numeric<float> {
  using Compute = float;
  static constexpr double kEpsilon = 1.1920928955078125e-07;
};
template <>
struct Numeric<double> {
  using Compute = double;
  static constexpr double kEpsilon = 2.220446049250313e-16;
};
template <>
struct Numeric<BFloat16> {
  using Compute = float;
  static constexpr double kEpsilon = 0.0078125;
};
template <>
struct Numeric<Float16> {
  using Compute = float;
  static constexpr double kEpsilon = 0.0009765625;
};

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(BFloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(Float16 v) { return __half2float(v); }

__device__ __forceinline__ void narrow(float v, float& to) { to = v; }
__device__ __forceinline__ void narrow(double v, double& to) { to = v; }
__device__ __forceinline__ void narrow(float v, BFloat16& to) { to = __float2bfloat16_rn(v); }
__device__ __forceinline__ void narrow(float v, Float16& to) { to = __float2half_rn(v); }

// v as it reads back after being stored as an S.
template <class S, class C>
__device__ __forceinline__ C rounded(C v) {
  S stored;
  narrow(v, stored);
  return widen(stored);
}

}  // namespace fpi

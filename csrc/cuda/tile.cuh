// A warp's view of a run of one sample: the elements that each lane holds, how they are loaded and
// stored, and sums over them.
#pragma once

#include "launch_config.h"
#include "numeric.cuh"

namespace fpi {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kQuad = 4;  // elements of one vector access

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarpThreads; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarpThreads; }
__device__ __forceinline__ int warp_count() { return static_cast<int>(blockDim.x) / kWarpThreads; }

template <class S>
struct alignas(kQuad * sizeof(S) < 16 ? kQuad * sizeof(S) : 16) Quad {
  S value[kQuad];
};

// Which lane holds which element is settled by the sample's size alone: by fours where it is a
// multiple of four, one by one elsewhere. Pointers that are not aligned cost time, not bits.
template <class C>
struct Tile {
  static constexpr int kElements = lane_elements(sizeof(C));  // of a lane
  static constexpr int kQuads = kElements / kQuad;
  static constexpr int kSize = kElements * kWarpThreads;

  static constexpr int kQuadStride = kQuad * kWarpThreads;

  int64_t mine;  // this lane's first element, in the sample
  int left;      // elements of the sample from there on, as far as the tile goes
  bool by_fours;
  bool aligned;  // vector accesses are allowed

  __device__ __forceinline__ Tile(int64_t index, int64_t dim, bool aligned_) {
    by_fours = dim % kQuad == 0;
    aligned = aligned_ && by_fours;
    const int offset = by_fours ? lane_index() * kQuad : lane_index();
    mine = index * kSize + offset;
    const int64_t rest = dim - index * kSize;
    left = (rest < kSize ? static_cast<int>(rest) : kSize) - offset;
  }

  // Elements past the end of the sample read as 0.
  template <class S>
  __device__ __forceinline__ void load(const S* sample, C (&v)[kElements]) const {
    if (aligned) {
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const bool inside = left > q * kQuadStride;
        Quad<S> quad;
        if (inside) quad = *reinterpret_cast<const Quad<S>*>(sample + mine + q * kQuadStride);
#pragma unroll
        for (int k = 0; k < kQuad; ++k) v[q * kQuad + k] = inside ? widen(quad.value[k]) : C(0);
      }
    } else {
      for_each_element(sample, [&v](int e, const S* from) { v[e] = from ? widen(*from) : C(0); });
    }
  }

  // The same, of what other blocks of this kernel wrote: past the first-level cache, which does
  // not see it.
  template <class S>
  __device__ __forceinline__ void load_written(const S* sample, C (&v)[kElements]) const {
    for_each_element(sample,
                     [&v](int e, const S* from) { v[e] = from ? widen(__ldcg(from)) : C(0); });
  }

  template <class S>
  __device__ __forceinline__ void store(S* sample, const C (&v)[kElements]) const {
    if (aligned) {
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        if (left <= q * kQuadStride) continue;
        Quad<S> quad;
#pragma unroll
        for (int k = 0; k < kQuad; ++k) narrow(v[q * kQuad + k], quad.value[k]);
        *reinterpret_cast<Quad<S>*>(sample + mine + q * kQuadStride) = quad;
      }
    } else {
      for_each_element(sample, [&v](int e, S* to) {
        if (to) narrow(v[e], *to);
      });
    }
  }

  // visit(e, address of this lane's element e, or null past the end of the sample)
  template <class S, class Visit>
  __device__ __forceinline__ void for_each_element(S* sample, Visit&& visit) const {
    S* first = sample + mine;
    if (by_fours) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int place = e / kQuad * kQuadStride + e % kQuad;
        visit(e, left > place ? first + place : nullptr);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        visit(e, left > e * kWarpThreads ? first + e * kWarpThreads : nullptr);
      }
    }
  }
};

// This lane's part of <a, b>. Acc is the type in which the short sum runs.
template <class Acc, class A, class B, int kElements>
__device__ __forceinline__ double lane_dot(const A (&a)[kElements], const B (&b)[kElements]) {
  Acc sum = 0;
#pragma unroll
  for (int e = 0; e < kElements; ++e) sum += static_cast<Acc>(a[e]) * static_cast<Acc>(b[e]);
  return static_cast<double>(sum);
}

// Adds the sums of a and of b over the warp to *to_a and *to_b, which no other warp may touch. The
// two halves of the warp take one each, after a swap: half the shuffles of two sums.
__device__ __forceinline__ void add_pair(double a, double b, double* to_a, double* to_b) {
  const bool upper = lane_index() >= kWarpThreads / 2;
  double sum = upper ? b : a;
  sum += __shfl_xor_sync(kAllLanes, upper ? a : b, kWarpThreads / 2);
#pragma unroll
  for (int step = kWarpThreads / 4; step > 0; step /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, step);
  }
  if (lane_index() == 0) *to_a += sum;
  if (lane_index() == kWarpThreads / 2) *to_b += sum;
}

__device__ __forceinline__ void add_one(double a, double* to) {
#pragma unroll
  for (int step = kWarpThreads / 2; step > 0; step /= 2) {
    a += __shfl_xor_sync(kAllLanes, a, step);
  }
  if (lane_index() == 0) *to += a;
}

}  // namespace fpi

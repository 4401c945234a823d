// What the threads of a block share while they work on one sample, and the sums that they take
// together. All of it is called by every thread of the block.
#pragma once

#include "row.cuh"

extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];

namespace fpi {

template <class Step>
struct BlockMemory {
  typename Step::Sums sums;
  typename Step::Plan plan;
  typename Step::SmallProblem small;
  Control control;
  bool last;
};

template <class Step>
struct Block {
  using C = typename Step::C;
  static constexpr int kSums = sizeof(typename Step::Sums) / sizeof(double);

  BlockMemory<Step>& memory;
  double* gram;  // (depth, depth)
  double* slab;  // (warps, kSums): the sums of each warp

  __device__ explicit Block(int depth)
      : memory(*reinterpret_cast<BlockMemory<Step>*>(dynamic_shared_memory)),
        gram(reinterpret_cast<double*>(&memory + 1)),
        slab(gram + (Step::kUsesGram ? depth * depth : 0)) {}

  static size_t bytes(int depth, int threads) {
    const size_t doubles = (Step::kUsesGram ? depth * depth : 0) + threads / kWarpThreads * kSums;
    return sizeof(BlockMemory<Step>) + doubles * sizeof(double);
  }

  __device__ typename Step::Sums& warp_sums() const {
    return *reinterpret_cast<typename Step::Sums*>(slab + warp_index() * kSums);
  }

  __device__ void clear() const {
    for (int k = lane_index(); k < kSums; k += kWarpThreads) slab[warp_index() * kSums + k] = 0.0;
    __syncwarp();
  }

  // memory.sums = the warps' sums, added in the order of the warps.
  __device__ void combine() const {
    __syncthreads();
    double* total = reinterpret_cast<double*>(&memory.sums);
    for (int k = threadIdx.x; k < kSums; k += blockDim.x) {
      double sum = 0.0;
      for (int w = 0; w < warp_count(); ++w) sum += slab[w * kSums + k];
      total[k] = sum;
    }
    __syncthreads();
  }

  __device__ void fetch(const StepParams& p, int64_t sample) const {
    double* control = reinterpret_cast<double*>(&memory.control);
    for (int k = threadIdx.x; k < kControlSize; k += blockDim.x) {
      control[k] = p.control[sample * kControlSize + k];
    }
    if (Step::kUsesGram) {
      const int size = p.depth * p.depth;
      for (int k = threadIdx.x; k < size; k += blockDim.x) gram[k] = p.gram[sample * size + k];
    }
    __syncthreads();
  }

  __device__ void write_back(const StepParams& p, int64_t sample) const {
    const double* control = reinterpret_cast<const double*>(&memory.control);
    for (int k = threadIdx.x; k < kControlSize; k += blockDim.x) {
      p.control[sample * kControlSize + k] = control[k];
    }
    if (Step::kUsesGram) {
      const int size = p.depth * p.depth;
      for (int k = threadIdx.x; k < size; k += blockDim.x) p.gram[sample * size + k] = gram[k];
    }
  }
};

// Which vector of a sample a norm is taken of.
enum class Of { kResidual, kImage, kPoint };

// sqrt(sum of squares) without overflow or underflow, for the rare sample that needs it.
template <class Step, class Row>
__device__ __noinline__ double scaled_norm(Block<Step> block, Row row, Of of, TileRange range) {
  using C = typename Row::C;
  const auto for_each = [&](auto&& visit) {
    for_each_tile<C>(range, row.dim, row.aligned, [&](const Tile<C>& tile) {
      C x[Tile<C>::kElements], gx[Tile<C>::kElements];
      tile.load(row.x, x);
      tile.load(row.gx, gx);
#pragma unroll
      for (int e = 0; e < Tile<C>::kElements; ++e) {
        visit(static_cast<double>(of == Of::kPoint   ? x[e]
                                  : of == Of::kImage ? gx[e]
                                                     : gx[e] - x[e]));
      }
    });
  };
  double largest = 0.0;
  // fmax() drops a NaN; this keeps it.
  const auto keep = [&largest](double v) { largest = largest >= v ? largest : v; };
  for_each([&](double v) {
    if (largest == largest) keep(fabs(v));
  });
  for (int step = kWarpThreads / 2; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, largest, step);
    if (largest == largest) keep(other);
  }
  __syncthreads();
  if (lane_index() == 0) block.slab[warp_index()] = largest;
  __syncthreads();
  for (int w = 0; w < warp_count(); ++w) {
    if (largest == largest) keep(block.slab[w]);
  }
  __syncthreads();
  if (!is_finite(largest) || largest == 0.0) return largest;
  double sum = 0.0;
  for_each([&](double v) { sum += v / largest * (v / largest); });
  if (lane_index() == 0) block.slab[warp_index()] = 0.0;
  __syncwarp();
  add_one(sum, block.slab + warp_index());
  __syncthreads();
  sum = 0.0;
  for (int w = 0; w < warp_count(); ++w) sum += block.slab[w];
  __syncthreads();
  return largest * sqrt(sum);
}

// The norms behind the sums of squares. Float sums were taken again in double where they left
// their range; double sums have nothing wider, and are scaled.
template <class Step, class Row>
__device__ __forceinline__ Measured measured_from(const Block<Step>& block, const Row& row,
                                                  bool first, const TileRange& range) {
  const double ff = block.memory.sums.ff, gg = block.memory.sums.gg;
  const double xx = first ? block.memory.sums.xx : 0.0;
  Measured at{sqrt(ff), sqrt(gg), sqrt(xx)};
  if constexpr (sizeof(typename Row::C) == 8) {
    if (!trustworthy<double>(ff, row.dim)) {
      at.residual = scaled_norm(block, row, Of::kResidual, range);
    }
    const bool image = trustworthy<double>(gg, row.dim);
    if (!image) at.norm_gx = scaled_norm(block, row, Of::kImage, range);
    // Only the larger of the two is ever used: a point that starts at zero needs no second look.
    if (first && !trustworthy<double>(xx, row.dim) && !(image && xx <= gg)) {
      at.norm_x = scaled_norm(block, row, Of::kPoint, range);
    }
  }
  return at;
}

}  // namespace fpi

// Which threads work together on one sample: those of a block, or of one warp of it. What they do
// is written once; only how they meet differs.
#pragma once

#include "tile.cuh"

namespace fpi {

struct WholeBlock {
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
  static __device__ __forceinline__ int threads() { return static_cast<int>(blockDim.x); }
  static __device__ __forceinline__ int warp() { return warp_index(); }
  static __device__ __forceinline__ int warps() { return warp_count(); }

  // What this kernel wrote, maybe in another block: such samples are shared by several.
  template <class C, class S>
  static __device__ __forceinline__ void load(const Tile<C>& tile, const S* sample,
                                              C (&v)[Tile<C>::kElements]) {
    tile.load_written(sample, v);
  }
};

struct OneWarp {
  static __device__ __forceinline__ void sync() { __syncwarp(); }
  static __device__ __forceinline__ int thread() { return lane_index(); }
  static __device__ __forceinline__ int threads() { return kWarpThreads; }
  static __device__ __forceinline__ int warp() { return 0; }
  static __device__ __forceinline__ int warps() { return 1; }

  // Maybe in shared memory.
  template <class C, class S>
  static __device__ __forceinline__ void load(const Tile<C>& tile, const S* sample,
                                              C (&v)[Tile<C>::kElements]) {
    tile.load(sample, v);
  }
};

// The tiles that fall to this warp: of those in [first, last), every Team::warps()-th.
struct TileRange {
  int64_t first;
  int64_t last;
};

template <class Team, class C, class Visit>
__device__ __forceinline__ void for_each_tile(const TileRange& range, int64_t dim, bool aligned,
                                              Visit&& visit) {
  for (int64_t t = range.first + Team::warp(); t < range.last; t += Team::warps()) {
    visit(Tile<C>(t, dim, aligned));
  }
}

}  // namespace fpi

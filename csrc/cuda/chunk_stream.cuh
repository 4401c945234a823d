// The chunks of weights that one warp multiplies, one after another: where they lie in shared
// memory, or copied there ahead of time.
#pragma once

#include "cell_loop_plan.h"
#include "copy_async.cuh"
#include "tile.cuh"

namespace fpi {

// Of every panel that falls to this warp: each warp_count()-th.
template <int kBytes>
class ChunkStream {
 public:
  // `weights` holds all panels, in shared memory if resident; `ring` has room for kChunkStages
  // chunks, for this warp alone.
  __device__ ChunkStream(const unsigned char* weights, const LayerShape& shape, bool resident,
                         unsigned char* ring)
      : weights_(weights), shape_(shape), resident_(resident), ring_(ring), ahead_(warp_index()) {
    if (resident_) return;
    for (int stage = 0; stage < kChunkStages - 1; ++stage) fetch(stage);
  }

  // The next chunk, good until the call after.
  __device__ __forceinline__ const unsigned char* next() {
    if (resident_) return advance();
    await_copies<kChunkStages - 2>();
    __syncwarp();  // all lanes have copied this one, and have read the one before
    fetch(stage_ == 0 ? kChunkStages - 1 : stage_ - 1);
    const unsigned char* chunk = ring_ + stage_ * kBytes;
    stage_ = stage_ + 1 == kChunkStages ? 0 : stage_ + 1;
    return chunk;
  }

  // Once every chunk was taken: the ring may be used for something else.
  __device__ void end() const {
    if (!resident_) await_copies<0>();
    __syncwarp();
  }

 private:
  // The chunk that is next to be read or copied; null past the last one.
  __device__ __forceinline__ const unsigned char* advance() {
    if (ahead_ >= shape_.panels || shape_.chunks == 0) return nullptr;
    const int64_t number = static_cast<int64_t>(ahead_) * shape_.chunks + chunk_;
    if (++chunk_ == shape_.chunks) {
      chunk_ = 0;
      ahead_ += warp_count();
    }
    return weights_ + number * kBytes;
  }

  __device__ __forceinline__ void fetch(int stage) {
    constexpr int kEach = 16;
    if (const unsigned char* from = advance()) {
#pragma unroll
      for (int at = 0; at < kBytes; at += kEach * kWarpThreads) {
        const int mine = at + lane_index() * kEach;
        copy_async(ring_ + stage * kBytes + mine, from + mine);
      }
    }
    commit_copies();
  }

  const unsigned char* weights_;
  LayerShape shape_;
  bool resident_;
  unsigned char* ring_;
  int ahead_;      // panel of the chunk that is copied next
  int chunk_ = 0;  // and which of its chunks
  int stage_ = 0;  // of the ring, that is read next
};

}  // namespace fpi

// How a step is laid out on the device: a pure function of the sample's size, so that the bits of a
// sample's result depend neither on the batch nor on the device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/macros.h"

namespace fpi {

constexpr int kWarpThreads = 32;
constexpr int kMostWarps = 8;  // of a block

// A lane holds 32 bytes of a tile in registers, and a float sum runs over no more than that.
FPI_HD constexpr int lane_elements(size_t compute_bytes) {
  return static_cast<int>(32 / compute_bytes);
}
FPI_HD constexpr int tile_elements(size_t compute_bytes) {
  return kWarpThreads * lane_elements(compute_bytes);
}

enum class Shape {
  kWarp,   // one warp per sample, which holds it in one tile
  kBlock,  // one block per sample, each warp every so many tiles of it
  kSplit,  // several blocks per sample, the last to finish decides for all
};

struct LaunchConfig {
  Shape shape;
  int threads;  // of a block
  int parts;    // blocks per sample
  int64_t tiles_per_part;
};

constexpr int64_t kMostBlockElements = 16384;  // of a sample that one block can keep up with
constexpr int64_t kLeastTilesPerPart = 32;
constexpr int64_t kMostParts = 512;  // the last block adds up this many partial sums

FPI_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr LaunchConfig launch_config(int64_t dim, size_t compute_bytes) {
  const int64_t tiles = ceil_div(dim > 0 ? dim : 1, tile_elements(compute_bytes));
  if (tiles == 1) return {Shape::kWarp, kWarpThreads, 1, 1};
  const int warps = tiles < kMostWarps ? static_cast<int>(tiles) : kMostWarps;
  if (dim <= kMostBlockElements) return {Shape::kBlock, warps * kWarpThreads, 1, tiles};
  const int64_t wanted = ceil_div(tiles, kLeastTilesPerPart);
  const int64_t each = ceil_div(tiles, wanted < kMostParts ? wanted : kMostParts);
  return {Shape::kSplit, kMostWarps * kWarpThreads, static_cast<int>(ceil_div(tiles, each)), each};
}

}  // namespace fpi

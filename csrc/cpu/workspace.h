// The memory of one running call of the kernels of a cell, which the next call can use again.
#pragma once

#include <vector>

#include "aligned.h"

namespace fpi {

struct Workspace {
  Arena weights[2];          // of the loop's map, packed, by layer
  Arena operand;             // of a product outside of the loop, packed
  std::vector<Arena> tiles;  // by thread
  Arena arrays;              // of whoever calls the kernels

  // Makes room for `bytes` in each of the first `count` tiles: nothing may throw where the threads
  // run.
  void reserve_tiles(int64_t count, int64_t bytes) {
    while (static_cast<int64_t>(tiles.size()) < count) tiles.emplace_back();
    for (int64_t t = 0; t < count; ++t) tiles[t].reset(bytes);
  }

  int64_t bytes() const {
    int64_t sum = weights[0].bytes() + weights[1].bytes() + operand.bytes() + arrays.bytes();
    for (const Arena& tile : tiles) sum += tile.bytes();
    return sum;
  }
};

}  // namespace fpi

// Every thread iterates its tile until the batch has no sample left to put into it. Nothing that a
// sample's result depends on depends on its slot, its tile, or what else is in the batch.
#include "cell_loop.h"

#include <atomic>

#include "cell_tile.h"
#include "panels.h"

namespace fpi {
namespace {

// Of the caches of one core, for the slots of a tile; the weights want the rest.
constexpr int64_t kTileBytes = 512 * 1024;
// Blocks of rows in a tile. With few, the weights are read too often; a long history, which is
// read once per step, may rather lie further away.
constexpr int64_t kFewestBlocks = 4, kMostBlocks = 16;

template <class T>
int64_t tile_slots(const PackedMap<T>& map, int64_t threads) {
  const int64_t block = map.shape.block_rows;
  const int64_t block_bytes = Tile<T>::bytes(map, block);
  const int64_t fitting = std::clamp(kTileBytes / block_bytes, kFewestBlocks, kMostBlocks);
  const int64_t share = (map.p.batch + threads - 1) / threads;
  return std::max<int64_t>(1, std::min(fitting * block, share));
}

template <class T>
void run_tile(Tile<T>& tile, StateType state, std::atomic<int64_t>& queue, int64_t batch) {
  const auto next = [&queue, batch] {
    const int64_t sample = queue.fetch_add(1, std::memory_order_relaxed);
    return sample < batch ? sample : -1;
  };
  for (int64_t slot = 0; slot < tile.slots(); ++slot) {
    const int64_t sample = next();
    if (sample < 0) break;
    tile.load(slot, sample);
  }
  while (tile.num_active() > 0) {
    tile.evaluate();
    anderson_rows_cpu(tile.step(), state, 0, tile.slots());
    tile.turn_over(next);
  }
}

template <class T>
void solve(const CellLoopParams& p, StateType state, int64_t threads, ParallelFor run,
           Workspace& memory) {
  PackedMap<T> map{p, panel_shape(sizeof(T)), {nullptr, nullptr}};
  for (int l = 0; l < p.num_layers; ++l) {
    const CellLayer& layer = p.layers[l];
    map.weight[l] =
        pack_weight(map.shape, static_cast<const T*>(layer.weight), layer.outputs, layer.inputs,
                    layer.output_stride, layer.input_stride, p.precision, memory.weights[l], run);
  }
  const int64_t slots = tile_slots(map, threads);
  const int64_t tiles = std::min(threads, (p.batch + slots - 1) / slots);
  memory.reserve_tiles(tiles, Tile<T>::bytes(map, slots));
  std::atomic<int64_t> queue{0};
  run(0, tiles, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      Tile<T> tile(map, slots, memory.tiles[t]);
      run_tile(tile, state, queue, p.batch);
    }
  });
}

}  // namespace

int64_t cell_loop_tile(const CellLoopParams& p, StateType state, int64_t threads) {
  if (p.batch == 0) return 0;
  if (state == StateType::kFloat64) {
    return tile_slots(PackedMap<double>{p, panel_shape(8), {nullptr, nullptr}}, threads);
  }
  return tile_slots(PackedMap<float>{p, panel_shape(4), {nullptr, nullptr}}, threads);
}

void cell_loop_cpu(const CellLoopParams& p, StateType state, int64_t threads, ParallelFor run,
                   Workspace& memory) {
  if (p.batch == 0) return;
  if (state == StateType::kFloat64) return solve<double>(p, state, threads, run, memory);
  solve<float>(p, state, threads, run, memory);
}

}  // namespace fpi

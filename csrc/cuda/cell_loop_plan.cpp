#include "cell_loop_plan.h"

#include <algorithm>

#include "launch_config.h"

namespace fpi {
namespace {

// Chosen by arithmetic from the data sheets of an A100 and an H100, not measured.
constexpr double kStreamedSlots = 20;   // whose products take as long as streaming the weights
constexpr double kResidentSlots = 8;    // likewise, where they lie in shared memory
constexpr double kMeetings = 4;         // likewise, what the threads of a block wait for each other
constexpr double kSharing = 0.9;        // of the time of two tiles in turn, for two on one core
constexpr double kFarOperands = 3;      // times the time, where operands are not in shared memory
constexpr int64_t kCoreReserve = 1024;  // bytes of shared memory that the system takes per block
constexpr int64_t kStreamable = 1 << 20;  // bytes of weights that a lone block streams as fast as
                                          // separate kernels start

struct Offsets {
  int64_t end = 0;
  int64_t take(int64_t bytes) {
    constexpr int64_t kAlignment = 128;
    const int64_t at = end;
    end += ceil_div(bytes, kAlignment) * kAlignment;
    return at;
  }
};

int64_t step_bytes(int depth) {
  return kStepFixedBytes + static_cast<int64_t>(sizeof(AndersonSums)) +
         depth * depth * static_cast<int64_t>(sizeof(double));
}

// With the given slots and blocks per core; what does not fit shared memory goes elsewhere.
CellLoopPlan laid_out(const CellLoopParams& p, StateType state, const DeviceLimits& limits,
                      int slots, int warps, int per_core) {
  const ProductShape shape = product_shape(state, p.precision);
  const int64_t number = state == StateType::kFloat64 ? 8 : 4;
  CellLoopPlan plan{};
  plan.slots = slots;
  plan.warps = warps;
  plan.blocks_per_core = per_core;
  plan.stride = slot_stride(shape, slots);
  int64_t weight_bytes = 0, operand_bytes = 0;
  for (int l = 0; l < p.num_layers; ++l) {
    const CellLayer& layer = p.layers[l];
    LayerShape& cut = plan.layers[l];
    cut.panels = static_cast<int>(ceil_div(layer.outputs, kPanelOutputs));
    cut.chunks = static_cast<int>(ceil_div(layer.inputs, shape.chunk_inputs));
    weight_bytes += cut.weight_bytes(shape.chunk_bytes);
    plan.operand_bytes[l] =
        static_cast<int64_t>(cut.chunks) * shape.chunk_inputs * plan.stride * shape.operand_bytes;
    operand_bytes += plan.operand_bytes[l];
  }
  constexpr int64_t kHeader = 2 * kHeaderBytes;  // with what alignment takes
  const int64_t most =
      per_core == 1 ? limits.shared_bytes : (limits.shared_bytes - kCoreReserve) / per_core;
  const int64_t step = step_bytes(p.depth);
  const int64_t ring = kChunkStages * shape.chunk_bytes;
  plan.resident = kHeader + warps * step + operand_bytes + weight_bytes <= most;
  plan.room_bytes = plan.resident ? step : std::max(step, ring);
  plan.operands_shared = plan.resident || kHeader + warps * plan.room_bytes + operand_bytes <= most;

  Offsets shared, workspace, tile;
  shared.take(kHeaderBytes);
  plan.room_bytes = ceil_div(plan.room_bytes, 128) * 128;
  plan.room = shared.take(warps * plan.room_bytes);
  plan.queue = workspace.take(sizeof(int64_t));
  for (int l = 0; l < p.num_layers; ++l) {
    plan.operand[l] = (plan.operands_shared ? shared : tile).take(plan.operand_bytes[l]);
    const int64_t bytes = plan.layers[l].weight_bytes(shape.chunk_bytes);
    if (plan.resident) plan.resident_weight[l] = shared.take(bytes);
    plan.weight[l] = workspace.take(bytes);
  }
  plan.shared_bytes = shared.end;
  const int64_t points = slots * p.dim * number;
  plan.x = tile.take(points);
  plan.gx = tile.take(points);
  plan.best = tile.take(points);
  plan.anchor = tile.take(p.depth ? points : 0);
  plan.columns_f = tile.take(p.depth * points);
  plan.columns_g = tile.take(p.depth * points);
  plan.gram = tile.take(slots * p.depth * p.depth * sizeof(double));
  plan.control = tile.take(slots * sizeof(Control));
  plan.atol = tile.take(slots * sizeof(double));
  plan.residual = tile.take(slots * sizeof(double));
  plan.num_steps = tile.take(slots * sizeof(int32_t));
  plan.status = tile.take(slots * sizeof(int8_t));
  plan.tile_bytes = tile.end;
  plan.tiles = workspace.end;
  const int64_t wanted = ceil_div(p.batch, slots);
  plan.blocks = static_cast<int>(std::min(wanted, limits.cores * per_core));
  plan.workspace_bytes = plan.tiles + plan.blocks * plan.tile_bytes;
  return plan;
}

// Time of the whole solve, in units that cancel.
double cost(const CellLoopPlan& plan, const CellLoopParams& p) {
  const double at_once = static_cast<double>(plan.slots) * plan.blocks;
  const double rounds = std::max(1.0, static_cast<double>(p.batch) / at_once);
  const double least = plan.resident ? kResidentSlots : kStreamedSlots;
  const double sharing = plan.blocks_per_core == 1 ? 1.0 : plan.blocks_per_core * kSharing;
  return rounds * sharing * (std::max<double>(plan.slots, least) + kMeetings) *
         (plan.operands_shared ? 1.0 : kFarOperands);
}

}  // namespace

CellLoopPlan cell_loop_plan(const CellLoopParams& p, StateType state, const DeviceLimits& limits,
                            int slots, int warps) {
  const int width = warps ? warps : kMostWarps;
  CellLoopPlan best{};
  bool any = false;
  for (int candidate = kSlotGroup; candidate <= kMostSlots; candidate *= 2) {
    if (slots && candidate != slots) continue;
    for (int per_core = 1; per_core <= 2; ++per_core) {
      const CellLoopPlan plan = laid_out(p, state, limits, candidate, width, per_core);
      if (any && cost(plan, p) >= cost(best, p)) continue;
      best = plan;
      any = true;
    }
  }
  return best;
}

const char* why_not_worth_fusing(const CellLoopPlan& plan, const CellLoopParams& p,
                                 StateType state, const DeviceLimits& limits) {
  if (!plan.operands_shared) {
    return "what a tile of samples reads of x does not fit into shared memory";
  }
  const int64_t chunk = product_shape(state, p.precision).chunk_bytes;
  const int64_t bytes = plan.layers[0].weight_bytes(chunk) + plan.layers[1].weight_bytes(chunk);
  if (!plan.resident && bytes > kStreamable && 2 * plan.blocks < limits.cores) {
    return "there are too few samples for so large a weight: each tile of them reads all of it in "
           "every step, and less than half of the device would work";
  }
  return nullptr;
}

}  // namespace fpi

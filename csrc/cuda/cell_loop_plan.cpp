#include "cell_loop_plan.h"

#include <algorithm>

#include "launch_config.h"

namespace fpi {
namespace {

// Chosen by arithmetic from the data sheets of an A100 and an H100, not measured.
constexpr double kResidentSlots = 8;    // whose products take as long as reading resident weights
constexpr double kMeetings = 4;         // likewise, what the threads of a block wait for each other
constexpr double kSharing = 0.9;        // of the time of two tiles in turn, for two on one core
constexpr double kFarOperands = 1000;   // times the time: none such while there is another
constexpr int64_t kCoreReserve = 1024;  // bytes of shared memory that the system takes per block
constexpr int64_t kStreamable = 1 << 20;  // bytes of weights that a lone block streams as fast as
                                          // separate kernels start

int64_t aligned(int64_t bytes) {
  constexpr int64_t kAlignment = 128;
  return ceil_div(bytes, kAlignment) * kAlignment;
}

// Slots whose products take as long as streaming the weights of a layer.
double streamed_slots(Precision precision) {
  switch (precision) {
    case Precision::kTf32x3: return 40;
    case Precision::kTf32:
    case Precision::kBf16: return 100;
    default: return 20;
  }
}

// A lane has no registers for more.
int most_slots(StateType state) {
  return state == StateType::kFloat64 ? kMostSlots / 2 : kMostSlots;
}

struct Offsets {
  int64_t end = 0;
  int64_t take(int64_t bytes) {
    const int64_t at = end;
    end += aligned(bytes);
    return at;
  }
};

int64_t step_bytes(int depth) {
  return kStepFixedBytes + static_cast<int64_t>(sizeof(AndersonSums)) +
         gram_size(depth) * static_cast<int64_t>(sizeof(double));
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
  int64_t needed = kHeaderBytes;  // to keep weights and operands in shared memory
  for (int l = 0; l < p.num_layers; ++l) {
    const CellLayer& layer = p.layers[l];
    LayerShape& cut = plan.layers[l];
    cut.panels = static_cast<int>(ceil_div(layer.outputs, kPanelOutputs));
    cut.chunks = static_cast<int>(ceil_div(layer.inputs, shape.chunk_inputs));
    needed += aligned(cut.weight_bytes(shape.chunk_bytes));
    plan.operand_bytes[l] =
        static_cast<int64_t>(cut.chunks) * shape.chunk_inputs * plan.stride * shape.operand_bytes;
    needed += aligned(plan.operand_bytes[l]);
  }
  const int64_t most =
      per_core == 1 ? limits.shared_bytes : (limits.shared_bytes - kCoreReserve) / per_core;
  const int64_t step = aligned(step_bytes(p.depth));
  const int64_t ring = aligned(kChunkStages * shape.chunk_bytes);
  plan.resident = needed + warps * step <= most;
  plan.room_bytes = plan.resident ? step : std::max(step, ring);

  Offsets shared, workspace, tile;
  shared.take(kHeaderBytes);
  plan.room = shared.take(warps * plan.room_bytes);
  plan.queue = workspace.take(sizeof(int64_t));
  for (int l = 0; l < p.num_layers; ++l) {
    const int64_t bytes = plan.layers[l].weight_bytes(shape.chunk_bytes);
    if (plan.resident) plan.resident_weight[l] = shared.take(bytes);
    plan.weight[l] = workspace.take(bytes);
  }
  // In shared memory as far as it goes: what is used most for its size comes first.
  const auto place = [&](Place& array, int64_t bytes) {
    array.shared = shared.end + aligned(bytes) <= most;
    array.at = (array.shared ? shared : tile).take(bytes);
  };
  const int64_t points = slots * p.dim * number;
  for (int l = 0; l < p.num_layers; ++l) place(plan.operand[l], plan.operand_bytes[l]);
  place(plan.status, slots * sizeof(int8_t));
  place(plan.num_steps, slots * sizeof(int32_t));
  place(plan.atol, slots * sizeof(double));
  place(plan.residual, slots * sizeof(double));
  place(plan.control, slots * sizeof(Control));
  place(plan.gram, slots * gram_size(p.depth) * sizeof(double));
  place(plan.x, points);
  place(plan.gx, points);
  place(plan.columns_f, p.depth * points);
  place(plan.columns_g, p.depth * points);
  place(plan.best, points);
  place(plan.anchor, p.depth ? points : 0);
  plan.shared_bytes = shared.end;
  plan.tile_bytes = tile.end;
  plan.tiles = workspace.end;
  const int64_t wanted = ceil_div(p.batch, slots);
  plan.blocks = static_cast<int>(std::min(wanted, limits.cores * per_core));
  plan.workspace_bytes = plan.tiles + plan.blocks * plan.tile_bytes;
  return plan;
}

bool operands_shared(const CellLoopPlan& plan) {
  return plan.operand[0].shared && (plan.operand_bytes[1] == 0 || plan.operand[1].shared);
}

// Time of the whole solve, in units that cancel.
double cost(const CellLoopPlan& plan, const CellLoopParams& p) {
  const double at_once = static_cast<double>(plan.slots) * plan.blocks;
  const double rounds = std::max(1.0, static_cast<double>(p.batch) / at_once);
  const double least = plan.resident ? kResidentSlots : streamed_slots(p.precision);
  const double sharing = plan.blocks_per_core == 1 ? 1.0 : plan.blocks_per_core * kSharing;
  return rounds * sharing * (std::max<double>(plan.slots, least) + kMeetings) *
         (operands_shared(plan) ? 1.0 : kFarOperands);
}

}  // namespace

CellLoopPlan cell_loop_plan(const CellLoopParams& p, StateType state, const DeviceLimits& limits,
                            int slots, int warps) {
  const int width = warps ? warps : kMostWarps;
  CellLoopPlan best{};
  bool any = false;
  for (int candidate = kSlotGroup; candidate <= most_slots(state); candidate *= 2) {
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

const char* why_not_worth_fusing(const CellLoopPlan& plan, const CellLoopParams& p, StateType state,
                                 const DeviceLimits& limits) {
  if (!operands_shared(plan)) {
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

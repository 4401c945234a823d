// How the fused loop of a cell is laid out on a device: samples per tile, blocks, and where every
// array lies. Nothing that a sample's result depends on is decided here. Needs no CUDA.
#pragma once

#include "../common/anderson_judge.h"
#include "../common/cell_loop_params.h"
#include "product_shape.h"

namespace fpi {

struct DeviceLimits {
  int64_t cores;         // multiprocessors
  int64_t shared_bytes;  // of shared memory that a block may ask for
};

constexpr int kChunkStages = 3;  // chunks of weights on their way to one warp
constexpr int kMostSlots = 64;

// Of shared memory: what a block keeps of its slots, and what a warp keeps of a step but its sums
// and its Gram matrix.
constexpr int64_t kHeaderBytes = 1024;
constexpr int64_t kStepFixedBytes = sizeof(AndersonSums) + sizeof(AndersonPlan) +
                                    sizeof(SmallSolve) + sizeof(Control) + 2 * sizeof(double);

// An array of a tile: bytes into shared memory, or into the tile's part of the workspace.
struct Place {
  int64_t at;
  bool shared;
};

// Offsets are in bytes: into shared memory, or into the workspace.
struct CellLoopPlan {
  int slots;  // samples of a tile
  int warps;  // of a block, which holds one tile
  int blocks;
  int blocks_per_core;
  int stride;     // slots from one input of an operand to the next
  bool resident;  // the weights stay in shared memory
  LayerShape layers[2];

  int64_t room, room_bytes;  // of each warp, for its step and for the chunks on their way to it
  int64_t resident_weight[2];
  int64_t shared_bytes;

  int64_t queue;  // the next sample of the batch
  int64_t weight[2];
  int64_t tiles, tile_bytes;
  int64_t workspace_bytes;

  Place operand[2];  // of each layer
  int64_t operand_bytes[2];
  Place status, num_steps, atol, residual, control, gram, x, gx, columns_f, columns_g, best,
      anchor;  // of every slot
};

// The plan for this cell and device; `warps` and `slots` are chosen where they are 0.
CellLoopPlan cell_loop_plan(const CellLoopParams& p, StateType state, const DeviceLimits& limits,
                            int slots = 0, int warps = 0);

// Why the device would rather run the loop as separate kernels, or null.
const char* why_not_worth_fusing(const CellLoopPlan& plan, const CellLoopParams& p, StateType state,
                                 const DeviceLimits& limits);

}  // namespace fpi

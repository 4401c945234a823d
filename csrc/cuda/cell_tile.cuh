// A tile of samples that one block iterates: what it keeps of them, who comes and goes, and one
// evaluation of the map on them.
#pragma once

#include "activation.cuh"
#include "anderson_step.cuh"
#include "cell_loop_plan.h"
#include "chunk_stream.cuh"
#include "product.cuh"

namespace fpi {

constexpr int64_t kNobody = -1;  // in a slot without a sample

// At the start of shared memory.
struct TileHeader {
  StepParams step;  // row and sample i of it are slot i
  int64_t samples[kMostSlots];
};

static_assert(sizeof(TileHeader) <= kHeaderBytes);

// Sets up the step's view of the tile's part of the workspace; by one thread.
inline __device__ void describe_step(const CellLoopParams& p, const CellLoopPlan& plan,
                                     unsigned char* part, StepParams& step) {
  step = StepParams{};
  step.x = part + plan.x;
  step.gx = part + plan.gx;
  step.best = part + plan.best;
  step.anchor = part + plan.anchor;
  step.columns_f = part + plan.columns_f;
  step.columns_g = part + plan.columns_g;
  step.gram = reinterpret_cast<double*>(part + plan.gram);
  step.control = reinterpret_cast<double*>(part + plan.control);
  step.atol = reinterpret_cast<const double*>(part + plan.atol);
  step.residual = reinterpret_cast<double*>(part + plan.residual);
  step.num_steps = reinterpret_cast<int32_t*>(part + plan.num_steps);
  step.status = reinterpret_cast<int8_t*>(part + plan.status);
  step.rows = plan.slots;
  step.dim = p.dim;
  step.depth = p.depth;
  step.rtol = p.rtol;
  step.max_steps = p.max_steps;
  step.beta = p.beta;
  step.ridge = p.ridge;
}

// Starts the solve of `sample` in an empty slot; by one warp.
template <class T>
__device__ void seat(const CellLoopParams& p, TileHeader& tile, int slot, int64_t sample) {
  const StepParams& step = tile.step;
  const T* x0 = static_cast<const T*>(p.x) + sample * p.dim;
  T* x = static_cast<T*>(step.x) + slot * p.dim;
  T* best = static_cast<T*>(step.best) + slot * p.dim;
  for (int64_t k = lane_index(); k < p.dim; k += kWarpThreads) x[k] = best[k] = x0[k];
  double* control = step.control + slot * kControlSize;
  for (int k = lane_index(); k < kControlSize; k += kWarpThreads) control[k] = 0.0;
  // A step reads all of it, and writes what it needs of it as the history grows.
  double* gram = step.gram + slot * p.depth * p.depth;
  for (int k = lane_index(); k < p.depth * p.depth; k += kWarpThreads) gram[k] = 0.0;
  if (lane_index() == 0) {
    const_cast<double*>(step.atol)[slot] = p.atol[sample];
    step.status[slot] = kActive;
    step.num_steps[slot] = 0;
    tile.samples[slot] = sample;
  }
  __syncwarp();
}

// Hands over the sample that has stopped in a slot; by one warp.
template <class T>
__device__ void dismiss(const CellLoopParams& p, TileHeader& tile, int slot) {
  const StepParams& step = tile.step;
  const int64_t sample = tile.samples[slot];
  const T* best = static_cast<const T*>(step.best) + slot * p.dim;
  T* x = static_cast<T*>(p.x) + sample * p.dim;
  for (int64_t k = lane_index(); k < p.dim; k += kWarpThreads) x[k] = best[k];
  if (lane_index() == 0) {
    p.status[sample] = step.status[slot];
    p.num_steps[sample] = step.num_steps[slot];
    p.residual[sample] = step.residual[slot];
  }
  __syncwarp();  // everyone has read which sample it was
}

// The next sample of the batch that no tile has taken, or kNobody.
inline __device__ int64_t next_sample(int64_t batch, unsigned long long* queue) {
  unsigned long long sample = 0;
  if (lane_index() == 0) sample = atomicAdd(queue, 1ull);
  sample = __shfl_sync(kAllLanes, sample, 0);
  return sample < static_cast<unsigned long long>(batch) ? static_cast<int64_t>(sample) : kNobody;
}

// Takes the steps of the slots that fall to this warp. Samples that stop make room for others. One
// copy for each dtype, so that all kernels round alike. `room` is this warp's, in shared memory.
template <class T>
__device__ __noinline__ void take_steps(const CellLoopParams& p, TileHeader& tile, int slots,
                                        unsigned char* room, unsigned long long* queue) {
  using Step = AndersonStep<T, T>;
  static_assert(sizeof(TeamMemory<Step>) <= kStepFixedBytes);
  const Shared<Step, OneWarp> shared(room, p.depth);
  const int64_t tiles = ceil_div(p.dim, tile_elements(sizeof(T)));
  for (int slot = warp_index(); slot < slots; slot += warp_count()) {
    if (tile.samples[slot] == kNobody) continue;
    step_sample(tile.step, slot, slot, shared, tiles, true);
    __syncwarp();
    if (tile.step.status[slot] == kActive) continue;
    dismiss<T>(p, tile, slot);
    const int64_t sample = next_sample(p.batch, queue);
    if (sample != kNobody) {
      seat<T>(p, tile, slot, sample);
    } else if (lane_index() == 0) {
      tile.samples[slot] = kNobody;
    }
  }
}

template <class Product, int kSlots>
struct CellTile {
  using T = typename Product::Number;
  static constexpr int kChunkBytes = Product::kShape.chunk_bytes;
  static constexpr int kStride = slot_stride(Product::kShape, kSlots);

  const CellLoopParams& p;
  const CellLoopPlan& plan;
  unsigned char* shared;
  unsigned char* workspace;
  unsigned char* part;  // of the workspace
  TileHeader& header;

  __device__ CellTile(const CellLoopParams& p_, const CellLoopPlan& plan_, unsigned char* shared_,
                      unsigned char* workspace_)
      : p(p_),
        plan(plan_),
        shared(shared_),
        workspace(workspace_),
        part(workspace_ + plan_.tiles + blockIdx.x * plan_.tile_bytes),
        header(*reinterpret_cast<TileHeader*>(shared_)) {}

  __device__ unsigned char* room() const {
    return shared + plan.room + warp_index() * plan.room_bytes;
  }
  __device__ unsigned char* operand(int layer) const {
    return (plan.operands_shared ? shared : part) + plan.operand[layer];
  }
  __device__ unsigned char* weights(int layer) const {
    return plan.resident ? shared + plan.resident_weight[layer] : workspace + plan.weight[layer];
  }

  // Seats the first samples; those of the queue come after them.
  __device__ void begin() const {
    if (threadIdx.x == 0) describe_step(p, plan, part, header.step);
    for (int l = 0; l < p.num_layers; ++l) {
      // Inputs beyond a layer's last are multiplied with weights of zero.
      zero(operand(l), plan.operand_bytes[l]);
      if (plan.resident) {
        copy(weights(l), workspace + plan.weight[l], plan.layers[l].weight_bytes(kChunkBytes));
      }
    }
    __syncthreads();
    for (int slot = warp_index(); slot < kSlots; slot += warp_count()) {
      const int64_t sample = static_cast<int64_t>(blockIdx.x) * kSlots + slot;
      if (sample < p.batch) {
        seat<T>(p, header, slot, sample);
      } else if (lane_index() == 0) {
        header.samples[slot] = kNobody;
      }
    }
  }

  __device__ bool anybody() const {
    bool any = false;
    for (int slot = 0; slot < kSlots; ++slot) any = any || header.samples[slot] != kNobody;
    return any;
  }

  // Writes x_factor x, as the first layer reads it: four inputs of eight samples at a time.
  __device__ void gather() const {
    constexpr int kInputs = kWarpThreads / kSlotGroup;
    unsigned char* to = operand(0);
    const T* x = static_cast<const T*>(header.step.x);
    const T* factor = static_cast<const T*>(p.x_factor);
    for (int64_t k = warp_index() * kInputs + lane_index() % kInputs; k < p.dim;
         k += warp_count() * kInputs) {
      for (int slot = lane_index() / kInputs; slot < kSlots; slot += kSlotGroup) {
        const int64_t sample = header.samples[slot];
        if (sample == kNobody) continue;
        T value = x[slot * p.dim + k];
        if (factor) value *= factor[sample * p.dim + k];
        Product::put(to, k, kStride, slot, value);
      }
    }
  }

  // From the operand of a layer to that of the next, or to g(x) after the last.
  __device__ void apply(int l) const {
    const CellLayer& layer = p.layers[l];
    const LayerShape& cut = plan.layers[l];
    const bool last = l + 1 == p.num_layers;
    unsigned char* next = last ? nullptr : operand(l + 1);
    T* gx = static_cast<T*>(const_cast<void*>(header.step.gx));
    const T* x = static_cast<const T*>(header.step.x);
    constexpr int kOperandChunk = Product::kShape.chunk_inputs * kStride *
                                  Product::kShape.operand_bytes;
    ChunkStream<kChunkBytes> stream(weights(l), cut, plan.resident, room());
    for (int panel = warp_index(); panel < cut.panels; panel += warp_count()) {
      __syncwarp();  // tensor cores want the lanes together
      typename Product::template Sums<kSlots> sums;
      const unsigned char* inputs = operand(l);
      for (int chunk = 0; chunk < cut.chunks; ++chunk, inputs += kOperandChunk) {
        sums.add(stream.next(), inputs);
      }
      sums.for_each([&](int output, int slot, T sum) {
        const int64_t j = static_cast<int64_t>(panel) * kPanelOutputs + output;
        const int64_t sample = header.samples[slot];
        if (j >= layer.outputs || sample == kNobody) return;
        const T y = finished(layer, sample * layer.outputs + j, j, sum);
        if (!last) {
          Product::put(next, j, kStride, slot, y);
        } else {
          const int64_t at = slot * p.dim + j;
          gx[at] = p.carry == 0.0 ? y : static_cast<T>(fma(static_cast<T>(p.carry), x[at], y));
        }
      });
    }
    stream.end();
  }

  // factor * activation(sum + bias + shift), of output j; `at` is its place in shift and factor.
  static __device__ __forceinline__ T finished(const CellLayer& layer, int64_t at, int64_t j,
                                               T sum) {
    if (layer.bias) sum += static_cast<const T*>(layer.bias)[j];
    if (layer.shift) sum += static_cast<const T*>(layer.shift)[at];
    const T y = activate(layer.activation, sum);
    return layer.factor ? y * static_cast<const T*>(layer.factor)[at] : y;
  }

 private:
  static __device__ void zero(unsigned char* to, int64_t bytes) {
    for (int64_t at = threadIdx.x * 16; at < bytes; at += blockDim.x * 16) {
      *reinterpret_cast<uint4*>(to + at) = uint4{};
    }
  }
  static __device__ void copy(unsigned char* to, const unsigned char* from, int64_t bytes) {
    for (int64_t at = threadIdx.x * 16; at < bytes; at += blockDim.x * 16) {
      *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(from + at);
    }
  }
};

}  // namespace fpi

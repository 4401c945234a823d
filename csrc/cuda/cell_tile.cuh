// A tile of samples that one block iterates: one evaluation of the map on its slots.
#pragma once

#include "activation.cuh"
#include "chunk_stream.cuh"
#include "product.cuh"
#include "slots.cuh"

namespace fpi {

template <class Product>
struct CellTile {
  using T = typename Product::Number;
  static constexpr int kChunkBytes = Product::kShape.chunk_bytes;

  const CellLoopParams& p;
  const CellLoopPlan& plan;
  TileMemory memory;
  unsigned char* workspace;
  TileHeader& header;

  __device__ CellTile(const CellLoopParams& p_, const CellLoopPlan& plan_, unsigned char* shared_,
                      unsigned char* workspace_)
      : p(p_),
        plan(plan_),
        memory{shared_, workspace_ + plan_.tiles + blockIdx.x * plan_.tile_bytes},
        workspace(workspace_),
        header(*reinterpret_cast<TileHeader*>(shared_)) {}

  __device__ unsigned char* room() const {
    return memory.shared + plan.room + warp_index() * plan.room_bytes;
  }
  __device__ unsigned char* operand(int layer) const { return memory[plan.operand[layer]]; }
  __device__ unsigned char* weights(int layer) const {
    return plan.resident ? memory.shared + plan.resident_weight[layer]
                         : workspace + plan.weight[layer];
  }

  // Seats the first samples; those of the queue come after them.
  __device__ void begin() const {
    if (threadIdx.x == 0) describe_step(p, plan, memory, header.step);
    for (int l = 0; l < p.num_layers; ++l) {
      // Inputs beyond a layer's last are multiplied with weights of zero.
      zero(operand(l), plan.operand_bytes[l]);
      if (plan.resident) {
        copy(weights(l), workspace + plan.weight[l], plan.layers[l].weight_bytes(kChunkBytes));
      }
    }
    __syncthreads();
    for (int slot = warp_index(); slot < kMostSlots; slot += warp_count()) {
      const int64_t sample = static_cast<int64_t>(blockIdx.x) * plan.slots + slot;
      if (slot < plan.slots && sample < p.batch) {
        seat<T>(p, header, slot, sample);
      } else if (lane_index() == 0) {
        header.samples[slot] = kNobody;
      }
    }
  }

  // Puts the slots that hold a sample side by side, into columns of the operands; returns a bit for
  // each, to every thread.
  __device__ uint64_t line_up() const {
    const uint64_t seats = seated(header);
    if (warp_index() > 0) return seats;
    for (int slot = lane_index(); slot < kMostSlots; slot += kWarpThreads) {
      if (seats >> slot & 1) header.slots[column_of(seats, slot)] = slot;
    }
    return seats;
  }

  // Writes x_factor x, as the first layer reads it: four inputs of eight samples at a time.
  __device__ void gather(uint64_t seats) const {
    constexpr int kInputs = kWarpThreads / kSlotGroup;
    unsigned char* to = operand(0);
    const T* x = static_cast<const T*>(header.step.x);
    const T* factor = static_cast<const T*>(p.x_factor);
    for (int64_t k = warp_index() * kInputs + lane_index() % kInputs; k < p.dim;
         k += warp_count() * kInputs) {
      for (int slot = lane_index() / kInputs; slot < plan.slots; slot += kSlotGroup) {
        if (!(seats >> slot & 1)) continue;
        T value = x[slot * p.dim + k];
        if (factor) value *= factor[header.samples[slot] * p.dim + k];
        Product::put(to, k, plan.stride, column_of(seats, slot), value);
      }
    }
  }

  // From the operand of a layer to that of the next, or to g(x) after the last; with as few columns
  // as `count` samples need.
  __device__ void apply(int l, int count) const {
    if (count <= 8) return apply_columns<8>(l, count);
    if (count <= 16) return apply_columns<16>(l, count);
    if (count <= 32 || sizeof(T) == 8) return apply_columns<32>(l, count);
    if constexpr (sizeof(T) == 4) apply_columns<64>(l, count);
  }

  template <int kColumns>
  __device__ void apply_columns(int l, int count) const {
    const CellLayer& layer = p.layers[l];
    const LayerShape& cut = plan.layers[l];
    const bool last = l + 1 == p.num_layers;
    unsigned char* next = last ? nullptr : operand(l + 1);
    T* gx = static_cast<T*>(const_cast<void*>(header.step.gx));
    const T* x = static_cast<const T*>(header.step.x);
    const int operand_chunk =
        Product::kShape.chunk_inputs * Product::kShape.operand_bytes * plan.stride;
    ChunkStream<kChunkBytes> stream(weights(l), cut, plan.resident, room());
    for (int panel = warp_index(); panel < cut.panels; panel += warp_count()) {
      __syncwarp();  // tensor cores want the lanes together
      typename Product::template Sums<kColumns> sums;
      const unsigned char* inputs = operand(l);
      for (int chunk = 0; chunk < cut.chunks; ++chunk, inputs += operand_chunk) {
        sums.add(stream.next(), inputs, plan.stride);
      }
      sums.for_each([&](int output, int column, T sum) {
        const int64_t j = static_cast<int64_t>(panel) * kPanelOutputs + output;
        if (j >= layer.outputs || column >= count) return;
        const int slot = header.slots[column];
        const T y = finished(layer, header.samples[slot] * layer.outputs + j, j, sum);
        if (!last) {
          Product::put(next, j, plan.stride, column, y);
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

// A tile of samples that one thread iterates: its slots, and one evaluation of the map on them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/cell_loop_params.h"
#include "../common/control.h"
#include "../common/status.h"
#include "../common/step_params.h"
#include "activation.h"
#include "aligned.h"
#include "panel_product.h"

namespace fpi {

// The weights of a map as multiply_rows reads them, shared by all tiles.
template <class T>
struct PackedMap {
  const CellLoopParams& p;
  PanelShape shape;
  const T* weight[2];
};

// Adds what a layer adds to its sums, and applies its activation, for elements [k, k + n).
template <class T>
FPI_CLONES void finish_layer(const CellLayer& layer, int64_t sample, const T* sums, int64_t k,
                             int64_t n, T* out) {
  std::copy(sums + k, sums + k + n, out);
  if (layer.bias) {
    const T* bias = static_cast<const T*>(layer.bias) + k;
    for (int64_t j = 0; j < n; ++j) out[j] += bias[j];
  }
  if (layer.shift) {
    const T* shift = static_cast<const T*>(layer.shift) + sample * layer.outputs + k;
    for (int64_t j = 0; j < n; ++j) out[j] += shift[j];
  }
  activate(layer.activation, out, n);
  if (layer.factor) {
    const T* factor = static_cast<const T*>(layer.factor) + sample * layer.outputs + k;
    for (int64_t j = 0; j < n; ++j) out[j] *= factor[j];
  }
}

// Slots hold samples; a slot that is let go of takes the next sample of the batch. What a step
// needs of a sample lies in its slot, so that the memory in use does not grow with the batch.
template <class T>
class Tile {
 public:
  Tile(const PackedMap<T>& map, int64_t slots, Arena& arena) : map_(map), slots_(slots) {
    const CellLoopParams& p = map.p;
    const int64_t state = slots * p.dim;
    samples_ = arena.take<int64_t>(slots);
    active_ = arena.take<int64_t>(slots);
    gx_ = arena.take<T>(state);
    blocked_ = arena.take<T>(blocked_size(map.shape, slots, widest_input(p)));
    sums_ = arena.take<T>(slots * sum_stride(map));
    step_ = StepParams{};
    step_.x = arena.take<T>(state);
    step_.gx = gx_;
    step_.best = arena.take<T>(state);
    step_.anchor = arena.take<T>(p.depth ? state : 0);
    step_.columns_f = arena.take<T>(p.depth * state);
    step_.columns_g = arena.take<T>(p.depth * state);
    step_.gram = arena.take<double>(slots * p.depth * p.depth);
    step_.control = arena.take<double>(slots * kControlSize);
    atol_ = arena.take<double>(slots);
    step_.atol = atol_;
    step_.status = arena.take<int8_t>(slots);
    step_.num_steps = arena.take<int32_t>(slots);
    step_.residual = arena.take<double>(slots);
    step_.rows = slots;
    step_.dim = p.dim;
    step_.depth = p.depth;
    step_.rtol = p.rtol;
    step_.max_steps = p.max_steps;
    step_.beta = p.beta;
    step_.ridge = p.ridge;
    // Anything but active: an empty slot takes no step.
    std::fill(step_.status, step_.status + slots, static_cast<int8_t>(kConverged));
  }

  static int64_t bytes(const PackedMap<T>& map, int64_t slots) {
    const CellLoopParams& p = map.p;
    const int64_t state = slots * p.dim;
    return 2 * Arena::size_of<int64_t>(slots) + 3 * Arena::size_of<T>(state) +
           Arena::size_of<T>(blocked_size(map.shape, slots, widest_input(p))) +
           Arena::size_of<T>(slots * sum_stride(map)) +
           Arena::size_of<T>(p.depth ? state : 0) + 2 * Arena::size_of<T>(p.depth * state) +
           Arena::size_of<double>(slots * p.depth * p.depth) +
           Arena::size_of<double>(slots * kControlSize) + 2 * Arena::size_of<double>(slots) +
           Arena::size_of<int8_t>(slots) + Arena::size_of<int32_t>(slots);
  }

  int64_t slots() const { return slots_; }
  int64_t num_active() const { return num_active_; }
  const StepParams& step() const { return step_; }

  // Starts the solve of `sample` in an empty slot.
  void load(int64_t slot, int64_t sample) {
    const CellLoopParams& p = map_.p;
    const T* x0 = static_cast<const T*>(p.x) + sample * p.dim;
    std::copy(x0, x0 + p.dim, state(step_.x, slot));
    std::copy(x0, x0 + p.dim, state(step_.best, slot));
    std::fill_n(step_.control + slot * kControlSize, kControlSize, 0.0);
    atol_[slot] = p.atol[sample];
    step_.status[slot] = kActive;
    step_.num_steps[slot] = 0;
    samples_[slot] = sample;
    active_[num_active_++] = slot;
  }

  // Hands over the samples that have stopped: calls next() for another one, below 0 for none.
  template <class Next>
  void turn_over(Next&& next) {
    int64_t kept = 0;
    const int64_t before = num_active_;
    for (int64_t a = 0; a < before; ++a) {
      const int64_t slot = active_[a];
      if (step_.status[slot] == kActive) {
        active_[kept++] = slot;
        continue;
      }
      unload(slot);
      const int64_t sample = next();
      if (sample < 0) continue;
      num_active_ = kept;
      load(slot, sample);
      kept = num_active_;
    }
    num_active_ = kept;
  }

  // gx = g(x) in every active slot.
  void evaluate() {
    const CellLoopParams& p = map_.p;
    gather();
    for (int l = 0; l < p.num_layers; ++l) {
      const CellLayer& layer = p.layers[l];
      const bool last = l + 1 == p.num_layers;
      multiply_rows(blocked_, num_active_, layer.inputs, map_.weight[l], layer.outputs, sums_,
                    sum_stride(map_));
      for (int64_t a = 0; a < num_active_; ++a) {
        const int64_t slot = active_[a];
        const T* sums = sums_ + a * sum_stride(map_);
        if (last) {
          finish_layer(layer, samples_[slot], sums, 0, p.dim, gx_ + slot * p.dim);
          if (p.carry != 0.0) add_carry(slot);
          continue;
        }
        for (int64_t k = 0; k < layer.outputs; k += kRowChunk) {
          const int64_t n = std::min(kRowChunk, layer.outputs - k);
          T* target = blocked_ + chunk_offset(map_.shape, layer.outputs, a, k);
          finish_layer(layer, samples_[slot], sums, k, n, target);
          round_operands(p.precision, target, n);
        }
      }
    }
  }

 private:
  static int64_t widest_input(const CellLoopParams& p) {
    return std::max(p.dim, p.num_layers == 2 ? p.layers[1].inputs : 0);
  }
  static int64_t sum_stride(const PackedMap<T>& map) {
    const CellLoopParams& p = map.p;
    const int64_t most = std::max(p.dim, p.layers[0].outputs);
    return round_up(most, map.shape.panel_columns);
  }
  T* state(void* array, int64_t slot) const { return static_cast<T*>(array) + slot * map_.p.dim; }

  void unload(int64_t slot) {
    const CellLoopParams& p = map_.p;
    const int64_t sample = samples_[slot];
    const T* best = state(step_.best, slot);
    std::copy(best, best + p.dim, static_cast<T*>(p.x) + sample * p.dim);
    p.status[sample] = step_.status[slot];
    p.num_steps[sample] = step_.num_steps[slot];
    p.residual[sample] = step_.residual[slot];
  }

  // The states of the active slots side by side, as the first layer reads them.
  void gather() {
    const CellLoopParams& p = map_.p;
    for (int64_t a = 0; a < num_active_; ++a) {
      const int64_t slot = active_[a];
      const T* x = state(step_.x, slot);
      const T* factor = static_cast<const T*>(p.x_factor);
      if (factor) factor += samples_[slot] * p.dim;
      for (int64_t k = 0; k < p.dim; k += kRowChunk) {
        T* target = blocked_ + chunk_offset(map_.shape, p.dim, a, k);
        const int64_t n = std::min(kRowChunk, p.dim - k);
        if (factor) {
          for (int64_t j = 0; j < n; ++j) target[j] = factor[k + j] * x[k + j];
        } else {
          std::copy(x + k, x + k + n, target);
        }
        round_operands(p.precision, target, n);
      }
    }
  }

  void add_carry(int64_t slot) {
    const T carry = static_cast<T>(map_.p.carry);
    const T* x = state(step_.x, slot);
    T* gx = gx_ + slot * map_.p.dim;
    for (int64_t j = 0; j < map_.p.dim; ++j) gx[j] += carry * x[j];
  }

  const PackedMap<T>& map_;
  int64_t slots_;
  int64_t num_active_ = 0;
  int64_t* samples_;  // (slots,) the sample in each slot
  int64_t* active_;   // (num_active,) the slots that hold one
  double* atol_;
  T* gx_;
  T* blocked_;  // what the next layer reads, in blocks of rows
  T* sums_;     // (slots, sum_stride) what multiply_rows wrote
  StepParams step_;
};

}  // namespace fpi

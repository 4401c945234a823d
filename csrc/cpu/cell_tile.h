// A tile of samples that one thread iterates: its slots, and one evaluation of the map on them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/cell_loop_params.h"
#include "../common/control.h"
#include "../common/small_solve.h"
#include "../common/status.h"
#include "../common/step_params.h"
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
    row_samples_ = arena.take<int64_t>(slots);
    x_rows_ = arena.take<const T*>(slots);
    gx_rows_ = arena.take<T*>(slots);
    hidden_rows_ = arena.take<T*>(slots);
    gx_ = arena.take<T>(state);
    blocked_ = arena.take<T>(blocked_size(map.shape, slots, p.dim));
    hidden_ = arena.take<T>(blocked_size(map.shape, slots, hidden_width(p)));
    for (int64_t i = 0; i < slots; ++i) {
      hidden_rows_[i] = hidden_ + row_offset(map.shape, hidden_width(p), i);
    }
    step_ = StepParams{};
    step_.x = arena.take<T>(state);
    step_.gx = gx_;
    step_.best = arena.take<T>(state);
    step_.anchor = arena.take<T>(p.depth ? state : 0);
    step_.columns_f = arena.take<T>(p.depth * state);
    step_.columns_g = arena.take<T>(p.depth * state);
    step_.gram = arena.take<double>(slots * gram_size(p.depth));
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
    return 3 * Arena::size_of<int64_t>(slots) + 3 * Arena::size_of<T*>(slots) +
           3 * Arena::size_of<T>(state) + Arena::size_of<T>(blocked_size(map.shape, slots, p.dim)) +
           Arena::size_of<T>(blocked_size(map.shape, slots, hidden_width(p))) +
           Arena::size_of<T>(p.depth ? state : 0) + 2 * Arena::size_of<T>(p.depth * state) +
           Arena::size_of<double>(slots * gram_size(p.depth)) +
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
    const T* rows = blocked_;
    for (int l = 0; l < p.num_layers; ++l) {
      const CellLayer& layer = p.layers[l];
      const bool last = l + 1 == p.num_layers;
      LayerRows<T> to{};
      to.outputs = layer.outputs;
      to.activation = layer.activation;
      to.bias = static_cast<const T*>(layer.bias);
      to.shift = static_cast<const T*>(layer.shift);
      to.factor = static_cast<const T*>(layer.factor);
      to.samples = row_samples_;
      to.carry = last ? static_cast<T>(p.carry) : T(0);
      to.x = x_rows_;
      to.precision = last ? Precision::kIeee : p.precision;
      to.out = last ? gx_rows_ : hidden_rows_;
      to.chunk_stride = last ? kRowChunk : chunk_stride(map_.shape);
      multiply_rows(rows, num_active_, layer.inputs, map_.weight[l], to);
      rows = hidden_;
    }
  }

 private:
  static int64_t hidden_width(const CellLoopParams& p) {
    return p.num_layers == 2 ? p.layers[1].inputs : 0;
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
      row_samples_[a] = samples_[slot];
      x_rows_[a] = state(step_.x, slot);
      gx_rows_[a] = gx_ + slot * p.dim;
    }
    block_rows<T>(map_.shape, x_rows_, static_cast<const T*>(p.x_factor), row_samples_, num_active_,
                  p.dim, p.precision, blocked_);
  }

  const PackedMap<T>& map_;
  int64_t slots_;
  int64_t num_active_ = 0;
  int64_t* samples_;  // (slots,) the sample in each slot
  int64_t* active_;   // (num_active,) the slots that hold one
  double* atol_;
  T* gx_;
  int64_t* row_samples_;  // of what is evaluated together, by row: the sample,
  const T** x_rows_;      // where its x and gx lie,
  T** gx_rows_;
  T** hidden_rows_;  // and what the first of two layers makes of it
  T* blocked_;       // what the first layer reads, in blocks of rows
  T* hidden_;        // what the second reads
  StepParams step_;
};

}  // namespace fpi

// A weight as multiply_rows reads it, in memory that somebody keeps.
#pragma once

#include "aligned.h"
#include "panel_product.h"
#include "parallel.h"

namespace fpi {

// Packs a weight (outputs, inputs) of any strides, rounded as the other operands will be. It stays
// in `memory` until that is reset.
template <class T>
const T* pack_weight(const PanelShape& shape, const T* weight, int64_t outputs, int64_t inputs,
                     int64_t output_stride, int64_t input_stride, Precision precision,
                     Arena& memory, ParallelFor run) {
  const int64_t size = packed_size(shape, outputs, inputs);
  memory.reset(Arena::size_of<T>(size));
  T* const packed = memory.template take<T>(size);
  const int64_t panel_size = shape.panel_columns * inputs;
  const int64_t panels = round_up(outputs, shape.panel_columns) / shape.panel_columns;
  run(0, panels, grain_for(panel_size), [&](int64_t first, int64_t last) {
    pack_panels(shape, weight, outputs, inputs, output_stride, input_stride, first, last, packed);
    round_operands(precision, packed + first * panel_size, (last - first) * panel_size);
  });
  return packed;
}

}  // namespace fpi

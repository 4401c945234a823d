// A weight as multiply_rows reads it, with the memory that it takes.
#pragma once

#include "aligned.h"
#include "panel_product.h"
#include "parallel.h"

namespace fpi {

template <class T>
class Panels {
 public:
  Panels(const PanelShape& shape, int64_t outputs, int64_t inputs)
      : shape_(shape),
        outputs_(outputs),
        arena_(Arena::size_of<T>(packed_size(shape, outputs, inputs))),
        packed_(arena_.template take<T>(packed_size(shape, outputs, inputs))) {}

  const T* data() const { return packed_; }

  // Takes a weight with at most the inputs given above, rounded as the other operands will be.
  void pack(const T* weight, int64_t inputs, int64_t output_stride, int64_t input_stride,
            Precision precision, ParallelFor run) {
    const int64_t panels = round_up(outputs_, shape_.panel_columns) / shape_.panel_columns;
    run(0, panels, grain_for(shape_.panel_columns * inputs), [&](int64_t first, int64_t last) {
      pack_panels(shape_, weight, outputs_, inputs, output_stride, input_stride, first, last,
                  packed_);
      const int64_t panel_size = shape_.panel_columns * inputs;
      round_operands(precision, packed_ + first * panel_size, (last - first) * panel_size);
    });
  }

 private:
  PanelShape shape_;
  int64_t outputs_;
  Arena arena_;
  T* packed_;
};

}  // namespace fpi

// How the products of a fused loop are cut: weights into panels of outputs, panels into chunks of
// inputs, and what a tile of samples keeps of one input. Needs no CUDA.
#pragma once

#include <cstdint>

#include "../common/macros.h"
#include "../common/precision.h"
#include "../common/state_type.h"

namespace fpi {

constexpr int kPanelOutputs = 16;  // that one warp computes at a time
constexpr int kSlotGroup = 8;      // samples that a tile grows by

struct ProductShape {
  int chunk_inputs;
  int chunk_bytes;    // of a panel's weights
  int operand_bytes;  // of one input of one sample
  int slot_padding;   // so that the lanes of a warp read from as many banks
};

FPI_HD constexpr ProductShape product_shape(StateType state, Precision precision) {
  if (state == StateType::kFloat64) return {16, 2048, 8, 0};
  switch (precision) {
    case Precision::kTf32x3: return {32, 2048, 8, 4};
    case Precision::kTf32: return {32, 2048, 4, 8};
    case Precision::kBf16: return {32, 1024, 2, 8};
    default: return {32, 2048, 4, 0};
  }
}

// Slots of a tile from one input to the next. One group by itself needs no padding of eight.
FPI_HD constexpr int slot_stride(const ProductShape& shape, int slots) {
  return slots == kSlotGroup && shape.slot_padding == kSlotGroup ? slots
                                                                 : slots + shape.slot_padding;
}

// One layer's products.
struct LayerShape {
  int panels;
  int chunks;  // of each panel

  FPI_HD int64_t weight_bytes(int chunk_bytes) const {
    return static_cast<int64_t>(panels) * chunks * chunk_bytes;
  }
};

}  // namespace fpi

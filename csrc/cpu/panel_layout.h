// How the operands of panel products lie in memory.
#pragma once

#include <cstdint>

namespace fpi {

// Rows are kept in blocks, and cut into chunks of this many elements: inside a block the address
// of row r is then a constant away from that of row 0.
constexpr int64_t kRowChunk = 32;

// What one product works on: which registers this machine has decides the sizes.
struct PanelShape {
  int64_t block_rows;     // rows of the largest register tile
  int64_t panel_columns;  // columns of a weight panel; a divisor of kRowChunk
};

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// From one chunk of a row in blocks to the next.
inline int64_t chunk_stride(const PanelShape& shape) { return shape.block_rows * kRowChunk; }

// Where row i begins, in blocks of rows of `width` elements.
inline int64_t row_offset(const PanelShape& shape, int64_t width, int64_t i) {
  const int64_t chunks = round_up(width, kRowChunk) / kRowChunk;
  const int64_t block = i / shape.block_rows;
  return (block * chunks * shape.block_rows + i % shape.block_rows) * kRowChunk;
}

// Elements of a buffer of rows in blocks.
inline int64_t blocked_size(const PanelShape& shape, int64_t rows, int64_t width) {
  return round_up(rows, shape.block_rows) * round_up(width, kRowChunk);
}

// Elements of a packed weight (outputs, inputs).
inline int64_t packed_size(const PanelShape& shape, int64_t outputs, int64_t inputs) {
  return round_up(outputs, shape.panel_columns) * inputs;
}

}  // namespace fpi

// Products of a tile of rows with one weight matrix that is used again and again.
#pragma once

#include <cstdint>

#include "../common/precision.h"

namespace fpi {

// Rows are kept in blocks, and cut into chunks of this many elements: inside a block the address
// of row r is then a constant away from that of row 0.
constexpr int64_t kRowChunk = 256;

// What one product works on: which registers this machine has decides the sizes.
struct PanelShape {
  int64_t block_rows;     // rows of the largest register tile
  int64_t panel_columns;  // columns of a weight panel
};

// The shape for float (4 bytes) or double (8).
PanelShape panel_shape(int64_t element_bytes);

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Where the chunk of row i that holds element k begins, in blocks of rows of `width` elements.
inline int64_t chunk_offset(const PanelShape& shape, int64_t width, int64_t i, int64_t k) {
  const int64_t chunks = round_up(width, kRowChunk) / kRowChunk;
  const int64_t block = i / shape.block_rows;
  return ((block * chunks + k / kRowChunk) * shape.block_rows + i % shape.block_rows) * kRowChunk;
}

// Elements of a buffer of rows in blocks.
inline int64_t blocked_size(const PanelShape& shape, int64_t rows, int64_t width) {
  return round_up(rows, shape.block_rows) * round_up(width, kRowChunk);
}

// Elements of a packed weight (outputs, inputs).
inline int64_t packed_size(const PanelShape& shape, int64_t outputs, int64_t inputs) {
  return round_up(outputs, shape.panel_columns) * inputs;
}

// Rounds operands of a product in place. kTf32x3 leaves them: a product of what they are is closer
// to what it stands for than its three parts are.
void round_operands(Precision precision, float* values, int64_t n);
inline void round_operands(Precision, double*, int64_t) {}

// Lays out panels [first, last) of weight (outputs, inputs), given with any strides: a panel holds
// `panel_columns` outputs, input after input, and zeros past the last output.
template <class T>
void pack_panels(const PanelShape& shape, const T* weight, int64_t outputs, int64_t inputs,
                 int64_t output_stride, int64_t input_stride, int64_t first, int64_t last,
                 T* packed);

// out[i][j] = sum over k of rows[i][k] weight[j][k], one term after the other: no sum depends on
// which other rows there are. `out` is (count, out_stride) with out_stride a multiple of the
// panel's columns.
template <class T>
void multiply_rows(const T* blocked_rows, int64_t count, int64_t inputs, const T* packed,
                   int64_t outputs, T* out, int64_t out_stride);

}  // namespace fpi

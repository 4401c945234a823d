// Products of a tile of rows with one weight matrix that is used again and again.
#pragma once

#include <cstdint>

#include "layer_rows.h"
#include "panel_layout.h"

namespace fpi {

// The shape for float (4 bytes) or double (8).
PanelShape panel_shape(int64_t element_bytes);

// Rounds operands of a product in place. kTf32x3 leaves them: a product of what they are is closer
// to what it stands for than its three parts are.
void round_operands(Precision precision, float* values, int64_t n);
inline void round_operands(Precision, double*, int64_t) {}

// Lays rows[i] out as row i of a product's left operand, times factor (batch, width) where there is
// one, and rounded. samples[i] is the sample of row i.
template <class T>
void block_rows(const PanelShape& shape, const T* const* rows, const T* factor,
                const int64_t* samples, int64_t count, int64_t width, Precision precision,
                T* blocked);

// Lays out panels [first, last) of weight (outputs, inputs), given with any strides: a panel holds
// `panel_columns` outputs, input after input, and zeros past the last output.
template <class T>
void pack_panels(const PanelShape& shape, const T* weight, int64_t outputs, int64_t inputs,
                 int64_t output_stride, int64_t input_stride, int64_t first, int64_t last,
                 T* packed);

// Finishes sums[i][j] = sum over k of rows[i][k] weight[j][k] as `to` says. A sum is taken one term
// after the other and does not depend on which other rows there are.
template <class T>
void multiply_rows(const T* blocked_rows, int64_t count, int64_t inputs, const T* packed,
                   const LayerRows<T>& to);

}  // namespace fpi

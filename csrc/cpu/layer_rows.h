// What becomes of the sums of a layer's product, and where it goes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/activation.h"
#include "../common/precision.h"
#include "numeric.h"
#include "panel_layout.h"

namespace fpi {

// out = factor * activation(sums + bias + shift) + carry * x, for rows i of a tile; null stands
// for no such term.
template <class T>
struct LayerRows {
  int64_t outputs;
  Activation activation;
  const T* bias;           // (outputs,)
  const T* shift;          // (batch, outputs)
  const T* factor;         // (batch, outputs)
  const int64_t* samples;  // the sample of row i
  T carry;
  const T* const* x;      // row i of x
  Precision precision;    // to which out is rounded; kIeee where it is no operand
  T* slope;               // (batch, outputs) factor * derivative(...), or null
  Activation derivative;  // of the activation
  T* const* out;          // row i of out
  int64_t chunk_stride;   // from one chunk of kRowChunk elements of a row of out to the next
};

FPI_INLINE void round_run(Precision precision, float* values, int64_t n) {
  if (precision == Precision::kTf32) {
    for (int64_t j = 0; j < n; ++j) values[j] = round_tf32(values[j]);
  } else if (precision == Precision::kBf16) {
    for (int64_t j = 0; j < n; ++j) values[j] = round_bf16(values[j]);
  }
}
FPI_INLINE void round_run(Precision, double*, int64_t) {}

// What finish_rows will read of the arrays that have the batch. It is far away by then.
template <class T, int Panel>
FPI_INLINE void prefetch_rows(const LayerRows<T>& to, int64_t first, int64_t count,
                              int64_t column) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (const T* array : {to.shift, to.factor}) {
    if (!array) continue;
    for (int64_t i = first; i < first + count; ++i) {
      const T* row = array + to.samples[i] * to.outputs + column;
      for (int64_t j = 0; j < Panel; j += kLine) __builtin_prefetch(row + j);
    }
  }
}

// u += bias + shift, for the n columns from `column` on of each of `count` rows of Panel.
template <class T, int Panel>
FPI_INLINE void add_terms(const LayerRows<T>& to, int64_t first, int64_t count, int64_t column,
                          int64_t n, T* u) {
  for (int64_t i = first; i < first + count; ++i, u += Panel) {
    if (to.bias) {
      const T* bias = to.bias + column;
      for (int64_t j = 0; j < n; ++j) u[j] += bias[j];
    }
    if (to.shift) {
      const T* shift = to.shift + to.samples[i] * to.outputs + column;
      for (int64_t j = 0; j < n; ++j) u[j] += shift[j];
    }
  }
}

// Writes factor * derivative(u).
template <class T, int Panel, class Activate>
FPI_INLINE void write_slopes(const LayerRows<T>& to, int64_t first, int64_t count, int64_t column,
                             int64_t n, const T* u, Activate activate) {
  T slopes[Panel];
  for (int64_t i = first; i < first + count; ++i, u += Panel) {
    std::copy(u, u + Panel, slopes);
    activate(to.derivative, slopes, Panel);
    const int64_t place = to.samples[i] * to.outputs + column;
    for (int64_t j = 0; j < n; ++j) {
      to.slope[place + j] = to.factor ? slopes[j] * to.factor[place + j] : slopes[j];
    }
  }
}

// Writes factor * y + carry * x, over y too.
template <class T, int Panel>
FPI_INLINE void write_rows(const LayerRows<T>& to, int64_t first, int64_t count, int64_t column,
                           int64_t n, T* y) {
  const int64_t place = column / kRowChunk * to.chunk_stride + column % kRowChunk;
  for (int64_t i = first; i < first + count; ++i, y += Panel) {
    if (to.factor) {
      const T* factor = to.factor + to.samples[i] * to.outputs + column;
      for (int64_t j = 0; j < n; ++j) y[j] *= factor[j];
    }
    if (to.carry != T(0)) {
      const T* x = to.x[i] + column;
      for (int64_t j = 0; j < n; ++j) y[j] += to.carry * x[j];
    }
    round_run(to.precision, y, n);
    std::copy(y, y + n, to.out[i] + place);
  }
}

// Rows [first, first + count) and the columns of one panel, from sums (count, Panel), which are
// written over. activate(activation, u, n) is a call: all of them in every place are much code.
template <class T, int Panel, class Activate>
FPI_INLINE void finish_rows(const LayerRows<T>& to, int64_t first, int64_t count, int64_t column,
                            T* sums, Activate activate) {
  const int64_t n = std::min<int64_t>(Panel, to.outputs - column);
  // Loops of a length that the compiler knows are a few instructions.
  const bool whole = n == Panel;
  whole ? add_terms<T, Panel>(to, first, count, column, Panel, sums)
        : add_terms<T, Panel>(to, first, count, column, n, sums);
  if (to.slope) write_slopes<T, Panel>(to, first, count, column, n, sums, activate);
  activate(to.activation, sums, count * Panel);
  whole ? write_rows<T, Panel>(to, first, count, column, Panel, sums)
        : write_rows<T, Panel>(to, first, count, column, n, sums);
}

}  // namespace fpi

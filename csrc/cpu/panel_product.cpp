// The product is compiled for each kind of registers, and picked once by what the machine has.
#include "panel_product.h"

#include <algorithm>
#include <cstring>

#include "activation.h"
#include "lanes.h"

namespace fpi {
namespace {

// `Bytes` wide registers; `BlockRows` rows times the two registers of a panel's columns are the
// largest register tile.
template <class T, int Bytes, int BlockRows, void (*Activate)(Activation, T*, int64_t)>
struct Kernel {
  typedef T Vector __attribute__((vector_size(Bytes), aligned(sizeof(T)), may_alias));
  static constexpr int kLanes = Bytes / sizeof(T);
  static constexpr int kPanel = 2 * kLanes;
  static constexpr int kMostPanels = 4;

  // With few rows, so many panels at a time that the latency of a sum is hidden.
  static constexpr int panels_for(int64_t rows) {
    return rows <= BlockRows / 6 ? kMostPanels : rows <= BlockRows / 3 ? 2 : 1;
  }

  // The sums of `Rows` rows with the first `Registers` of each of `Panels` panels, `stride` apart.
  template <int Rows, int Panels, int Registers>
  static FPI_INLINE void tile(const T* rows, int64_t inputs, const T* panel, int64_t stride,
                              T* out) {
    Vector sum[Rows][Panels][Registers] = {};
    for (int64_t begin = 0; begin < inputs; begin += kRowChunk) {
      const int64_t n = std::min(kRowChunk, inputs - begin);
      for (int64_t k = 0; k < n; ++k) {
        Vector weight[Panels][Registers];
#pragma GCC unroll 16
        for (int p = 0; p < Panels; ++p) {
#pragma GCC unroll 16
          for (int v = 0; v < Registers; ++v) {
            weight[p][v] = *reinterpret_cast<const Vector*>(panel + p * stride + v * kLanes);
          }
        }
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
          const T value = rows[r * kRowChunk + k];
#pragma GCC unroll 16
          for (int p = 0; p < Panels; ++p) {
#pragma GCC unroll 16
            for (int v = 0; v < Registers; ++v) sum[r][p][v] += value * weight[p][v];
          }
        }
        panel += kPanel;
      }
      rows += BlockRows * kRowChunk;
    }
#pragma GCC unroll 16
    for (int p = 0; p < Panels; ++p) {
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < Registers; ++v) {
          *reinterpret_cast<Vector*>(out + ((p * Rows + r) * Registers + v) * kLanes) =
              sum[r][p][v];
        }
      }
    }
  }

  // The tile of the rows that are left of a block: 1 to `Rows`.
  template <int Rows, int Registers>
  static FPI_INLINE void part(int64_t n, int panels, const T* rows, int64_t inputs, const T* panel,
                              int64_t stride, T* out) {
    if constexpr (Rows > 1) {
      if (n < Rows) return part<Rows - 1, Registers>(n, panels, rows, inputs, panel, stride, out);
    }
    constexpr int kPanels = Registers == 2 ? panels_for(Rows) : 1;
    if constexpr (kPanels > 1) {
      if (panels == kPanels) {
        return tile<Rows, kPanels, Registers>(rows, inputs, panel, stride, out);
      }
    }
    tile<Rows, 1, Registers>(rows, inputs, panel, stride, out);
  }

  // `panels` panels from `column` on with all rows, so that they are read from far away once.
  template <int Registers>
  static FPI_INLINE void sweep(const T* blocked, int64_t count, int64_t inputs, const T* packed,
                               const LayerRows<T>& to, int64_t column, int panels) {
    constexpr int kWidth = Registers * kLanes;
    const int64_t block_size = round_up(inputs, kRowChunk) * BlockRows;
    const int64_t stride = kPanel * inputs;
    alignas(64) T sums[BlockRows * kWidth];
    const T* panel = packed + column * inputs;
    for (int64_t first = 0; first < count; first += BlockRows, blocked += block_size) {
      const int64_t n = std::min<int64_t>(BlockRows, count - first);
      const bool whole = n == BlockRows;
      for (int p = 0; p < panels; ++p) {
        const int64_t at = column + p * kPanel;
        prefetch_rows<T, kWidth>(to, first, n, at);
        if (whole) {
          tile<BlockRows, 1, Registers>(blocked, inputs, panel + p * stride, stride, sums);
        } else if (p == 0) {
          part<BlockRows - 1, Registers>(n, panels, blocked, inputs, panel, stride, sums);
        }
        finish_rows<T, kWidth>(to, first, n, at, whole ? sums : sums + p * n * kWidth, Activate);
      }
    }
  }

  static FPI_INLINE void multiply(const T* blocked, int64_t count, int64_t inputs, const T* packed,
                                  const LayerRows<T>& to) {
    const int group = panels_for(count % BlockRows ? count % BlockRows : BlockRows);
    for (int64_t column = 0; column < to.outputs;) {
      const int64_t left = to.outputs - column;
      if (left <= kLanes) return sweep<1>(blocked, count, inputs, packed, to, column, 1);
      const int panels = left >= group * kPanel ? group : 1;
      sweep<2>(blocked, count, inputs, packed, to, column, panels);
      column += panels * kPanel;
    }
  }
};

template <class T>
struct Choice {
  PanelShape shape;
  void (*multiply)(const T*, int64_t, int64_t, const T*, const LayerRows<T>&);
};

#define FPI_MULTIPLY(bits, target, block_rows)                                                    \
  template <class T>                                                                              \
  target __attribute__((noinline)) void activate_##bits(Activation activation, T* u, int64_t n) { \
    activate(activation, u, n);                                                                   \
  }                                                                                               \
  template <class T>                                                                              \
  using Kernel##bits = Kernel<T, bits / 8, block_rows, activate_##bits<T>>;                       \
  template <class T>                                                                              \
  target void multiply_##bits(const T* rows, int64_t count, int64_t inputs, const T* packed,      \
                              const LayerRows<T>& to) {                                           \
    Kernel##bits<T>::multiply(rows, count, inputs, packed, to);                                   \
  }
#define FPI_CHOICE(bits, block_rows) \
  Choice<T> { {block_rows, Kernel##bits<T>::kPanel}, &multiply_##bits<T> }

// 12 x 2 of the 32 registers of AVX-512 hold sums; 6 x 2 of 16 on AVX2; 6 x 2 elsewhere.
#ifdef FPI_WIDE_TARGETS
FPI_MULTIPLY(
    512, __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma,prefer-vector-width=512"))),
    12)
FPI_MULTIPLY(256, __attribute__((target("avx2,fma"))), 6)
#endif
FPI_MULTIPLY(128, , 6)

template <class T>
Choice<T> choose() {
#ifdef FPI_WIDE_TARGETS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    return FPI_CHOICE(512, 12);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return FPI_CHOICE(256, 6);
  }
#endif
  return FPI_CHOICE(128, 6);
}

template <class T>
const Choice<T>& choice() {
  static const Choice<T> chosen = choose<T>();
  return chosen;
}

}  // namespace

PanelShape panel_shape(int64_t element_bytes) {
  return element_bytes == 4 ? choice<float>().shape : choice<double>().shape;
}

FPI_CLONES void round_operands(Precision precision, float* values, int64_t n) {
  round_run(precision, values, n);
}

template <class T>
FPI_CLONES void block_rows(const PanelShape& shape, const T* const* rows, const T* factor,
                           const int64_t* samples, int64_t count, int64_t width,
                           Precision precision, T* blocked) {
  const int64_t stride = chunk_stride(shape);
  for (int64_t i = 0; i < count; ++i) {
    const T* row = rows[i];
    T* target = blocked + row_offset(shape, width, i);
    const T* factors = factor ? factor + samples[i] * width : nullptr;
    int64_t k = 0;
    for (; k + kRowChunk <= width && !factors; k += kRowChunk, target += stride) {
      copy_run(row + k, kRowChunk, target);
      round_run(precision, target, kRowChunk);
    }
    for (; k < width; k += kRowChunk, target += stride) {
      const int64_t n = std::min(kRowChunk, width - k);
      if (factors) {
        for (int64_t j = 0; j < n; ++j) target[j] = factors[k + j] * row[k + j];
      } else {
        copy_run(row + k, n, target);
      }
      round_run(precision, target, n);
    }
  }
}

namespace {

// Four columns of a row-major matrix as four rows: target[k columns + c] = source[c stride + k].
template <class T>
FPI_INLINE void transpose_four(const T* source, int64_t stride, T* target, int64_t columns) {
#ifdef FPI_SHUFFLES
  typedef T Four __attribute__((vector_size(4 * sizeof(T))));
  Four in[4];
  for (int c = 0; c < 4; ++c) std::memcpy(&in[c], source + c * stride, sizeof(Four));
  const Four low = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5);
  const Four high = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7);
  const Four next_low = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5);
  const Four next_high = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
  const Four out[4] = {__builtin_shufflevector(low, next_low, 0, 1, 4, 5),
                       __builtin_shufflevector(low, next_low, 2, 3, 6, 7),
                       __builtin_shufflevector(high, next_high, 0, 1, 4, 5),
                       __builtin_shufflevector(high, next_high, 2, 3, 6, 7)};
  for (int k = 0; k < 4; ++k) std::memcpy(target + k * columns, &out[k], sizeof(Four));
#else
  for (int k = 0; k < 4; ++k) {
    for (int c = 0; c < 4; ++c) target[k * columns + c] = source[c * stride + k];
  }
#endif
}

}  // namespace

template <class T>
FPI_CLONES void pack_panels(const PanelShape& shape, const T* weight, int64_t outputs,
                            int64_t inputs, int64_t output_stride, int64_t input_stride,
                            int64_t first, int64_t last, T* packed) {
  const int64_t columns = shape.panel_columns;
  // What is written stays in the nearest cache until its lines are full.
  constexpr int64_t kInputs = 64;
  for (int64_t panel = first; panel < last; ++panel) {
    T* target = packed + panel * columns * inputs;
    const int64_t present = std::min(columns, outputs - panel * columns);
    const T* source = weight + panel * columns * output_stride;
    if (output_stride == 1) {
      for (int64_t k = 0; k < inputs; ++k, source += input_stride, target += columns) {
        copy_run(source, present, target);
        for (int64_t c = present; c < columns; ++c) target[c] = T(0);
      }
      continue;
    }
    for (int64_t begin = 0; begin < inputs; begin += kInputs) {
      const int64_t end = std::min(begin + kInputs, inputs);
      for (int64_t c = 0; c < columns;) {
        const T* rows = source + c * output_stride;
        int64_t k = begin;
        const int64_t width = std::min<int64_t>(4, columns - c);
        if (input_stride == 1 && c + 4 <= present) {
          for (; k + 4 <= end; k += 4) {
            transpose_four(rows + k, output_stride, target + k * columns + c, columns);
          }
        }
        for (; k < end; ++k) {
          for (int64_t i = 0; i < width; ++i) {
            target[k * columns + c + i] =
                c + i < present ? rows[i * output_stride + k * input_stride] : T(0);
          }
        }
        c += width;
      }
    }
  }
}

template <class T>
void multiply_rows(const T* blocked_rows, int64_t count, int64_t inputs, const T* packed,
                   const LayerRows<T>& to) {
  choice<T>().multiply(blocked_rows, count, inputs, packed, to);
}

#define FPI_INSTANTIATE(T)                                                                      \
  template void block_rows<T>(const PanelShape&, const T* const*, const T*, const int64_t*,     \
                              int64_t, int64_t, Precision, T*);                                 \
  template void pack_panels<T>(const PanelShape&, const T*, int64_t, int64_t, int64_t, int64_t, \
                               int64_t, int64_t, T*);                                           \
  template void multiply_rows<T>(const T*, int64_t, int64_t, const T*, const LayerRows<T>&);
FPI_INSTANTIATE(float)
FPI_INSTANTIATE(double)

}  // namespace fpi

// The product is compiled for each kind of registers, and picked once by what the machine has.
#include "panel_product.h"

#include <algorithm>

#include "numeric.h"

namespace fpi {
namespace {

// `Bytes` wide registers, `BlockRows` rows times two registers of columns in one register tile.
template <class T, int Bytes, int BlockRows>
struct Kernel {
  typedef T Vector __attribute__((vector_size(Bytes), aligned(sizeof(T)), may_alias));
  static constexpr int kLanes = Bytes / sizeof(T);
  static constexpr int kPanel = 2 * kLanes;

  template <int Rows>
  static FPI_INLINE void tile(const T* rows, int64_t inputs, const T* panel, T* out) {
    Vector sum[Rows][2] = {};
    for (int64_t begin = 0; begin < inputs; begin += kRowChunk) {
      const int64_t n = std::min(kRowChunk, inputs - begin);
      for (int64_t k = 0; k < n; ++k) {
        const Vector left = *reinterpret_cast<const Vector*>(panel);
        const Vector right = *reinterpret_cast<const Vector*>(panel + kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
          const T value = rows[r * kRowChunk + k];
          sum[r][0] += value * left;
          sum[r][1] += value * right;
        }
        panel += kPanel;
      }
      rows += BlockRows * kRowChunk;
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      *reinterpret_cast<Vector*>(out + r * kPanel) = sum[r][0];
      *reinterpret_cast<Vector*>(out + r * kPanel + kLanes) = sum[r][1];
    }
  }

  static FPI_INLINE void multiply(const T* blocked, int64_t count, int64_t inputs, const T* packed,
                                  const LayerRows<T>& to) {
    constexpr int kSmall = BlockRows / 3;
    const int64_t block_size = round_up(inputs, kRowChunk) * BlockRows;
    alignas(64) T sums[BlockRows * kPanel];
    // A panel at a time, so that it is read from far away once for all rows.
    for (int64_t column = 0; column < to.outputs; column += kPanel) {
      const T* panel = packed + column * inputs;
      for (int64_t first = 0; first < count; first += BlockRows) {
        const T* rows = blocked + first / BlockRows * block_size;
        const int64_t n = std::min<int64_t>(BlockRows, count - first);
        prefetch_rows<T, kPanel>(to, first, n, column);
        if (n == BlockRows) {
          tile<BlockRows>(rows, inputs, panel, sums);
        } else {
          int64_t r = 0;
          for (; r + kSmall <= n; r += kSmall) {
            tile<kSmall>(rows + r * kRowChunk, inputs, panel, sums + r * kPanel);
          }
          for (; r < n; ++r) tile<1>(rows + r * kRowChunk, inputs, panel, sums + r * kPanel);
        }
        finish_rows<T, kPanel>(to, first, n, column, sums);
      }
    }
  }
};

template <class T>
struct Choice {
  PanelShape shape;
  void (*multiply)(const T*, int64_t, int64_t, const T*, const LayerRows<T>&);
};

#define FPI_MULTIPLY(name, target, bytes, block_rows)                             \
  template <class T>                                                              \
  target void name(const T* rows, int64_t count, int64_t inputs, const T* packed, \
                   const LayerRows<T>& to) {                                      \
    Kernel<T, bytes, block_rows>::multiply(rows, count, inputs, packed, to);      \
  }
#define FPI_CHOICE(name, bytes, block_rows) \
  Choice<T> { {block_rows, Kernel<T, bytes, block_rows>::kPanel}, &name<T> }

// 12 x 2 of the 32 registers of AVX-512 hold sums; 6 x 2 of 16 on AVX2; 6 x 2 elsewhere.
#ifdef FPI_WIDE_TARGETS
FPI_MULTIPLY(
    multiply_512,
    __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma,prefer-vector-width=512"))), 64,
    12)
FPI_MULTIPLY(multiply_256, __attribute__((target("avx2,fma"))), 32, 6)
#endif
FPI_MULTIPLY(multiply_128, , 16, 6)

template <class T>
Choice<T> choose() {
#ifdef FPI_WIDE_TARGETS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    return FPI_CHOICE(multiply_512, 64, 12);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return FPI_CHOICE(multiply_256, 32, 6);
  }
#endif
  return FPI_CHOICE(multiply_128, 16, 6);
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
void pack_panels(const PanelShape& shape, const T* weight, int64_t outputs, int64_t inputs,
                 int64_t output_stride, int64_t input_stride, int64_t first, int64_t last,
                 T* packed) {
  const int64_t columns = shape.panel_columns;
  for (int64_t panel = first; panel < last; ++panel) {
    T* target = packed + panel * columns * inputs;
    const int64_t present = std::min(columns, outputs - panel * columns);
    if (output_stride == 1) {
      for (int64_t k = 0; k < inputs; ++k, target += columns) {
        const T* source = weight + k * input_stride + panel * columns;
        std::copy(source, source + present, target);
        std::fill(target + present, target + columns, T(0));
      }
      continue;
    }
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t j = panel * columns + c;
      const T* source = weight + j * output_stride;
      for (int64_t k = 0; k < inputs; ++k) {
        target[k * columns + c] = j < outputs ? source[k * input_stride] : T(0);
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
  template void pack_panels<T>(const PanelShape&, const T*, int64_t, int64_t, int64_t, int64_t, \
                               int64_t, int64_t, T*);                                           \
  template void multiply_rows<T>(const T*, int64_t, int64_t, const T*, const LayerRows<T>&);
FPI_INSTANTIATE(float)
FPI_INSTANTIATE(double)

}  // namespace fpi

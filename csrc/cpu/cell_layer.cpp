// The products of the fused loop, once for the whole batch. No result depends on the threads.
#include "cell_layer.h"

#include "lanes.h"
#include "panels.h"

namespace fpi {
namespace {

constexpr int64_t kBlocks = 8;  // of rows, in what one thread multiplies at a time

// Rows that one thread multiplies at a time: in blocks, and where their results go.
template <class T>
struct RowTile {
  T* blocked;
  int64_t* samples;
  T** out;
  T* unread;  // where results go that nobody asked for

  RowTile(const PanelShape& shape, int64_t width, int64_t outputs, Arena& arena) {
    blocked = arena.take<T>(blocked_size(shape, rows(shape), width));
    samples = arena.take<int64_t>(rows(shape));
    out = arena.take<T*>(rows(shape));
    unread = arena.take<T>(outputs);
  }
  static int64_t rows(const PanelShape& shape) { return kBlocks * shape.block_rows; }
  static int64_t bytes(const PanelShape& shape, int64_t width, int64_t outputs) {
    return Arena::size_of<T>(blocked_size(shape, rows(shape), width)) +
           Arena::size_of<int64_t>(rows(shape)) + Arena::size_of<T*>(rows(shape)) +
           Arena::size_of<T>(outputs);
  }
};

// What is multiplied with a weight: element k of row i lies at i row_stride + k element_stride, of
// which one is 1.
template <class T>
struct Rows {
  const T* data;
  int64_t count;
  int64_t width;
  int64_t row_stride;
  int64_t element_stride;
};

// Rows whose elements lie side by side.
template <class T>
void gather_rows(const PanelShape& shape, const Rows<T>& rows, int64_t first, int64_t count,
                 T* blocked) {
  for (int64_t r = 0; r < count; ++r) {
    const T* row = rows.data + (first + r) * rows.row_stride;
    T* target = blocked + row_offset(shape, rows.width, r);
    for (int64_t k = 0; k < rows.width; k += kRowChunk, target += chunk_stride(shape)) {
      copy_run(row + k, std::min(kRowChunk, rows.width - k), target);
    }
  }
}

// Columns of a matrix with `element_stride` columns: a block of them at a time, for a reading of
// one element brings its neighbours.
template <class T>
void gather_columns(const PanelShape& shape, const Rows<T>& rows, int64_t first, int64_t count,
                    T* blocked) {
  for (int64_t r = 0; r < count; r += shape.block_rows) {
    const int64_t n = std::min(shape.block_rows, count - r);
    T* target = blocked + row_offset(shape, rows.width, r);
    for (int64_t k = 0; k < rows.width; ++k) {
      const T* source = rows.data + k * rows.element_stride + first + r;
      T* column = target + k / kRowChunk * chunk_stride(shape) + k % kRowChunk;
      for (int64_t i = 0; i < n; ++i) column[i * kRowChunk] = source[i];
    }
  }
}

// Multiplies all rows, each thread a range of them at a time. The sample of a row is its number.
template <class T>
void multiply_all(const PanelShape& shape, const Rows<T>& rows, const T* packed,
                  const LayerRows<T>& to, T* out, int64_t threads, Workspace& memory,
                  ParallelFor run) {
  const int64_t step = RowTile<T>::rows(shape);
  const int64_t pieces = (rows.count + step - 1) / step;
  const int64_t tiles = std::min(threads, pieces);
  memory.reserve_tiles(tiles, RowTile<T>::bytes(shape, rows.width, to.outputs));
  run(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const RowTile<T> tile(shape, rows.width, to.outputs, memory.tiles[t]);
      LayerRows<T> here = to;
      here.samples = tile.samples;
      here.out = tile.out;
      for (int64_t piece = t * pieces / tiles; piece < (t + 1) * pieces / tiles; ++piece) {
        const int64_t first = piece * step;
        const int64_t count = std::min(step, rows.count - first);
        rows.element_stride == 1 ? gather_rows(shape, rows, first, count, tile.blocked)
                                 : gather_columns(shape, rows, first, count, tile.blocked);
        for (int64_t r = 0; r < count; ++r) {
          tile.samples[r] = first + r;
          tile.out[r] = out ? out + (first + r) * to.outputs : tile.unread;
        }
        multiply_rows(tile.blocked, count, rows.width, packed, here);
      }
    }
  });
}

template <class T>
LayerRows<T> plain_rows(int64_t outputs) {
  LayerRows<T> to{};
  to.outputs = outputs;
  to.activation = Activation::kIdentity;
  to.precision = Precision::kIeee;
  to.chunk_stride = kRowChunk;
  return to;
}

template <class T>
void evaluate(const CellLayerParams& p, const void* packed, int64_t threads, ParallelFor run,
              Workspace& memory) {
  const PanelShape shape = panel_shape(sizeof(T));
  const CellLayer& layer = p.layer;
  const T* weight = static_cast<const T*>(packed);
  if (!weight) {
    weight =
        pack_weight(shape, static_cast<const T*>(layer.weight), layer.outputs, layer.inputs,
                    layer.output_stride, layer.input_stride, Precision::kIeee, memory.operand, run);
  }
  LayerRows<T> to = plain_rows<T>(layer.outputs);
  to.activation = p.out ? layer.activation : Activation::kIdentity;
  to.bias = static_cast<const T*>(layer.bias);
  to.shift = static_cast<const T*>(layer.shift);
  to.factor = static_cast<const T*>(layer.factor);
  to.slope = static_cast<T*>(p.slope);
  to.derivative = p.derivative;
  const Rows<T> rows{static_cast<const T*>(p.h), p.batch, layer.inputs, layer.inputs, 1};
  multiply_all(shape, rows, weight, to, static_cast<T*>(p.out), threads, memory, run);
}

template <class T>
void differentiate(const WeightGradientParams& p, int64_t threads, ParallelFor run,
                   Workspace& memory) {
  const PanelShape shape = panel_shape(sizeof(T));
  T* out = static_cast<T*>(p.out);
  LayerRows<T> to = plain_rows<T>(p.inputs);
  for (int64_t first = 0; first < p.batch; first += kSamplesPerSum) {
    const int64_t n = std::min(kSamplesPerSum, p.batch - first);
    const T* packed = pack_weight(shape, static_cast<const T*>(p.h) + first * p.inputs, p.inputs, n,
                                  1, p.inputs, Precision::kIeee, memory.operand, run);
    const Rows<T> rows{static_cast<const T*>(p.delta) + first * p.outputs, p.outputs, n, 1,
                       p.outputs};
    multiply_all(shape, rows, packed, to, out, threads, memory, run);
    to.shift = out;
  }
}

}  // namespace

void cell_layer_cpu(const CellLayerParams& p, const void* packed, StateType state, int64_t threads,
                    ParallelFor run, Workspace& memory) {
  if (state == StateType::kFloat64) return evaluate<double>(p, packed, threads, run, memory);
  evaluate<float>(p, packed, threads, run, memory);
}

void weight_gradient_cpu(const WeightGradientParams& p, StateType state, int64_t threads,
                         ParallelFor run, Workspace& memory) {
  if (state == StateType::kFloat64) return differentiate<double>(p, threads, run, memory);
  differentiate<float>(p, threads, run, memory);
}

}  // namespace fpi

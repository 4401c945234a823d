#include "cell_loop_args.h"

#include <torch/headeronly/core/ScalarType.h>

#include "require.h"

namespace fpi {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct LayerNames {
  const char *weight, *bias, *shift, *factor, *activation;
};
constexpr LayerNames kNames[2] = {{"weight1", "bias1", "shift1", "factor1", "activation1"},
                                  {"weight2", "bias2", "shift2", "factor2", "activation2"}};

// Checks arrays against the dtype and the device of x.
struct Checker {
  const Tensor& x;

  void type(const char* name, const Tensor& t, ScalarType type) const {
    require(t.scalar_type() == type, kCellLoop, ": ", name, " must have dtype ",
            torch::headeronly::toString(type), ", got ",
            torch::headeronly::toString(t.scalar_type()));
  }

  // The kernels follow the pointers on the device of x.
  void device(const char* name, const Tensor& t) const {
    require(t.device() == x.device(), kCellLoop, ": ", name, " must be on the device of x");
  }

  void array(const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
             ScalarType dtype) const {
    bool same = t.dim() == static_cast<int64_t>(shape.size());
    int64_t axis = 0;
    for (const int64_t size : shape) same = same && t.size(axis++) == size;
    require(same, kCellLoop, ": ", name, " must be ", shape, ", got ", t.sizes());
    require(t.is_contiguous(), kCellLoop, ": ", name, " must be contiguous");
    type(name, t, dtype);
    device(name, t);
  }

  // Of the dtype of x, or null.
  const void* optional(const char* name, const std::optional<Tensor>& t,
                       std::initializer_list<int64_t> shape) const {
    if (!t) return nullptr;
    array(name, *t, shape, x.scalar_type());
    return t->const_data_ptr();
  }

  // A weight may have any strides: that of an adjoint is a transposed view.
  CellLayer layer(const LayerNames& names, const CellLayerTensors& t, int64_t inputs) const {
    const Tensor& weight = *t.weight;
    require(weight.dim() == 2 && weight.size(1) == inputs, kCellLoop, ": ", names.weight,
            " must be (outputs, ", inputs, "), got ", weight.sizes());
    type(names.weight, weight, x.scalar_type());
    device(names.weight, weight);
    require(t.activation >= 0 && t.activation < kActivations, kCellLoop, ": ", names.activation,
            " must be from 0 to ", kActivations - 1, ", got ", t.activation);
    const int64_t outputs = weight.size(0), batch = x.size(0);
    CellLayer layer{};
    layer.weight = weight.const_data_ptr();
    layer.outputs = outputs;
    layer.inputs = inputs;
    layer.output_stride = weight.stride(0);
    layer.input_stride = weight.stride(1);
    layer.bias = optional(names.bias, t.bias, {outputs});
    layer.shift = optional(names.shift, t.shift, {batch, outputs});
    layer.factor = optional(names.factor, t.factor, {batch, outputs});
    layer.activation = static_cast<Activation>(t.activation);
    return layer;
  }
};

}  // namespace

CellLoopParams checked_arrays(const CellLoopTensors& t) {
  const Tensor& x = t.x;
  require(x.dim() == 2, kCellLoop, ": x must be (batch, dim), got ", x.sizes());
  const ScalarType type = x.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::Double, kCellLoop,
          ": x must be float32 or float64, got ", torch::headeronly::toString(type));
  const int64_t batch = x.size(0), dim = x.size(1);
  require(dim >= 1, kCellLoop, ": x must have at least one feature, got ", x.sizes());
  const Checker check{x};
  check.array("x", x, {batch, dim}, type);
  check.array("atol", t.atol, {batch}, ScalarType::Double);
  check.array("status", t.status, {batch}, ScalarType::Char);
  check.array("num_steps", t.num_steps, {batch}, ScalarType::Int);
  check.array("residual", t.residual, {batch}, ScalarType::Double);
  const CellLayerTensors& second = t.layers[1];
  require(second.weight || !(second.bias || second.shift || second.factor), kCellLoop,
          ": bias2, shift2 and factor2 belong to weight2, which is missing");

  CellLoopParams p{};
  p.x_factor = check.optional("x_factor", t.x_factor, {batch, dim});
  p.num_layers = second.weight ? 2 : 1;
  int64_t width = dim;
  for (int l = 0; l < p.num_layers; ++l) {
    p.layers[l] = check.layer(kNames[l], t.layers[l], width);
    width = p.layers[l].outputs;
  }
  require(width == dim, kCellLoop, ": the last weight must have the ", dim,
          " outputs of x, got ", width);
  p.x = x.mutable_data_ptr();
  p.atol = t.atol.const_data_ptr<double>();
  p.status = t.status.mutable_data_ptr<int8_t>();
  p.num_steps = t.num_steps.mutable_data_ptr<int32_t>();
  p.residual = t.residual.mutable_data_ptr<double>();
  p.batch = batch;
  p.dim = dim;
  return p;
}

StateType cell_state(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? StateType::kFloat64 : StateType::kFloat32;
}

}  // namespace fpi

// Checks of the arrays that the ops are given, and what they are stored as.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "common/cell_loop_params.h"
#include "common/state_type.h"
#include "require.h"

namespace fpi {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline StateType state_type(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return StateType::kFloat64;
    case ScalarType::BFloat16: return StateType::kBFloat16;
    case ScalarType::Half: return StateType::kFloat16;
    default: return StateType::kFloat32;
  }
}

struct CellLayerTensors {
  std::optional<Tensor> weight, bias, shift, factor;
  int64_t activation;
};

struct LayerNames {
  const char *weight, *bias, *shift, *factor, *activation;
};
// Checks arrays against the dtype and the device of x.
struct ArrayChecker {
  const char* op;
  const Tensor& x;

  void type(const char* name, const Tensor& t, ScalarType type) const {
    require(t.scalar_type() == type, op, ": ", name, " must have dtype ",
            torch::headeronly::toString(type), ", got ",
            torch::headeronly::toString(t.scalar_type()));
  }

  // The kernels follow the pointers on the device of x.
  void device(const char* name, const Tensor& t) const {
    require(t.device() == x.device(), op, ": ", name, " must be on the device of x");
  }

  void array(const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
             ScalarType dtype) const {
    bool same = t.dim() == static_cast<int64_t>(shape.size());
    int64_t axis = 0;
    for (const int64_t size : shape) same = same && t.size(axis++) == size;
    require(same, op, ": ", name, " must be ", shape, ", got ", t.sizes());
    require(t.is_contiguous(), op, ": ", name, " must be contiguous");
    type(name, t, dtype);
    device(name, t);
    present(name, t);
  }

  // Whether it has the memory that it should have.
  void present(const char* name, const Tensor& t) const {
    require(t.numel() == 0 || t.const_data_ptr(), op, ": the memory of ", name, " was freed");
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
    require(weight.dim() == 2 && weight.size(1) == inputs, op, ": ", names.weight,
            " must be (outputs, ", inputs, "), got ", weight.sizes());
    type(names.weight, weight, x.scalar_type());
    device(names.weight, weight);
    present(names.weight, weight);
    require(t.activation >= 0 && t.activation < kActivations, op, ": ", names.activation,
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

}  // namespace fpi

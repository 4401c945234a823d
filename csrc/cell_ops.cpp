// The cell loop op: schema, checks, and the CPU kernel behind it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <functional>
#include <optional>

#include "common/cell_loop_params.h"
#include "common/control.h"
#include "cpu/cell_loop.h"
#include "require.h"

namespace fpi {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "cell_loop_";

void check_array(const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                 ScalarType type) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (const int64_t size : shape) same = same && t.size(axis++) == size;
  require(same, kOp, ": ", name, " must be ", shape, ", got ", t.sizes());
  require(t.is_contiguous(), kOp, ": ", name, " must be contiguous");
  require(t.scalar_type() == type, kOp, ": ", name, " must have dtype ",
          torch::headeronly::toString(type), ", got ",
          torch::headeronly::toString(t.scalar_type()));
  require(t.is_cpu(), kOp, ": ", name, " must be on the CPU");
}

const void* optional_array(const char* name, const std::optional<Tensor>& t,
                           std::initializer_list<int64_t> shape, ScalarType type) {
  if (!t) return nullptr;
  check_array(name, *t, shape, type);
  return t->const_data_ptr();
}

struct LayerNames {
  const char *weight, *bias, *shift, *factor, *activation;
};
constexpr LayerNames kNames[2] = {{"weight1", "bias1", "shift1", "factor1", "activation1"},
                                  {"weight2", "bias2", "shift2", "factor2", "activation2"}};

// A weight may have any strides: that of an adjoint is a transposed view.
CellLayer checked_layer(const LayerNames& names, const Tensor& weight, int64_t inputs,
                        int64_t batch, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& shift, const std::optional<Tensor>& factor,
                        int64_t activation, ScalarType type) {
  require(weight.dim() == 2 && weight.size(1) == inputs, kOp, ": ", names.weight,
          " must be (outputs, ", inputs, "), got ", weight.sizes());
  require(weight.scalar_type() == type, kOp, ": ", names.weight, " must have dtype ",
          torch::headeronly::toString(type), ", got ",
          torch::headeronly::toString(weight.scalar_type()));
  require(weight.is_cpu(), kOp, ": ", names.weight, " must be on the CPU");
  require(activation >= 0 && activation < kActivations, kOp, ": ", names.activation,
          " must be from 0 to ", kActivations - 1, ", got ", activation);
  const int64_t outputs = weight.size(0);
  CellLayer layer{};
  layer.weight = weight.const_data_ptr();
  layer.outputs = outputs;
  layer.inputs = inputs;
  layer.output_stride = weight.stride(0);
  layer.input_stride = weight.stride(1);
  layer.bias = optional_array(names.bias, bias, {outputs}, type);
  layer.shift = optional_array(names.shift, shift, {batch, outputs}, type);
  layer.factor = optional_array(names.factor, factor, {batch, outputs}, type);
  layer.activation = static_cast<Activation>(activation);
  return layer;
}

void parallel_tiles(int64_t begin, int64_t end, int64_t grain,
                    const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(begin, end, grain, body);
}

void cell_loop_op(Tensor x, std::optional<Tensor> x_factor, Tensor weight1,
                  std::optional<Tensor> bias1, std::optional<Tensor> shift1,
                  std::optional<Tensor> factor1, std::optional<Tensor> weight2,
                  std::optional<Tensor> bias2, std::optional<Tensor> shift2,
                  std::optional<Tensor> factor2, Tensor atol, Tensor status, Tensor num_steps,
                  Tensor residual, int64_t activation1, int64_t activation2, double carry,
                  int64_t depth, double rtol, int64_t max_steps, double beta, double ridge,
                  int64_t precision) {
  require(x.dim() == 2, kOp, ": x must be (batch, dim), got ", x.sizes());
  const ScalarType type = x.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::Double, kOp,
          ": x must be float32 or float64, got ", torch::headeronly::toString(type));
  const int64_t batch = x.size(0), dim = x.size(1);
  require(dim >= 1, kOp, ": x must have at least one feature, got ", x.sizes());
  require(depth >= 0 && depth <= kMaxDepth, kOp, ": depth must be from 0 to ", kMaxDepth,
          ", got ", depth);
  require(max_steps >= 1, kOp, ": max_steps must be at least 1, got ", max_steps);
  require(precision >= 0 && precision < kPrecisions, kOp, ": precision must be from 0 to ",
          kPrecisions - 1, ", got ", precision);
  require(type == ScalarType::Float || precision == 0, kOp,
          ": precision must be 0 for a float64 x, got ", precision);
  check_array("x", x, {batch, dim}, type);
  check_array("atol", atol, {batch}, ScalarType::Double);
  check_array("status", status, {batch}, ScalarType::Char);
  check_array("num_steps", num_steps, {batch}, ScalarType::Int);
  check_array("residual", residual, {batch}, ScalarType::Double);
  require(weight2 || !(bias2 || shift2 || factor2), kOp,
          ": bias2, shift2 and factor2 belong to weight2, which is missing");

  CellLoopParams p{};
  p.x_factor = optional_array("x_factor", x_factor, {batch, dim}, type);
  p.layers[0] = checked_layer(kNames[0], weight1, dim, batch, bias1, shift1, factor1, activation1,
                              type);
  p.num_layers = 1;
  if (weight2) {
    p.layers[1] = checked_layer(kNames[1], *weight2, p.layers[0].outputs, batch, bias2, shift2,
                                factor2, activation2, type);
    p.num_layers = 2;
  }
  const int64_t outputs = p.layers[p.num_layers - 1].outputs;
  require(outputs == dim, kOp, ": the last weight must have the ", dim,
          " outputs of x, got ", outputs);
  p.carry = carry;
  p.x = x.mutable_data_ptr();
  p.atol = atol.const_data_ptr<double>();
  p.status = status.mutable_data_ptr<int8_t>();
  p.num_steps = num_steps.mutable_data_ptr<int32_t>();
  p.residual = residual.mutable_data_ptr<double>();
  p.batch = batch;
  p.dim = dim;
  p.depth = static_cast<int32_t>(depth);
  p.rtol = rtol;
  p.max_steps = max_steps;
  p.beta = beta;
  p.ridge = ridge;
  p.precision = static_cast<Precision>(precision);
  const StateType state = type == ScalarType::Double ? StateType::kFloat64 : StateType::kFloat32;
  cell_loop_cpu(p, state, torch::stable::get_num_threads(), parallel_tiles);
}

// Nothing is returned, so a fake run has nothing to do.
void cell_loop_meta(Tensor, std::optional<Tensor>, Tensor, std::optional<Tensor>,
                    std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>,
                    std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, Tensor,
                    Tensor, Tensor, Tensor, int64_t, int64_t, double, int64_t, double, int64_t,
                    double, double, int64_t) {}

int64_t cell_loop_tile_op(int64_t batch, int64_t dim, int64_t hidden, int64_t depth,
                          bool float64) {
  require(batch >= 0 && dim >= 1 && hidden >= 0 && depth >= 0 && depth <= kMaxDepth,
          "cell_loop_tile: sizes must not be negative, nor depth above ", kMaxDepth);
  CellLoopParams p{};
  p.batch = batch;
  p.dim = dim;
  p.depth = static_cast<int32_t>(depth);
  p.num_layers = hidden > 0 ? 2 : 1;
  p.layers[0].inputs = p.layers[1].outputs = dim;
  p.layers[0].outputs = p.layers[1].inputs = hidden > 0 ? hidden : dim;
  return cell_loop_tile(p, float64 ? StateType::kFloat64 : StateType::kFloat32,
                        torch::stable::get_num_threads());
}

}  // namespace
}  // namespace fpi

STABLE_TORCH_LIBRARY_FRAGMENT(fpi_cuda, m) {
  m.def(
      "cell_loop_(Tensor(a!) x, Tensor? x_factor, Tensor weight1, Tensor? bias1, "
      "Tensor? shift1, Tensor? factor1, Tensor? weight2, Tensor? bias2, Tensor? shift2, "
      "Tensor? factor2, Tensor atol, Tensor(b!) status, Tensor(c!) num_steps, "
      "Tensor(d!) residual, *, int activation1, int activation2, float carry, int depth, "
      "float rtol, int max_steps, float beta, float ridge, int precision) -> ()");
  m.def("cell_loop_tile(int batch, int dim, int hidden, int depth, bool float64) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CPU, m) { m.impl("cell_loop_", TORCH_BOX(&fpi::cell_loop_op)); }

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, Meta, m) {
  m.impl("cell_loop_", TORCH_BOX(&fpi::cell_loop_meta));
}

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CompositeExplicitAutograd, m) {
  m.impl("cell_loop_tile", TORCH_BOX(&fpi::cell_loop_tile_op));
}

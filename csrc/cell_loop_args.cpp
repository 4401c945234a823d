#include "cell_loop_args.h"

namespace fpi {
namespace {

constexpr LayerNames kNames[2] = {{"weight1", "bias1", "shift1", "factor1", "activation1"},
                                  {"weight2", "bias2", "shift2", "factor2", "activation2"}};

}  // namespace

CellLoopParams checked_arrays(const CellLoopTensors& t) {
  const Tensor& x = t.x;
  require(x.dim() == 2, kCellLoop, ": x must be (batch, dim), got ", x.sizes());
  const ScalarType type = x.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::Double, kCellLoop,
          ": x must be float32 or float64, got ", torch::headeronly::toString(type));
  const int64_t batch = x.size(0), dim = x.size(1);
  require(dim >= 1, kCellLoop, ": x must have at least one feature, got ", x.sizes());
  const ArrayChecker check{kCellLoop, x};
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
  require(width == dim, kCellLoop, ": the last weight must have the ", dim, " outputs of x, got ",
          width);
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

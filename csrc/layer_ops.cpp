// The ops of one layer of a lowered cell: schemas, checks, and the CPU kernels behind them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "array_checker.h"
#include "cpu/cell_layer.h"
#include "on_cpu.h"

namespace fpi {
namespace {

constexpr LayerNames kNames = {"weight", "bias", "shift", "factor", "activation"};

StateType checked_state(const char* op, const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  require(t.dim() == 2, op, ": ", name, " must be (batch, features), got ", t.sizes());
  require(type == ScalarType::Float || type == ScalarType::Double, op, ": ", name,
          " must be float32 or float64, got ", torch::headeronly::toString(type));
  return state_type(type);
}

void cell_layer_op(Tensor out, std::optional<Tensor> slope, Tensor h, Tensor weight,
                   std::optional<Tensor> bias, std::optional<Tensor> shift,
                   std::optional<Tensor> factor, int64_t activation, int64_t derivative) {
  constexpr const char* kOp = "cell_layer_";
  const StateType state = checked_state(kOp, "h", h);
  const ScalarType type = h.scalar_type();
  const int64_t batch = h.size(0);
  const ArrayChecker check{kOp, h};
  check.array("h", h, {batch, h.size(1)}, type);
  CellLayerParams p{};
  p.layer = check.layer(kNames, {weight, bias, shift, factor, activation}, h.size(1));
  require(derivative >= 0 && derivative < kActivations, kOp, ": derivative must be from 0 to ",
          kActivations - 1, ", got ", derivative);
  p.derivative = static_cast<Activation>(derivative);
  check.array("out", out, {batch, p.layer.outputs}, type);
  if (slope) {
    check.array("slope", *slope, {batch, p.layer.outputs}, type);
    p.slope = slope->mutable_data_ptr();
  }
  p.h = h.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.batch = batch;
  Workspace memory;
  cell_layer_cpu(p, nullptr, state, torch::stable::get_num_threads(), on_torch_threads, memory);
}

void weight_gradient_op(Tensor out, Tensor delta, Tensor h) {
  constexpr const char* kOp = "weight_gradient_";
  const StateType state = checked_state(kOp, "h", h);
  const ScalarType type = h.scalar_type();
  require(delta.dim() == 2, kOp, ": delta must be (batch, outputs), got ", delta.sizes());
  const ArrayChecker check{kOp, h};
  WeightGradientParams p{};
  p.batch = h.size(0);
  p.inputs = h.size(1);
  p.outputs = delta.size(1);
  check.array("h", h, {p.batch, p.inputs}, type);
  check.array("delta", delta, {p.batch, p.outputs}, type);
  check.array("out", out, {p.outputs, p.inputs}, type);
  require(p.batch > 0, kOp, ": h must have at least one sample, got ", h.sizes());
  p.h = h.const_data_ptr();
  p.delta = delta.const_data_ptr();
  p.out = out.mutable_data_ptr();
  Workspace memory;
  weight_gradient_cpu(p, state, torch::stable::get_num_threads(), on_torch_threads, memory);
}

// Nothing is returned, so a fake run has nothing to do.
void cell_layer_meta(Tensor, std::optional<Tensor>, Tensor, Tensor, std::optional<Tensor>,
                     std::optional<Tensor>, std::optional<Tensor>, int64_t, int64_t) {}
void weight_gradient_meta(Tensor, Tensor, Tensor) {}

}  // namespace
}  // namespace fpi

STABLE_TORCH_LIBRARY_FRAGMENT(fpi_cuda, m) {
  m.def(
      "cell_layer_(Tensor(a!) out, Tensor(b!)? slope, Tensor h, Tensor weight, Tensor? bias, "
      "Tensor? shift, Tensor? factor, *, int activation, int derivative) -> ()");
  m.def("weight_gradient_(Tensor(a!) out, Tensor delta, Tensor h) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CPU, m) {
  m.impl("cell_layer_", TORCH_BOX(&fpi::cell_layer_op));
  m.impl("weight_gradient_", TORCH_BOX(&fpi::weight_gradient_op));
}

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, Meta, m) {
  m.impl("cell_layer_", TORCH_BOX(&fpi::cell_layer_meta));
  m.impl("weight_gradient_", TORCH_BOX(&fpi::weight_gradient_meta));
}

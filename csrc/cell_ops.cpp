// The cell loop op: schema, and the kernels behind it, on the CPU and on CUDA devices.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>

#include "cell_loop_args.h"
#include "common/control.h"
#include "cpu/cell_loop.h"
#include "cuda/cell_loop.h"
#include "on_cpu.h"
#include "on_cuda.h"
#include "require.h"

namespace fpi {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef FPI_CUDA_ARCHS
void run_on_cuda(const Tensor& x, const CellLoopParams& p) {
  const OnCuda device(kCellLoop, x);
  const StateType state = cell_state(x);
  DeviceLimits limits{};
  const char* error = device_limits(limits);
  require(error == nullptr, kCellLoop, ": the device gave no answer: ", error ? error : "");
  const CellLoopPlan plan = cell_loop_plan(p, state, limits);
  // Freed on the way out, for the allocator to use again on this stream alone.
  const Tensor workspace = torch::stable::new_empty(x, {plan.workspace_bytes}, ScalarType::Byte);
  error = cell_loop_cuda(p, state, plan, workspace.mutable_data_ptr(), device.stream());
  require(error == nullptr, kCellLoop, ": the CUDA launch failed: ", error ? error : "");
}
#else
// Never called: without it the op is registered for the CPU alone.
void run_on_cuda(const Tensor&, const CellLoopParams&) {}
#endif

void cell_loop_op(Tensor x, std::optional<Tensor> x_factor, Tensor weight1,
                  std::optional<Tensor> bias1, std::optional<Tensor> shift1,
                  std::optional<Tensor> factor1, std::optional<Tensor> weight2,
                  std::optional<Tensor> bias2, std::optional<Tensor> shift2,
                  std::optional<Tensor> factor2, Tensor atol, Tensor status, Tensor num_steps,
                  Tensor residual, int64_t activation1, int64_t activation2, double carry,
                  int64_t depth, double rtol, int64_t max_steps, double beta, double ridge,
                  int64_t precision) {
  const CellLoopTensors tensors{x,
                                x_factor,
                                {{weight1, bias1, shift1, factor1, activation1},
                                 {weight2, bias2, shift2, factor2, activation2}},
                                atol,
                                status,
                                num_steps,
                                residual};
  CellLoopParams p = checked_arrays(tensors);
  const bool float64 = cell_state(x) == StateType::kFloat64;
  require(depth >= 0 && depth <= kMaxDepth, kCellLoop, ": depth must be from 0 to ", kMaxDepth,
          ", got ", depth);
  require(max_steps >= 1, kCellLoop, ": max_steps must be at least 1, got ", max_steps);
  require(precision >= 0 && precision < kPrecisions, kCellLoop, ": precision must be from 0 to ",
          kPrecisions - 1, ", got ", precision);
  require(!float64 || precision == 0, kCellLoop, ": precision must be 0 for a float64 x, got ",
          precision);
  p.carry = carry;
  p.depth = static_cast<int32_t>(depth);
  p.rtol = rtol;
  p.max_steps = max_steps;
  p.beta = beta;
  p.ridge = ridge;
  p.precision = static_cast<Precision>(precision);
  if (p.batch == 0) return;
  if (x.is_cuda()) return run_on_cuda(x, p);
  Workspace memory;
  cell_loop_cpu(p, cell_state(x), torch::stable::get_num_threads(), on_torch_threads, memory);
}

// Nothing is returned, so a fake run has nothing to do.
void cell_loop_meta(Tensor, std::optional<Tensor>, Tensor, std::optional<Tensor>,
                    std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>,
                    std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, Tensor,
                    Tensor, Tensor, Tensor, int64_t, int64_t, double, int64_t, double, int64_t,
                    double, double, int64_t) {}

// The sizes of a cell, without its arrays; one layer where hidden is 0.
CellLoopParams sizes_of(const char* op, int64_t batch, int64_t dim, int64_t hidden, int64_t depth) {
  require(batch >= 0 && dim >= 1 && hidden >= 0 && depth >= 0 && depth <= kMaxDepth, op,
          ": sizes must not be negative, nor depth above ", kMaxDepth);
  CellLoopParams p{};
  p.batch = batch;
  p.dim = dim;
  p.depth = static_cast<int32_t>(depth);
  p.num_layers = hidden > 0 ? 2 : 1;
  p.layers[0].inputs = p.layers[1].outputs = dim;
  p.layers[0].outputs = p.layers[1].inputs = hidden > 0 ? hidden : dim;
  return p;
}

int64_t cell_loop_tile_op(int64_t batch, int64_t dim, int64_t hidden, int64_t depth, bool float64) {
  const CellLoopParams p = sizes_of("cell_loop_tile", batch, dim, hidden, depth);
  return cell_loop_tile(p, float64 ? StateType::kFloat64 : StateType::kFloat32,
                        torch::stable::get_num_threads());
}

// The tile on a device, and why separate kernels would be faster there: "slots", or "slots reason".
std::string cell_loop_on_cuda_op(int64_t batch, int64_t dim, int64_t hidden, int64_t depth,
                                 bool float64, int64_t precision, int64_t cores,
                                 int64_t shared_bytes) {
  const char* op = "cell_loop_on_cuda";
  CellLoopParams p = sizes_of(op, batch, dim, hidden, depth);
  require(precision >= 0 && precision < kPrecisions, op, ": precision must be from 0 to ",
          kPrecisions - 1, ", got ", precision);
  require(cores >= 1 && shared_bytes >= 0, op, ": a device has cores, got ", cores);
  p.precision = static_cast<Precision>(precision);
  const StateType state = float64 ? StateType::kFloat64 : StateType::kFloat32;
  const DeviceLimits limits{cores, shared_bytes};
  const CellLoopPlan plan = cell_loop_plan(p, state, limits);
  const char* reason = why_not_worth_fusing(plan, p, state, limits);
  return std::to_string(plan.slots) + (reason ? std::string(" ") + reason : "");
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
  m.def(
      "cell_loop_on_cuda(int batch, int dim, int hidden, int depth, bool float64, int precision, "
      "int cores, int shared_bytes) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CPU, m) { m.impl("cell_loop_", TORCH_BOX(&fpi::cell_loop_op)); }

#ifdef FPI_CUDA_ARCHS
STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CUDA, m) {
  m.impl("cell_loop_", TORCH_BOX(&fpi::cell_loop_op));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, Meta, m) {
  m.impl("cell_loop_", TORCH_BOX(&fpi::cell_loop_meta));
}

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CompositeExplicitAutograd, m) {
  m.impl("cell_loop_tile", TORCH_BOX(&fpi::cell_loop_tile_op));
  m.impl("cell_loop_on_cuda", TORCH_BOX(&fpi::cell_loop_on_cuda_op));
}

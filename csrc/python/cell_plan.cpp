#include "python/cell_plan.h"

#include <cmath>
#include <new>
#include <stdexcept>
#include <string>

#include "common/activation.h"
#include "common/control.h"
#include "common/precision.h"

namespace fpi {
namespace {

void require(bool holds, const char* rule) {
  if (!holds) throw std::invalid_argument(std::string("cell plan: ") + rule);
}

void require_range(const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
  if (value >= least && value <= most) return;
  throw std::invalid_argument(std::string("cell plan: ") + name + " must be from " +
                              std::to_string(least) + " to " + std::to_string(most) + ", got " +
                              std::to_string(value));
}

constexpr std::int64_t kMost = std::int64_t{1} << 31;  // features; a product of two is no overflow

void check_solver(const FpiCellSolver& solver) {
  require_range("depth", solver.depth, 0, kMaxDepth);
  require_range("max_steps", solver.max_steps, 1, INT64_MAX);
  require(solver.rtol >= 0 && solver.atol >= 0, "tolerances must not be negative");
  require(solver.ridge >= 0, "ridge must not be negative");
  require(std::isfinite(solver.beta), "beta must be finite");
}

const FpiCellPlanOptions& checked(const FpiCellPlanOptions& options) {
  require_range("dim", options.dim, 1, kMost);
  require_range("hidden", options.hidden, 0, kMost);
  for (int l = 0; l < 2; ++l) {
    require_range("activations", options.activations[l], 0, kActivations - 1);
    require_range("derivatives", options.derivatives[l], 0, kActivations - 1);
  }
  require_range("precision", options.precision, 0, kPrecisions - 1);
  require(!options.float64 || options.precision == 0, "precision must be 0 for float64");
  require(std::isfinite(options.carry), "carry must be finite");
  check_solver(options.forward);
  check_solver(options.adjoint);
  return options;
}

int answered(int answer) {
  if (answer == kFpiCellNoMemory) throw std::bad_alloc();
  return answer;
}

}  // namespace

CellPlan::CellPlan(const FpiCellPlanOptions& options)
    : library_(library()), options_(checked(options)), plan_(library_.cell_plan_create(&options)) {
  if (!plan_) throw std::bad_alloc();
}

void CellPlan::check_map(std::int64_t batch, const FpiCellLayer* layers) const {
  require_range("batch", batch, 0, INT64_MAX / (8 * kMost));
  for (int l = 0; l < num_layers(); ++l) require(layers[l].weight, "every layer needs its weight");
}

int CellPlan::solve(const FpiCellSolve& call) const {
  check_map(call.batch, call.layers);
  require(call.batch == 0 || (call.x && call.status && call.num_steps && call.residual),
          "x, status, num_steps and residual are needed");
  const bool evaluates = call.hidden || call.slopes[0] || call.slopes[1];
  require(!evaluates || !(call.x_factor || call.layers[0].factor || call.layers[1].factor),
          "hidden and slopes are those of a map without factors");
  require(num_layers() == 2 || !(call.hidden || call.slopes[1]), "there is no second layer");
  require(num_layers() == 1 || call.hidden || !evaluates,
          "hidden is needed for the slopes of two layers");
  return answered(library_.cell_plan_solve(plan_, &call));
}

void CellPlan::check_gradients(const FpiCellGradients& call) const {
  check_map(call.batch, call.layers);
  require(num_layers() == 2 || !(call.slopes[1] || call.deltas[1] || call.weights[1]),
          "there is no second layer");
  require(call.batch == 0 || call.c, "c is needed");
  require(call.batch == 0 || call.x || !call.weights[0],
          "x is needed for the gradient of a weight");
  require(call.batch == 0 || call.hidden || !call.weights[1],
          "hidden is needed for the gradient of the second weight");
}

int CellPlan::adjoint(const FpiCellAdjoint& call) const {
  check_gradients(call.gradients);
  require(call.gradients.batch == 0 || (call.v && call.status && call.num_steps && call.residual),
          "v, status, num_steps and residual are needed");
  return answered(library_.cell_plan_adjoint(plan_, &call));
}

void CellPlan::gradients(const FpiCellGradients& call) const {
  check_gradients(call);
  answered(library_.cell_plan_gradients(plan_, &call));
}

}  // namespace fpi

// fpi_cuda._C.CellPlan: the solves of one lowered cell on the CPU, and the memory they take.
#pragma once

#include <cstdint>

#include "python/library.h"

namespace fpi {

// Holds no reference to Python: its methods run without the GIL. What they are given is checked as
// far as addresses can be: std::invalid_argument says what is wrong.
class CellPlan {
 public:
  explicit CellPlan(const FpiCellPlanOptions& options);
  ~CellPlan() { library_.cell_plan_destroy(plan_); }
  CellPlan(const CellPlan&) = delete;
  CellPlan& operator=(const CellPlan&) = delete;

  bool float64() const { return options_.float64; }
  std::int64_t dim() const { return options_.dim; }
  int num_layers() const { return options_.hidden ? 2 : 1; }
  std::int64_t outputs(int l) const { return l + 1 == num_layers() ? dim() : options_.hidden; }
  std::int64_t inputs(int l) const { return l == 0 ? dim() : options_.hidden; }

  int solve(const FpiCellSolve& call) const;
  int adjoint(const FpiCellAdjoint& call) const;
  void gradients(const FpiCellGradients& call) const;
  std::int64_t bytes() const { return library_.cell_plan_bytes(plan_); }
  void clear() const { library_.cell_plan_clear(plan_); }

 private:
  void check_map(std::int64_t batch, const FpiCellLayer* layers) const;
  void check_gradients(const FpiCellGradients& call) const;

  const Library& library_;
  const FpiCellPlanOptions options_;
  FpiCellPlan* plan_;
};

}  // namespace fpi

// The solves of one lowered cell on the CPU, for callers of any language: plain C. csrc/python calls
// it. Arrays are contiguous but for weights, float32 or float64 as the plan's; null stands for none.
// What is given is not checked.
#pragma once

#include <cstdint>

#include "../common/export.h"

// y = factor * activation(weight h + bias + shift), see CellLayer; strides in elements.
struct FpiCellLayer {
  const void* weight;  // (outputs, inputs)
  int64_t output_stride;
  int64_t input_stride;
  const void* bias;    // (outputs,)
  const void* shift;   // (batch, outputs)
  const void* factor;  // (batch, outputs)
};

struct FpiCellSolver {
  int64_t depth;  // of Anderson's history; 0 for Picard
  double beta;
  double ridge;
  double rtol;
  double atol;  // of every sample
  int64_t max_steps;
};

struct FpiCellPlanOptions {
  bool float64;
  int64_t dim;
  int64_t hidden;          // outputs of the first of two layers; 0 for one layer
  int64_t activations[2];  // see Activation
  int64_t derivatives[2];
  double carry;
  int64_t precision;  // of the forward's products, see Precision
  FpiCellSolver forward;
  FpiCellSolver adjoint;  // its rtol is relative to v; it has no atol
};

struct FpiCellSolve {
  int64_t batch;
  FpiCellLayer layers[2];
  const void* x_factor;  // (batch, dim)
  void* x;               // (batch, dim) where to start; overwritten with the point to return
  int8_t* status;        // (batch,) and so the next two
  int32_t* num_steps;
  double* residual;
  void* hidden;     // (batch, hidden) what the first of two layers gives at that point; or null
  void* slopes[2];  // (batch, outputs) of that layer there; null: nobody asks
};

struct FpiCellGradients {
  int64_t batch;
  FpiCellLayer layers[2];  // of the map; their weights alone are read
  const void* x;           // (batch, dim) the fixed point
  const void* hidden;      // (batch, hidden) of the first of two layers there
  const void* slopes[2];   // (batch, outputs) of the layers there; null: ones
  void* c;                 // (batch, dim)
  void* deltas[2];         // (batch, outputs) gradients in the layers' sums
  void* weights[2];        // (outputs, inputs)
};

struct FpiCellAdjoint {
  FpiCellGradients gradients;  // c is written
  const void* v;               // (batch, dim)
  int8_t* status;              // (batch,) and so the next two
  int32_t* num_steps;
  double* residual;
};

// What a call returns where it is no status.
enum FpiCellAnswer : int { kFpiCellNotDone = -1, kFpiCellNoMemory = -2 };

struct FpiCellPlan;

// Any thread may call any function at any time, but the last.
FPI_API FpiCellPlan* fpi_cell_plan_create(const FpiCellPlanOptions* options);

// The highest status.
FPI_API int fpi_cell_plan_solve(FpiCellPlan* plan, const FpiCellSolve* call);

// c = J^T c + v, from c = v, and, where every sample has converged, its gradients. The highest
// status. kFpiCellNotDone, with nothing written, where a row of v is not zero and not near enough
// to 1 for products to keep their digits, or is not finite; and where the precision is not kIeee.
FPI_API int fpi_cell_plan_adjoint(FpiCellPlan* plan, const FpiCellAdjoint* call);

// From a c that is given. kFpiCellNoMemory, or some other number.
FPI_API int fpi_cell_plan_gradients(FpiCellPlan* plan, const FpiCellGradients* call);

// Memory that is kept for calls to come, without that of calls under way; and giving it back.
FPI_API int64_t fpi_cell_plan_bytes(FpiCellPlan* plan);
FPI_API void fpi_cell_plan_clear(FpiCellPlan* plan);

FPI_API void fpi_cell_plan_destroy(FpiCellPlan* plan);

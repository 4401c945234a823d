// The solves of one lowered cell on the CPU: see api.h.
#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "common/status.h"
#include "cpu/cell_gradient.h"
#include "cpu/cell_layer.h"
#include "cpu/cell_loop.h"
#include "on_cpu.h"

#include "cell_plan/api.h"

// Memory lies in a pool, from which every running call has its own workspace: no lock is held while
// numbers are computed.
struct FpiCellPlan {
  explicit FpiCellPlan(const FpiCellPlanOptions& given) : options(given) {}

  const FpiCellPlanOptions options;
  std::mutex mutex;
  std::vector<std::unique_ptr<fpi::Workspace>> idle;
};

namespace fpi {
namespace {

// A workspace of the pool, for one call.
class Lease {
 public:
  explicit Lease(FpiCellPlan& plan) : plan_(plan) {
    const std::lock_guard<std::mutex> lock(plan.mutex);
    if (plan.idle.empty()) {
      memory_ = std::make_unique<Workspace>();
    } else {
      memory_ = std::move(plan.idle.back());
      plan.idle.pop_back();
    }
  }
  ~Lease() {
    try {
      const std::lock_guard<std::mutex> lock(plan_.mutex);
      plan_.idle.push_back(std::move(memory_));
    } catch (const std::bad_alloc&) {
      // Not kept, then.
    }
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  Workspace& operator*() const { return *memory_; }

 private:
  FpiCellPlan& plan_;
  std::unique_ptr<Workspace> memory_;
};

// One call: a plan, the memory that it may use, and torch's threads.
struct Call {
  const FpiCellPlanOptions& plan;
  Workspace& memory;
  int64_t batch;
  StateType state = plan.float64 ? StateType::kFloat64 : StateType::kFloat32;
  int64_t threads = torch::stable::get_num_threads();

  int num_layers() const { return plan.hidden ? 2 : 1; }
  int64_t outputs(int l) const { return l + 1 == num_layers() ? plan.dim : plan.hidden; }
  int64_t inputs(int l) const { return l == 0 ? plan.dim : plan.hidden; }
  int64_t array_bytes(int64_t features) const {
    return plan.float64 ? Arena::size_of<double>(batch * features)
                        : Arena::size_of<float>(batch * features);
  }
  void* take(int64_t features) const {
    return plan.float64 ? static_cast<void*>(memory.arrays.take<double>(batch * features))
                        : memory.arrays.take<float>(batch * features);
  }
  void copy(const void* from, void* to, int64_t features) const {
    std::memcpy(to, from, batch * features * (plan.float64 ? sizeof(double) : sizeof(float)));
  }
};

CellLayer layer_of(const Call& call, const FpiCellLayer& given, int l) {
  return {
      given.weight,        call.outputs(l),    call.inputs(l),
      given.output_stride, given.input_stride, given.bias,
      given.shift,         given.factor,       static_cast<Activation>(call.plan.activations[l])};
}

// The layer's transpose, without its activation and terms.
CellLayer transposed(const Call& call, const FpiCellLayer& given, int l) {
  CellLayer layer{};
  layer.weight = given.weight;
  layer.outputs = call.inputs(l);
  layer.inputs = call.outputs(l);
  layer.output_stride = given.input_stride;
  layer.input_stride = given.output_stride;
  layer.activation = Activation::kIdentity;
  return layer;
}

CellLoopParams loop_params(const Call& call, const FpiCellSolver& solver) {
  CellLoopParams p{};
  p.num_layers = call.num_layers();
  p.carry = call.plan.carry;
  p.batch = call.batch;
  p.dim = call.plan.dim;
  p.depth = static_cast<int32_t>(solver.depth);
  p.rtol = solver.rtol;
  p.max_steps = solver.max_steps;
  p.beta = solver.beta;
  p.ridge = solver.ridge;
  p.precision = static_cast<Precision>(call.plan.precision);
  return p;
}

int run_loop(const Call& call, const CellLoopParams& p) {
  cell_loop_cpu(p, call.state, call.threads, on_torch_threads, call.memory);
  return call.batch ? *std::max_element(p.status, p.status + call.batch) : int{kConverged};
}

// The slopes of the layers at x, and what the first of two gives there.
void evaluate(const Call& call, const FpiCellSolve& given, const CellLoopParams& loop) {
  const void* h = given.x;
  for (int l = 0; l < loop.num_layers; ++l) {
    const bool last = l + 1 == loop.num_layers;
    if (last && !given.slopes[l]) return;
    CellLayerParams p{};
    p.layer = loop.layers[l];
    p.h = h;
    p.out = last ? nullptr : given.hidden;
    p.slope = given.slopes[l];
    p.derivative = static_cast<Activation>(call.plan.derivatives[l]);
    p.batch = call.batch;
    const void* packed = call.memory.weights[l].data();
    cell_layer_cpu(p, loop.precision == Precision::kIeee ? packed : nullptr, call.state,
                   call.threads, on_torch_threads, call.memory);
    h = given.hidden;
  }
}

int solve(const FpiCellPlanOptions& plan, const FpiCellSolve& given, Workspace& memory) {
  const Call call{plan, memory, given.batch};
  CellLoopParams p = loop_params(call, plan.forward);
  for (int l = 0; l < p.num_layers; ++l) p.layers[l] = layer_of(call, given.layers[l], l);
  p.x_factor = given.x_factor;
  p.x = given.x;
  p.status = given.status;
  p.num_steps = given.num_steps;
  p.residual = given.residual;
  memory.arrays.reset(Arena::size_of<double>(call.batch));
  double* atol = memory.arrays.take<double>(call.batch);
  std::fill(atol, atol + call.batch, plan.forward.atol);
  p.atol = atol;
  const int worst = run_loop(call, p);
  if (given.hidden || given.slopes[0] || given.slopes[1]) evaluate(call, given, p);
  return worst;
}

// Gradients of <c, g(x)> in what the layers are made of.
//
// packed: the transposed weight of the second layer, if there is one; null: it is packed here.
void differentiate(const Call& call, const FpiCellGradients& given, const void* packed) {
  const int last = call.num_layers() - 1;
  const void* above = given.c;  // the gradient in the layer's result
  for (int l = last; l >= 0; --l) {
    const auto asked = [&](int k) { return given.deltas[k] || given.weights[k]; };
    const bool deeper = l > 0 && asked(0);
    if (!asked(l) && !deeper) return;
    const int64_t outputs = call.outputs(l);
    void* delta = given.deltas[l];
    if (l < last) {
      // The slope is a factor of the product.
      if (!delta) delta = call.take(outputs);
      CellLayerParams p{};
      p.layer = transposed(call, given.layers[last], last);
      p.layer.factor = given.slopes[l];
      p.h = above;
      p.out = delta;
      p.batch = call.batch;
      cell_layer_cpu(p, packed, call.state, call.threads, on_torch_threads, call.memory);
    } else if (given.slopes[l]) {
      if (!delta) delta = call.take(outputs);
      multiply_cpu(above, given.slopes[l], delta, call.state, call.batch * outputs,
                   on_torch_threads);
    } else if (delta) {
      call.copy(above, delta, outputs);
    }
    const void* found = delta ? delta : above;
    if (given.weights[l]) {
      const WeightGradientParams p{
          found, l ? given.hidden : given.x, given.weights[l], call.batch, outputs, call.inputs(l)};
      if (call.batch) {
        weight_gradient_cpu(p, call.state, call.threads, on_torch_threads, call.memory);
      } else {
        std::memset(p.out, 0, outputs * p.inputs * (call.plan.float64 ? 8 : 4));
      }
    }
    above = found;
  }
}

int64_t bytes_of_deltas(const Call& call) {
  return call.array_bytes(call.plan.dim) + call.array_bytes(call.plan.hidden);
}

int adjoint(const FpiCellPlanOptions& plan, const FpiCellAdjoint& given, Workspace& memory) {
  const FpiCellGradients& gradients = given.gradients;
  const Call call{plan, memory, gradients.batch};
  // An account of rounded products is for the map itself to settle.
  if (plan.precision != static_cast<int64_t>(Precision::kIeee)) return kFpiCellNotDone;
  memory.arrays.reset(Arena::size_of<double>(call.batch) + bytes_of_deltas(call));
  double* atol = memory.arrays.take<double>(call.batch);
  if (!adjoint_tolerances_cpu(given.v, call.state, call.batch, plan.dim, plan.adjoint.rtol, atol,
                              on_torch_threads)) {
    return kFpiCellNotDone;
  }
  FpiCellSolver solver = plan.adjoint;
  solver.rtol = 0;  // the loop's own is relative to c
  CellLoopParams p = loop_params(call, solver);
  const int last = p.num_layers - 1;
  for (int l = 0; l <= last; ++l) p.layers[last - l] = transposed(call, gradients.layers[l], l);
  if (last) p.layers[0].factor = gradients.slopes[0];
  p.layers[last].shift = given.v;
  p.x_factor = gradients.slopes[last];
  call.copy(given.v, gradients.c, plan.dim);
  p.x = gradients.c;
  p.atol = atol;
  p.status = given.status;
  p.num_steps = given.num_steps;
  p.residual = given.residual;
  const int worst = run_loop(call, p);
  if (worst == kConverged) {
    differentiate(call, gradients, last && call.batch ? memory.weights[0].data() : nullptr);
  }
  return worst;
}

// Runs body(memory); lets no exception out.
template <class Body>
int guarded(FpiCellPlan* plan, const Body& body) noexcept {
  try {
    const Lease memory(*plan);
    return body(*memory);
  } catch (const std::exception&) {
    return kFpiCellNoMemory;
  }
}

}  // namespace
}  // namespace fpi

FpiCellPlan* fpi_cell_plan_create(const FpiCellPlanOptions* options) {
  return new (std::nothrow) FpiCellPlan(*options);
}

int fpi_cell_plan_solve(FpiCellPlan* plan, const FpiCellSolve* call) {
  return fpi::guarded(
      plan, [&](fpi::Workspace& memory) { return fpi::solve(plan->options, *call, memory); });
}

int fpi_cell_plan_adjoint(FpiCellPlan* plan, const FpiCellAdjoint* call) {
  return fpi::guarded(
      plan, [&](fpi::Workspace& memory) { return fpi::adjoint(plan->options, *call, memory); });
}

int fpi_cell_plan_gradients(FpiCellPlan* plan, const FpiCellGradients* call) {
  return fpi::guarded(plan, [&](fpi::Workspace& memory) {
    const fpi::Call own{plan->options, memory, call->batch};
    memory.arrays.reset(fpi::bytes_of_deltas(own));
    fpi::differentiate(own, *call, nullptr);
    return int{fpi::kConverged};
  });
}

int64_t fpi_cell_plan_bytes(FpiCellPlan* plan) {
  const std::lock_guard<std::mutex> lock(plan->mutex);
  int64_t sum = 0;
  for (const auto& memory : plan->idle) sum += memory->bytes();
  return sum;
}

void fpi_cell_plan_clear(FpiCellPlan* plan) {
  std::vector<std::unique_ptr<fpi::Workspace>> idle;
  const std::lock_guard<std::mutex> lock(plan->mutex);
  idle.swap(plan->idle);
}

void fpi_cell_plan_destroy(FpiCellPlan* plan) { delete plan; }

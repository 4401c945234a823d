// The step ops: schema, checks, and the kernels behind them, on the CPU and on CUDA devices.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "array_checker.h"
#include "common/control.h"
#include "common/small_solve.h"
#include "common/step_params.h"
#include "cpu/step.h"
#include "cuda/scratch.h"
#include "cuda/step.h"
#include "on_cpu.h"
#include "on_cuda.h"
#include "require.h"

namespace fpi {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_shape(const char* op, const char* name, const Tensor& t,
                 std::initializer_list<int64_t> shape) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (const int64_t size : shape) same = same && t.size(axis++) == size;
  require(same, op, ": ", name, " must be ", shape, ", got ", t.sizes());
  require(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

void check_type(const char* op, const char* name, const Tensor& t, ScalarType type) {
  require(t.scalar_type() == type, op, ": ", name, " must have dtype ",
          torch::headeronly::toString(type), ", got ",
          torch::headeronly::toString(t.scalar_type()));
}

void check_state_type(const char* op, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  const bool served = type == ScalarType::Float || type == ScalarType::Double ||
                      type == ScalarType::BFloat16 || (type == ScalarType::Half && x.is_cuda());
  require(served, op, ": x must be float32, float64",
          x.is_cuda() ? ", bfloat16 or float16" : " or bfloat16 on the CPU", ", got ",
          torch::headeronly::toString(type));
}

// Every array of a step, by the names of the schema.
struct StepTensors {
  Tensor x, gx;
  std::optional<Tensor> sample_of;
  Tensor best, anchor, f_previous, partner_previous, columns_f, columns_g, gram, control, atol,
      status, num_steps, residual;
  std::optional<Tensor> scratch;
};

// The kernels follow the pointers on the device of x.
void check_devices(const char* op, const StepTensors& t) {
  const auto same = [&t](const Tensor& other) { return other.device() == t.x.device(); };
  for (const Tensor* other :
       {&t.gx, &t.best, &t.anchor, &t.f_previous, &t.partner_previous, &t.columns_f, &t.columns_g,
        &t.gram, &t.control, &t.atol, &t.status, &t.num_steps, &t.residual}) {
    require(same(*other), op, ": every array must be on the device of x");
  }
  require(!t.sample_of || same(*t.sample_of), op, ": sample_of must be on the device of x");
  require(!t.scratch || same(*t.scratch), op, ": scratch must be on the device of x");
}

StepParams checked_params(const char* op, StepTensors& t, bool uses_gram) {
  check_state_type(op, t.x);
  check_devices(op, t);
  require(t.x.dim() == 2, op, ": x must be (rows, dim), got ", t.x.sizes());
  require(t.best.dim() == 2, op, ": best must be (batch, dim), got ", t.best.sizes());
  require(t.columns_f.dim() == 3, op, ": columns_f must be (batch, depth, dim), got ",
          t.columns_f.sizes());
  const int64_t rows = t.x.size(0), dim = t.x.size(1), batch = t.best.size(0);
  const int64_t depth = t.columns_f.size(1);
  require(depth <= kMaxDepth, op, ": depth must be at most ", kMaxDepth, ", got ", depth);
  check_shape(op, "x", t.x, {rows, dim});
  check_shape(op, "gx", t.gx, {rows, dim});
  check_shape(op, "best", t.best, {batch, dim});
  check_shape(op, "columns_f", t.columns_f, {batch, depth, dim});
  check_shape(op, "columns_g", t.columns_g, {batch, depth, dim});
  const ScalarType state = t.x.scalar_type();
  const ScalarType compute = state == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const bool in_slot = uses_gram && t.columns_f.scalar_type() == compute;
  const int64_t apart = depth && !in_slot ? batch : 0;
  check_shape(op, "anchor", t.anchor, {depth ? batch : 0, dim});
  check_shape(op, "f_previous", t.f_previous, {apart, dim});
  check_shape(op, "partner_previous", t.partner_previous, {apart, dim});
  if (uses_gram) check_shape(op, "gram", t.gram, {batch, gram_size(static_cast<int>(depth))});
  check_shape(op, "control", t.control, {batch, kControlSize});
  check_shape(op, "atol", t.atol, {batch});
  check_shape(op, "status", t.status, {batch});
  check_shape(op, "num_steps", t.num_steps, {batch});
  check_shape(op, "residual", t.residual, {batch});
  check_type(op, "gx", t.gx, state);
  check_type(op, "best", t.best, state);
  check_type(op, "anchor", t.anchor, state);
  check_type(op, "f_previous", t.f_previous, compute);
  check_type(op, "partner_previous", t.partner_previous, compute);
  check_type(op, "columns_g", t.columns_g, t.columns_f.scalar_type());
  // Anderson's alone: an option says so.
  const bool narrow =
      uses_gram && state == ScalarType::Float && t.columns_f.scalar_type() == ScalarType::BFloat16;
  if (!narrow) check_type(op, "columns_f", t.columns_f, state);
  if (uses_gram) check_type(op, "gram", t.gram, ScalarType::Double);
  check_type(op, "control", t.control, ScalarType::Double);
  check_type(op, "atol", t.atol, ScalarType::Double);
  check_type(op, "status", t.status, ScalarType::Char);
  check_type(op, "num_steps", t.num_steps, ScalarType::Int);
  check_type(op, "residual", t.residual, ScalarType::Double);

  StepParams p{};
  if (t.sample_of) {
    check_shape(op, "sample_of", *t.sample_of, {rows});
    check_type(op, "sample_of", *t.sample_of, ScalarType::Long);
    p.sample_of = t.sample_of->const_data_ptr<int64_t>();
  } else {
    require(rows == batch, op, ": x must hold the whole batch of ", batch, ", got ", rows,
            " rows; pass sample_of to name those it holds");
  }
  p.x = t.x.mutable_data_ptr();
  p.gx = t.gx.const_data_ptr();
  p.best = t.best.mutable_data_ptr();
  p.anchor = t.anchor.mutable_data_ptr();
  p.f_previous = apart ? t.f_previous.mutable_data_ptr() : nullptr;
  p.partner_previous = apart ? t.partner_previous.mutable_data_ptr() : nullptr;
  p.columns_f = t.columns_f.mutable_data_ptr();
  p.columns_g = t.columns_g.mutable_data_ptr();
  p.gram = uses_gram ? t.gram.mutable_data_ptr<double>() : nullptr;
  p.control = t.control.mutable_data_ptr<double>();
  p.atol = t.atol.const_data_ptr<double>();
  p.status = t.status.mutable_data_ptr<int8_t>();
  p.num_steps = t.num_steps.mutable_data_ptr<int32_t>();
  p.residual = t.residual.mutable_data_ptr<double>();
  p.rows = rows;
  p.dim = dim;
  p.depth = static_cast<int32_t>(depth);
  return p;
}

// The kernels index the batch by these, unchecked. On a CUDA device the host cannot look without
// waiting for it, and the caller answers for them.
void check_samples(const char* op, const StepTensors& t, const StepParams& p) {
  if (!p.sample_of || t.x.is_cuda()) return;
  const int64_t batch = t.best.size(0);
  for (int64_t i = 0; i < p.rows; ++i) {
    require(p.sample_of[i] >= 0 && p.sample_of[i] < batch, op,
            ": sample_of must name samples below ", batch, ", got ", p.sample_of[i]);
  }
}

using CpuStep = void (*)(const StepParams&, StateType, StateType, ParallelFor);
using CudaStep = const char* (*)(const StepParams&, StateType, StateType, void*, void*);

void run_on_cuda(const char* op, const StepTensors& t, const StepParams& p, StateType state,
                 StateType history, CudaStep step) {
  const auto needed = static_cast<int64_t>(step_scratch_bytes(p.rows, p.dim, state));
  void* scratch = nullptr;
  if (needed > 0) {
    require(t.scratch.has_value(), op, ": samples of ", p.dim, " elements need scratch of ", needed,
            " bytes, zeroed before the first step, got none");
    check_type(op, "scratch", *t.scratch, ScalarType::Byte);
    require(t.scratch->is_contiguous() && t.scratch->numel() >= needed, op, ": scratch must hold ",
            needed, " bytes, got ", t.scratch->numel());
    scratch = t.scratch->mutable_data_ptr();
  }
  const OnCuda device(op, t.x);
  const char* error = step(p, state, history, scratch, device.stream());
  require(error == nullptr, op, ": the CUDA launch failed: ", error ? error : "");
}

void run(const char* op, StepTensors& t, StepParams& p, CpuStep cpu_step,
         [[maybe_unused]] CudaStep cuda_step) {
  check_samples(op, t, p);
  const StateType state = state_type(t.x.scalar_type());
  const StateType history = state_type(t.columns_f.scalar_type());
  if (t.x.is_cuda()) return run_on_cuda(op, t, p, state, history, cuda_step);
  cpu_step(p, state, history, on_torch_threads);
}

#ifndef FPI_CUDA_ARCHS
// Never called: without them the ops are registered for the CPU alone.
constexpr CudaStep anderson_step_cuda = nullptr;
constexpr CudaStep broyden_step_cuda = nullptr;
#endif

void anderson_step_op(Tensor x, Tensor gx, std::optional<Tensor> sample_of, Tensor best,
                      Tensor anchor, Tensor f_previous, Tensor g_previous, Tensor columns_f,
                      Tensor columns_g, Tensor gram, Tensor control, Tensor atol, Tensor status,
                      Tensor num_steps, Tensor residual, double rtol, int64_t max_steps,
                      double beta, double ridge, std::optional<Tensor> scratch) {
  const char* op = "anderson_step_";
  StepTensors t{x,         gx,   sample_of, best, anchor, f_previous, g_previous, columns_f,
                columns_g, gram, control,   atol, status, num_steps,  residual,   scratch};
  StepParams p = checked_params(op, t, true);
  p.rtol = rtol;
  p.max_steps = max_steps;
  p.beta = beta;
  p.ridge = ridge;
  run(op, t, p, anderson_step_cpu, anderson_step_cuda);
}

void broyden_step_op(Tensor x, Tensor gx, std::optional<Tensor> sample_of, Tensor best,
                     Tensor anchor, Tensor f_previous, Tensor x_previous, Tensor columns_u,
                     Tensor columns_v, Tensor control, Tensor atol, Tensor status, Tensor num_steps,
                     Tensor residual, double rtol, int64_t max_steps, double beta,
                     std::optional<Tensor> scratch) {
  const char* op = "broyden_step_";
  StepTensors t{x,         gx,      sample_of, best, anchor, f_previous, x_previous, columns_u,
                columns_v, control, control,   atol, status, num_steps,  residual,   scratch};
  require(columns_u.dim() == 3 && columns_u.size(1) >= 1, op, ": depth must be at least 1");
  StepParams p = checked_params(op, t, false);
  p.rtol = rtol;
  p.max_steps = max_steps;
  p.beta = beta;
  run(op, t, p, broyden_step_cpu, broyden_step_cuda);
}

int64_t step_scratch_bytes_op(int64_t rows, int64_t dim, ScalarType dtype) {
  return static_cast<int64_t>(step_scratch_bytes(rows, dim, state_type(dtype)));
}

// Nothing is returned, so a fake run has nothing to do.
void anderson_step_meta(Tensor, Tensor, std::optional<Tensor>, Tensor, Tensor, Tensor, Tensor,
                        Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, double,
                        int64_t, double, double, std::optional<Tensor>) {}
void broyden_step_meta(Tensor, Tensor, std::optional<Tensor>, Tensor, Tensor, Tensor, Tensor,
                       Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, double, int64_t,
                       double, std::optional<Tensor>) {}

}  // namespace
}  // namespace fpi

STABLE_TORCH_LIBRARY_FRAGMENT(fpi_cuda, m) {
  m.def(
      "anderson_step_(Tensor(a!) x, Tensor gx, Tensor? sample_of, Tensor(b!) best, "
      "Tensor(l!) anchor, Tensor(c!) f_previous, Tensor(d!) g_previous, Tensor(e!) columns_f, "
      "Tensor(f!) columns_g, Tensor(g!) gram, Tensor(h!) control, Tensor atol, "
      "Tensor(i!) status, Tensor(j!) num_steps, Tensor(k!) residual, *, float rtol, "
      "int max_steps, float beta, float ridge, Tensor(m!)? scratch=None) -> ()");
  m.def(
      "broyden_step_(Tensor(a!) x, Tensor gx, Tensor? sample_of, Tensor(b!) best, "
      "Tensor(l!) anchor, Tensor(c!) f_previous, Tensor(d!) x_previous, Tensor(e!) columns_u, "
      "Tensor(f!) columns_v, Tensor(h!) control, Tensor atol, Tensor(i!) status, "
      "Tensor(j!) num_steps, Tensor(k!) residual, *, float rtol, int max_steps, "
      "float beta, Tensor(m!)? scratch=None) -> ()");
  m.def("step_scratch_bytes(int rows, int dim, ScalarType dtype) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CPU, m) {
  m.impl("anderson_step_", TORCH_BOX(&fpi::anderson_step_op));
  m.impl("broyden_step_", TORCH_BOX(&fpi::broyden_step_op));
}

#ifdef FPI_CUDA_ARCHS
STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CUDA, m) {
  m.impl("anderson_step_", TORCH_BOX(&fpi::anderson_step_op));
  m.impl("broyden_step_", TORCH_BOX(&fpi::broyden_step_op));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CompositeExplicitAutograd, m) {
  m.impl("step_scratch_bytes", TORCH_BOX(&fpi::step_scratch_bytes_op));
}

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, Meta, m) {
  m.impl("anderson_step_", TORCH_BOX(&fpi::anderson_step_meta));
  m.impl("broyden_step_", TORCH_BOX(&fpi::broyden_step_meta));
}

// The op that looks at samples which have stopped: schema, checks, and the CPU kernel behind it.
#include <torch/csrc/stable/library.h>

#include "array_checker.h"
#include "cpu/num_moved.h"
#include "on_cpu.h"

namespace fpi {
namespace {

int64_t num_moved_op(Tensor x, Tensor gx, Tensor status, Tensor residual, double rounding) {
  constexpr const char* kOp = "num_moved";
  const ScalarType type = x.scalar_type();
  require(x.dim() == 2, kOp, ": x must be (batch, dim), got ", x.sizes());
  require(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16,
          kOp, ": x must be float32, float64 or bfloat16, got ", torch::headeronly::toString(type));
  NumMovedParams p{};
  p.rows = x.size(0);
  p.dim = x.size(1);
  const ArrayChecker check{kOp, x};
  check.array("x", x, {p.rows, p.dim}, type);
  check.array("gx", gx, {p.rows, p.dim}, type);
  check.array("status", status, {p.rows}, ScalarType::Char);
  check.array("residual", residual, {p.rows}, ScalarType::Double);
  p.x = x.const_data_ptr();
  p.gx = gx.const_data_ptr();
  p.status = status.const_data_ptr<int8_t>();
  p.residual = residual.const_data_ptr<double>();
  p.rounding = rounding;
  return num_moved_cpu(p, state_type(type), on_torch_threads);
}

}  // namespace
}  // namespace fpi

STABLE_TORCH_LIBRARY_FRAGMENT(fpi_cuda, m) {
  m.def("num_moved(Tensor x, Tensor gx, Tensor status, Tensor residual, *, float rounding) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CPU, m) { m.impl("num_moved", TORCH_BOX(&fpi::num_moved_op)); }

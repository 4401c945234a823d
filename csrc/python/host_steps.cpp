#include "python/host_steps.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "common/control.h"
#include "common/small_solve.h"
#include "common/status.h"

namespace fpi {
namespace {

template <class T>
void put(T*& place, std::uintptr_t address) {
  place = reinterpret_cast<T*>(address);
}

std::int64_t bytes_of(StateType type) {
  switch (type) {
    case StateType::kFloat64: return 8;
    case StateType::kFloat32: return 4;
    default: return 2;
  }
}

}  // namespace

HostArrays::HostArrays(const HostSolve& solve) {
  constexpr std::int64_t kAlign = 64;
  size = 0;
  const auto next = [this](std::int64_t bytes) {
    const std::int64_t begin = size;
    size += (bytes + kAlign - 1) / kAlign * kAlign;
    return begin;
  };
  const bool wide = solve.state == StateType::kFloat64;
  const StateType compute = wide ? StateType::kFloat64 : StateType::kFloat32;
  const std::int64_t points = solve.batch * solve.dim;
  const bool apart = solve.depth && (solve.broyden || solve.history != compute);
  const std::int64_t history = points * solve.depth * bytes_of(solve.history);
  gram = next(solve.broyden ? 0 : solve.batch * gram_size(solve.depth) * 8);
  anchor = next(solve.depth ? points * bytes_of(solve.state) : 0);
  f_previous = next(apart ? points * bytes_of(compute) : 0);
  partner_previous = next(apart ? points * bytes_of(compute) : 0);
  columns_f = next(history);
  columns_g = next(history);
}

HostSteps::HostSteps(const HostSolve& solve, std::uintptr_t memory, std::uintptr_t scalars,
                     std::uintptr_t x, std::uintptr_t best, std::uintptr_t status,
                     std::uintptr_t num_steps, std::uintptr_t residual, std::uintptr_t atol,
                     double tolerance)
    : library_(library()), broyden_(solve.broyden), state_(solve.state), history_(solve.history) {
  if (!library_.host_step) throw std::runtime_error("host steps: the library has none");
  const HostArrays at(solve);
  // Null where it is empty.
  const auto array = [memory](std::int64_t begin, std::int64_t end) {
    return begin == end ? 0 : memory + begin;
  };
  StepParams& p = params_;
  put(p.x, x);
  put(p.best, best);
  put(p.anchor, array(at.anchor, at.f_previous));
  put(p.f_previous, array(at.f_previous, at.partner_previous));
  put(p.partner_previous, array(at.partner_previous, at.columns_f));
  put(p.columns_f, array(at.columns_f, at.columns_g));
  put(p.columns_g, array(at.columns_g, at.size));
  put(p.gram, array(at.gram, at.anchor));
  const std::uintptr_t tolerances_at = scalars + solve.batch * kControlSize * 8;
  put(p.control, scalars);
  put(p.atol, tolerances_at);
  put(p.status, status);
  put(p.num_steps, num_steps);
  put(p.residual, residual);
  p.rows = solve.batch;
  p.dim = solve.dim;
  p.depth = solve.depth;
  p.rtol = solve.rtol;
  p.max_steps = solve.max_steps;
  p.beta = solve.beta;
  p.ridge = solve.ridge;

  const std::int64_t batch = solve.batch;
  std::memcpy(p.best, p.x, batch * solve.dim * bytes_of(solve.state));
  std::memset(p.control, 0, batch * kControlSize * 8);
  std::memset(p.status, 0, batch);
  std::memset(p.num_steps, 0, batch * 4);
  std::fill_n(p.residual, batch, std::numeric_limits<double>::infinity());
  auto* const tolerances = reinterpret_cast<double*>(tolerances_at);
  if (atol) {
    std::memcpy(tolerances, reinterpret_cast<const void*>(atol), batch * 8);
  } else {
    std::fill_n(tolerances, batch, tolerance);
  }
}

std::int64_t HostSteps::step(std::uintptr_t gx) {
  put(params_.gx, gx);
  std::int64_t active = 0;
  const char* error = library_.host_step(&params_, broyden_, state_, history_, &active);
  if (error) throw std::runtime_error(std::string("host steps: ") + error);
  return active;
}

void HostSteps::gather(std::uintptr_t x, std::uintptr_t sample_of) {
  const std::int64_t size = params_.dim * bytes_of(state_);
  const char* from = static_cast<const char*>(params_.x);
  char* to = reinterpret_cast<char*>(x);
  auto* names = reinterpret_cast<std::int64_t*>(sample_of);
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < params_.rows; ++i, from += size) {
    const std::int64_t sample = params_.sample_of ? params_.sample_of[i] : i;
    if (params_.status[sample] != kActive) continue;
    std::memcpy(to, from, size);
    to += size;
    names[kept++] = sample;
  }
  put(params_.x, x);
  put(params_.sample_of, sample_of);
  params_.rows = kept;
}

}  // namespace fpi

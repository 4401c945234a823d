#include "python/host_steps.h"

#include <cstring>
#include <stdexcept>

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

HostSteps::HostSteps(bool broyden, StateType state, StateType history, const Arrays& arrays,
                     std::int64_t dim, int depth, double rtol, std::int64_t max_steps, double beta,
                     double ridge)
    : library_(library()), broyden_(broyden), state_(state), history_(history) {
  if (!library_.host_step) throw std::runtime_error("host steps: the library has none");
  StepParams& p = params_;
  put(p.best, arrays[0]);
  put(p.anchor, arrays[1]);
  put(p.f_previous, arrays[2]);
  put(p.partner_previous, arrays[3]);
  put(p.columns_f, arrays[4]);
  put(p.columns_g, arrays[5]);
  put(p.gram, arrays[6]);
  put(p.control, arrays[7]);
  put(p.atol, arrays[8]);
  put(p.status, arrays[9]);
  put(p.num_steps, arrays[10]);
  put(p.residual, arrays[11]);
  p.dim = dim;
  p.depth = depth;
  p.rtol = rtol;
  p.max_steps = max_steps;
  p.beta = beta;
  p.ridge = ridge;
}

void HostSteps::hold(std::uintptr_t x, std::uintptr_t sample_of, std::int64_t rows) {
  put(params_.x, x);
  put(params_.sample_of, sample_of);
  params_.rows = rows;
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
  hold(x, sample_of, kept);
}

}  // namespace fpi

// A solve by the step kernels of a map that couples nothing, with samples that test the rules.
#pragma once

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/common/control.h"
#include "../../csrc/common/status.h"
#include "../../csrc/cuda/scratch.h"
#include "../../csrc/cuda/step.h"
#include "../emulation/step_arrays.h"
#include "device_array.h"
#include "family.h"

#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/numeric.cuh"

enum class Solver { kAnderson, kBroyden };

struct StepCase {
  Solver solver;
  int64_t dim;
  int depth;             // 0 for Picard
  bool named = false;    // sample_of names the samples, and leaves out the stopped one
  bool shifted = false;  // no array is fit for vector accesses
  double scale = 1.0;    // of the map
  double beta = 1.0;
};

// Of the batch, by what becomes of them.
enum Sample : int64_t {
  kUsual,
  kNotFiniteOnce,
  kSolved,    // from the start
  kStopped,   // before the first step
  kRestless,  // its map never keeps still, and so it goes back to its anchor
};
constexpr int64_t kSamples = kRestless + 1;

constexpr int64_t kFirstEvaluation = 1, kBadEvaluation = 4;

// The map is x -> slope(k) x + term(sample, k), element by element, times a scale.
FPI_HD double slope(int64_t k) { return 0.7 - 0.2 * static_cast<double>(k % 7); }
FPI_HD double term(int64_t sample, int64_t k, int64_t evaluation) {
  if (sample == kSolved) return 0.0;
  const double sign = sample == kRestless && evaluation % 2 ? -1.0 : 1.0;
  return sign * (1.0 + static_cast<double>((31 * sample + 17 * k) % 13) / 13.0);
}

template <class S>
__global__ void map_kernel(const S* x, S* gx, const int64_t* sample_of, int64_t dim, double scale,
                           int64_t evaluation) {
  using C = typename fpi::Numeric<S>::Compute;
  const int64_t row = blockIdx.x;
  const int64_t sample = sample_of ? sample_of[row] : row;
  for (int64_t k = threadIdx.x; k < dim; k += blockDim.x) {
    C y = static_cast<C>(slope(k)) * fpi::widen(x[row * dim + k]) +
          static_cast<C>(scale * term(sample, k, evaluation));
    if (sample == kNotFiniteOnce && evaluation == kBadEvaluation && k == dim / 2) y = C(NAN);
    fpi::narrow(y, gx[row * dim + k]);
  }
}

// What the host makes of a stored number.
inline double on_host(float v) { return v; }
inline double on_host(double v) { return v; }
inline double on_host(fpi::BFloat16 v) { return __bfloat162float(v); }
inline double on_host(fpi::Float16 v) { return __half2float(v); }

template <class S>
S stored(double v) {
  if constexpr (std::is_same_v<S, fpi::BFloat16>)
    return __float2bfloat16_rn(static_cast<float>(v));
  else if constexpr (std::is_same_v<S, fpi::Float16>)
    return __float2half_rn(static_cast<float>(v));
  else
    return static_cast<S>(v);
}

template <class S>
constexpr fpi::StateType state_type() {
  if (std::is_same_v<S, double>) return fpi::StateType::kFloat64;
  if (std::is_same_v<S, fpi::BFloat16>) return fpi::StateType::kBFloat16;
  if (std::is_same_v<S, fpi::Float16>) return fpi::StateType::kFloat16;
  return fpi::StateType::kFloat32;
}

template <class S, class H>
class StepSolve {
 public:
  explicit StepSolve(const StepCase& c)
      : case_(c),
        samples_(c.named
                     ? std::vector<int64_t>{kRestless, kSolved, kUsual, kNotFiniteOnce}
                     : std::vector<int64_t>{kUsual, kNotFiniteOnce, kSolved, kStopped, kRestless}) {
    allocate();
  }

  // Everything as it is before the first step, in the memory that there is.
  void start() {
    start_[kStopped] = stored<S>(0.25 * case_.scale);
    std::vector<S> x, best;
    for (const int64_t sample : samples_) x.insert(x.end(), case_.dim, start_of(sample));
    for (int64_t s = 0; s < kSamples; ++s) best.insert(best.end(), case_.dim, start_of(s));
    std::vector<int8_t> status(kSamples, fpi::kActive);
    status[kStopped] = fpi::kMaxSteps;
    at(kX).put(x);
    at(kBest).put(best);
    at(kControl).zero();
    at(kAtol).put(std::vector<double>(kSamples, 0.0));
    at(kStatus).put(status);
    at(kNumSteps).zero();
    at(kResidual).put(std::vector<double>(kSamples, HUGE_VAL));
    at(kScratch).zero();
    if (case_.named) at(kSampleOf).put(samples_);
  }

  const char* evaluate(int64_t evaluation, void* stream = nullptr) {
    const fpi::StepParams p = params();
    constexpr int kThreads = 64;
    return fpi::launch(map_kernel<S>, p.rows, kThreads, 0, stream, static_cast<const S*>(p.x),
                       const_cast<S*>(static_cast<const S*>(p.gx)), p.sample_of, p.dim, case_.scale,
                       evaluation);
  }

  const char* step(void* stream = nullptr) {
    const auto run =
        case_.solver == Solver::kAnderson ? fpi::anderson_step_cuda : fpi::broyden_step_cuda;
    return run(params(), state_type<S>(), state_type<H>(), at(kScratch).data(), stream);
  }

  int kernels_of_a_step() const {
    const bool split = fpi::launch_config(case_.dim, sizeof(C)).shape == fpi::Shape::kSplit;
    return !split ? 1 : case_.solver == Solver::kAnderson ? 2 : 3;
  }

  // Lets the first phase of plain steps end with the second step, so that the others mix.
  void end_first_phase() {
    std::vector<double> control = at(kControl).template get<double>();
    for (int64_t s = 0; s < kSamples; ++s) {
      double& left = control[s * fpi::kControlSize + offsetof(fpi::Control, picard_left) / 8];
      if (left > 1.0) left = 1.0;
    }
    at(kControl).put(control);
  }

  // Whether each sample is where it should be after so many steps, whatever the solver.
  void verify(Family& family, int steps) {
    const auto x = at(kX).template get<S>();
    const auto status = at(kStatus).template get<int8_t>();
    const auto num_steps = at(kNumSteps).template get<int32_t>();
    const auto residual = at(kResidual).template get<double>();
    family.record(x);
    family.record(status);
    family.record(num_steps);
    family.record(residual);
    family.record(at(kBest).template get<S>());
    family.record(at(kControl).template get<double>());
    for (size_t row = 0; row < samples_.size(); ++row) {
      const int64_t sample = samples_[row];
      const std::string name = "sample " + std::to_string(sample) + ": ";
      const bool stopped = sample == kStopped, solved = sample == kSolved;
      const int counted = stopped ? 0 : solved ? 1 : steps;
      const bool ended = status[sample] == fpi::kConverged;
      family.expect(num_steps[sample] == counted || (ended && num_steps[sample] < steps),
                    name + "took " + std::to_string(num_steps[sample]) + " steps");
      family.expect(stopped  ? status[sample] == fpi::kMaxSteps
                    : solved ? ended
                             : ended || status[sample] == fpi::kActive,
                    name + "ended with status " + std::to_string(status[sample]));
      family.expect(stopped || std::isfinite(residual[sample]), name + "has no residual");
      family.expect(!solved || residual[sample] == 0.0, name + "has a residual");
      for (int64_t k = 0; k < case_.dim; ++k) {
        const double here = on_host(x[row * case_.dim + k]) / case_.scale;
        const std::string where = name + "element " + std::to_string(k) + " is ";
        family.expect(std::isfinite(here), where + "not finite");
        if (stopped) {
          family.expect(here == on_host(start_of(sample)) / case_.scale, name + "has moved");
        }
        if (sample != kUsual && sample != kNotFiniteOnce) continue;
        const double first = term(sample, k, kFirstEvaluation);
        const double left = std::abs((slope(k) - 1.0) * here + first) / std::abs(first);
        family.expect(left < 0.75, where + "not much nearer than at the start");
      }
    }
  }

  // The addresses that the device loop watches.
  const int8_t* status() const { return static_cast<int8_t*>(arrays_[kStatus].data()); }
  std::vector<int32_t> steps_taken() const { return arrays_[kNumSteps].template get<int32_t>(); }

 private:
  using C = typename fpi::Numeric<S>::Compute;

  DeviceArray& at(int array) { return arrays_[array]; }
  S start_of(int64_t sample) const { return start_[sample]; }

  // As fpi_cuda/solvers/workspace.py has it; what start() leaves out stays as it comes.
  void allocate() {
    const bool anderson = case_.solver == Solver::kAnderson;
    const int64_t rows = static_cast<int64_t>(samples_.size()), dim = case_.dim;
    const int64_t kept = case_.depth ? kSamples : 0;
    const bool in_slot = anderson && std::is_same_v<H, C>;
    const int64_t apart = in_slot ? 0 : kept;
    const int64_t columns = kSamples * case_.depth * dim;
    const auto take = [this](int array, int64_t count, size_t bytes_of_one) {
      const bool shifts = case_.shifted && array != kScratch;
      arrays_[array] = DeviceArray(count * bytes_of_one, shifts ? bytes_of_one : 0);
    };
    take(kX, rows * dim, sizeof(S));
    take(kGx, rows * dim, sizeof(S));
    take(kSampleOf, case_.named ? rows : 0, sizeof(int64_t));
    take(kBest, kSamples * dim, sizeof(S));
    take(kAnchor, kept * dim, sizeof(S));
    take(kFPrevious, apart * dim, sizeof(C));
    take(kPartner, apart * dim, sizeof(C));
    take(kColumnsF, columns, sizeof(H));
    take(kColumnsG, columns, sizeof(H));
    take(kGram, anderson ? kSamples * case_.depth * case_.depth : 0, sizeof(double));
    take(kControl, kSamples * fpi::kControlSize, sizeof(double));
    take(kAtol, kSamples, sizeof(double));
    take(kStatus, kSamples, sizeof(int8_t));
    take(kNumSteps, kSamples, sizeof(int32_t));
    take(kResidual, kSamples, sizeof(double));
    take(kScratch, fpi::step_scratch_bytes(rows, dim, state_type<S>()), 1);
  }

  fpi::StepParams params() {
    fpi::StepParams p = step_params_of([this](int array) { return at(array).data(); });
    p.rows = static_cast<int64_t>(samples_.size());
    p.dim = case_.dim;
    p.depth = case_.depth;
    p.rtol = 1e-4;
    p.max_steps = 60;
    p.beta = case_.beta;
    p.ridge = 1e-3;
    return p;
  }

  StepCase case_;
  std::vector<int64_t> samples_;  // by row
  S start_[kSamples] = {};        // every element of a sample
  DeviceArray arrays_[kStepArrays];
};

// The fused loops of lowered cells: every precision, wherever the arrays of a tile lie.
#include <cmath>
#include <string>
#include <vector>

#include "../../csrc/common/status.h"
#include "../../csrc/cuda/cell_loop.h"
#include "../emulation/cell_loop_arrays.h"
#include "families.h"

#include "device_array.h"

namespace {

using fpi::Activation;
using fpi::Precision;

struct LoopCase {
  int64_t batch, dim, hidden;  // one layer where hidden is 0
  int depth;
  int64_t max_steps;
  bool terms;       // every array that may be absent
  bool transposed;  // the weights lie by columns
  double carry;
  // Of the device, and of a block; 0 for what is there, and for what the plan likes.
  int64_t cores, shared_bytes;
  int slots, warps;
};

constexpr int64_t kNoWeights = 24 * 1024;   // bytes of shared memory that hold no weights
constexpr int64_t kNoOperands = 16 * 1024;  // and not every operand either
constexpr bool kTerms = true, kTransposed = true;

constexpr LoopCase kCases[] = {
    {5, 37, 0, 0, 12, false, false, 0.0, 0, 0, 0, 0},
    {29, 33, 21, 3, 12, kTerms, false, 0.0, 1, 0, 8, 0},
    {29, 33, 70, 2, 8, kTerms, kTransposed, 0.2, 2, kNoWeights, 16, 3},
    {9, 159, 450, 1, 4, false, kTransposed, 0.2, 1, kNoOperands, 8, 2},
    {70, 13, 0, 3, 12, kTerms, false, 0.0, 1, 0, 32, 4},
    {3, 700, 0, 0, 3, false, false, 0.0, 0, 0, 0, 0},
    {40, 159, 600, 3, 2, kTerms, false, 0.0, 0, 0, 0, 0},
};

constexpr int64_t kNotFinite = 1, kFar = 2;  // samples: from a NaN, from far off

double activated(Activation activation, double u) {
  switch (activation) {
    case Activation::kTanh: return std::tanh(u);
    case Activation::kRelu: return u < 0.0 ? 0.0 : u;
    case Activation::kSigmoid: return 1.0 / (1.0 + std::exp(-u));
    default: return u;
  }
}

// What rounded products may make of a residual, relative to the size of the point.
double slack(bool float64, Precision precision) {
  if (float64) return 1e-12;
  switch (precision) {
    case Precision::kTf32: return 5e-3;
    case Precision::kBf16: return 4e-2;
    default: return 1e-5;
  }
}

// From -1 to 1, the same in every run.
class Noise {
 public:
  double operator()() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(state_ >> 33) / static_cast<double>(1u << 30) - 1.0;
  }

 private:
  uint64_t state_ = 1;
};

template <class T>
class LoopSolve {
 public:
  LoopSolve(const LoopCase& c, Precision precision) : case_(c) {
    const int64_t batch = c.batch, dim = c.dim, hidden = c.hidden;
    fill(kX, batch * dim, 1.0);
    for (int64_t k = 0; k < dim; ++k) host_[kX][kFar * dim + k] *= 1000;
    host_[kX][kNotFinite * dim + dim / 2] = static_cast<T>(NAN);
    if (c.terms) fill(kXFactor, batch * dim, 1.0);
    fill_layer(kLayer1, hidden ? hidden : dim, dim);
    if (hidden) fill_layer(kLayer2, dim, hidden);
    device_[kAtol] = DeviceArray(batch * sizeof(double));
    device_[kStatus] = DeviceArray(batch * sizeof(int8_t));
    device_[kNumSteps] = DeviceArray(batch * sizeof(int32_t));
    device_[kResidual] = DeviceArray(batch * sizeof(double));
    for (int array : {kAtol, kStatus, kNumSteps, kResidual}) device_[array].zero();
    for (int array = 0; array < kCellLoopArrays; ++array) {
      if (host_[array].empty()) continue;
      device_[array] = DeviceArray(host_[array].size() * sizeof(T));
      device_[array].put(host_[array]);
    }
    p_ = cell_loop_params_of([this](int array) { return device_[array].data(); }, batch, dim,
                             hidden);
    for (int l = 0; l < p_.num_layers; ++l) {
      fpi::CellLayer& layer = p_.layers[l];
      layer.output_stride = c.transposed ? 1 : layer.inputs;
      layer.input_stride = c.transposed ? layer.outputs : 1;
      layer.activation = l + 1 < p_.num_layers ? Activation::kRelu
                         : c.carry != 0.0      ? Activation::kIdentity
                         : hidden              ? Activation::kSigmoid
                                               : Activation::kTanh;
    }
    p_.depth = c.depth;
    p_.max_steps = c.max_steps;
    p_.carry = c.carry;
    p_.rtol = slack(kFloat64, precision);
    p_.beta = 1.0;
    p_.ridge = 1e-3;
    p_.precision = precision;
  }

  void run(Family& family) {
    fpi::DeviceLimits limits{};
    family.launched(fpi::device_limits(limits), 0);
    family.expect(case_.shared_bytes <= limits.shared_bytes, "the device has less shared memory");
    if (case_.cores) limits.cores = case_.cores;
    if (case_.shared_bytes) limits.shared_bytes = case_.shared_bytes;
    const fpi::CellLoopPlan plan =
        fpi::cell_loop_plan(p_, kState, limits, case_.slots, case_.warps);
    family.expect(plan.shared_bytes <= limits.shared_bytes, "the plan wants more than there is");
    family.expect(!case_.shared_bytes || !plan.resident, "the weights should be streamed");
    family.expect(case_.shared_bytes != kNoOperands || !plan.operand[1].shared,
                  "the second operand should lie in the workspace");
    const DeviceArray workspace(plan.workspace_bytes);
    family.launched(fpi::cell_loop_cuda(p_, kState, plan, workspace.data(), nullptr), 2);
    check_cuda(cudaDeviceSynchronize(), "a loop");
    verify(family);
  }

 private:
  static constexpr bool kFloat64 = sizeof(T) == 8;
  static constexpr auto kState = kFloat64 ? fpi::StateType::kFloat64 : fpi::StateType::kFloat32;

  void fill(int array, int64_t count, double size) {
    for (int64_t i = 0; i < count; ++i) host_[array].push_back(static_cast<T>(size * noise_()));
  }

  // The weight's norm is about 0.6, by its size.
  void fill_layer(int first, int64_t outputs, int64_t inputs) {
    const double wide =
        std::sqrt(static_cast<double>(outputs)) + std::sqrt(static_cast<double>(inputs));
    fill(first, outputs * inputs, 0.6 * std::sqrt(3.0) / wide);
    fill(first + 2, case_.batch * outputs, 1.0);
    if (!case_.terms) return;
    fill(first + 1, outputs, 1.0);
    fill(first + 3, case_.batch * outputs, 1.0);
  }

  // ||g(x) - x|| and ||g(x)|| at a point of one sample.
  void measure(const T* x, int64_t sample, double& residual, double& size) const {
    std::vector<double> h(x, x + p_.dim);
    const std::vector<T>& x_factor = host_[kXFactor];
    for (int64_t k = 0; k < p_.dim && !x_factor.empty(); ++k) {
      h[k] *= x_factor[sample * p_.dim + k];
    }
    for (int l = 0; l < p_.num_layers; ++l) {
      const fpi::CellLayer& layer = p_.layers[l];
      const std::vector<T>* arrays = host_ + (l ? kLayer2 : kLayer1);
      std::vector<double> y(layer.outputs);
      for (int64_t j = 0; j < layer.outputs; ++j) {
        for (int64_t k = 0; k < layer.inputs; ++k) {
          y[j] += h[k] * arrays[0][j * layer.output_stride + k * layer.input_stride];
        }
        const int64_t at = sample * layer.outputs + j;
        y[j] += (arrays[1].empty() ? 0.0 : arrays[1][j]) + arrays[2][at];
        y[j] = activated(layer.activation, y[j]) * (arrays[3].empty() ? 1.0 : arrays[3][at]);
      }
      h = y;
    }
    double off = 0.0, all = 0.0;
    for (int64_t k = 0; k < p_.dim; ++k) {
      const double g = h[k] + p_.carry * x[k];
      off += (g - x[k]) * (g - x[k]);
      all += g * g;
    }
    residual = std::sqrt(off);
    size = std::sqrt(all);
  }

  // The residual that the device tells of must be that of the point that it returns.
  void verify(Family& family) const {
    const auto x = device_[kX].template get<T>();
    const auto status = device_[kStatus].template get<int8_t>();
    const auto num_steps = device_[kNumSteps].template get<int32_t>();
    const auto residual = device_[kResidual].template get<double>();
    family.record(x);
    family.record(status);
    family.record(num_steps);
    family.record(residual);
    for (int64_t sample = 0; sample < p_.batch; ++sample) {
      const std::string name = "sample " + std::to_string(sample) + ": ";
      const int ended = status[sample];
      if (sample == kNotFinite) {
        family.expect(ended == fpi::kNonfinite && num_steps[sample] == 1, name + "is no NaN");
        continue;
      }
      family.expect(ended == fpi::kConverged || ended == fpi::kMaxSteps,
                    name + "ended with status " + std::to_string(ended));
      family.expect(num_steps[sample] >= 1 && num_steps[sample] <= p_.max_steps,
                    name + "took " + std::to_string(num_steps[sample]) + " steps");
      double expected, size;
      measure(x.data() + sample * p_.dim, sample, expected, size);
      family.expect(std::abs(residual[sample] - expected) <= slack(kFloat64, p_.precision) * size,
                    name + "its residual is " + std::to_string(expected) + ", not " +
                        std::to_string(residual[sample]));
    }
  }

  LoopCase case_;
  Noise noise_;
  std::vector<T> host_[kCellLoopArrays];  // of the map and x; empty for what is absent
  DeviceArray device_[kCellLoopArrays];
  fpi::CellLoopParams p_;
};

template <class T>
void solve_all(Family& family, Precision precision) {
  for (const LoopCase& c : kCases) {
    family.begin("batch " + std::to_string(c.batch) + ", dim " + std::to_string(c.dim) +
                 ", hidden " + std::to_string(c.hidden) + ", depth " + std::to_string(c.depth));
    LoopSolve<T>(c, precision).run(family);
  }
}

}  // namespace

void cell_loop_float64(Family& f) { solve_all<double>(f, Precision::kIeee); }
void cell_loop_float32(Family& f) { solve_all<float>(f, Precision::kIeee); }
void cell_loop_tf32x3(Family& f) { solve_all<float>(f, Precision::kTf32x3); }
void cell_loop_tf32(Family& f) { solve_all<float>(f, Precision::kTf32); }
void cell_loop_bf16(Family& f) { solve_all<float>(f, Precision::kBf16); }

// The step kernels: every dtype by every shape of launch.
#include "families.h"
#include "step_solve.cuh"

namespace {

constexpr int64_t kWarp = 132;  // elements at most, where one has the sample
constexpr int64_t kBlock = 5000;
constexpr int64_t kSplit = 16384 + 37;
constexpr int64_t kSplitByFours = 16384 + 36;
constexpr auto kAnderson = Solver::kAnderson;
constexpr auto kBroyden = Solver::kBroyden;

template <class S, class H = S>
void solve(Family& family, const StepCase& c) {
  const int steps = c.depth > 5 ? 12 : c.dim > kWarp ? 6 : 9;
  family.begin(std::to_string(8 * sizeof(S)) + " bits, history of " +
               std::to_string(8 * sizeof(H)) + ", dim " + std::to_string(c.dim) + ", depth " +
               std::to_string(c.depth));
  StepSolve<S, H> solve(c);
  solve.start();
  for (int number = kFirstEvaluation; number <= steps; ++number) {
    family.launched(solve.evaluate(number), 1);
    family.launched(solve.step(), solve.kernels_of_a_step());
    check_cuda(cudaDeviceSynchronize(), "a step");
    if (number == kFirstEvaluation) solve.end_first_phase();
  }
  solve.verify(family, steps);
}

constexpr bool kNamed = true, kShifted = true;

}  // namespace

void picard(Family& f) {
  solve<double>(f, {kAnderson, 33, 0});
  solve<float>(f, {kAnderson, 777, 0, kNamed, false, 1.0, 0.8});
  solve<fpi::BFloat16>(f, {kAnderson, kBlock, 0});
  solve<fpi::Float16>(f, {kAnderson, kSplit, 0});
}

void anderson_warp(Family& f) {
  solve<float>(f, {kAnderson, 1, 1});
  solve<float>(f, {kAnderson, 31, 16, kNamed, false, 1.0, 0.8});
  solve<float>(f, {kAnderson, 132, 3, false, kShifted, 1e-20});
  solve<double>(f, {kAnderson, 31, 3, kNamed});
  solve<fpi::BFloat16>(f, {kAnderson, 33, 5});
  solve<fpi::Float16>(f, {kAnderson, 129, 3, false, false, 1.0, 0.8});
  solve<float, fpi::BFloat16>(f, {kAnderson, 132, 3, kNamed});
}

void anderson_block(Family& f) {
  solve<float>(f, {kAnderson, 777, 3});
  solve<double>(f, {kAnderson, kBlock, 5, kNamed, false, 1.0, 0.8});
  solve<fpi::BFloat16>(f, {kAnderson, kBlock, 1, false, kShifted});
  solve<fpi::Float16>(f, {kAnderson, 777, 3, kNamed});
  solve<float, fpi::BFloat16>(f, {kAnderson, kBlock, 3});
}

void anderson_split(Family& f) {
  solve<float>(f, {kAnderson, kSplit, 3, false, false, 1e-20});
  solve<double>(f, {kAnderson, kSplitByFours, 1});
  solve<fpi::BFloat16>(f, {kAnderson, kSplitByFours, 3, kNamed, false, 1.0, 0.8});
  solve<fpi::Float16>(f, {kAnderson, kSplit, 1});
  solve<float, fpi::BFloat16>(f, {kAnderson, kSplitByFours, 3, false, kShifted});
}

void broyden_warp(Family& f) {
  solve<float>(f, {kBroyden, 1, 1});
  solve<float>(f, {kBroyden, 132, 16, kNamed});
  solve<double>(f, {kBroyden, 31, 3, false, kShifted});
  solve<fpi::BFloat16>(f, {kBroyden, 33, 5});
}

void broyden_block(Family& f) {
  solve<float>(f, {kBroyden, 777, 3, kNamed});
  solve<double>(f, {kBroyden, kBlock, 3, false, false, 1e-170});
  solve<fpi::BFloat16>(f, {kBroyden, kBlock, 3, false, kShifted});
}

void broyden_split(Family& f) {
  solve<float>(f, {kBroyden, kSplit, 3, false, false, 1e-20});
  solve<double>(f, {kBroyden, kSplitByFours, 1, kNamed});
  solve<fpi::Float16>(f, {kBroyden, kSplit, 3});
}

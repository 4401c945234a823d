// Runs steps of the CUDA kernels under emulation for tests/emulation/emulated.py: reads requests on stdin,
// answers on stdout.
//
// A request: the int64 words of kWords, the doubles {rtol, beta, ridge}, then every array of
// StepArray as an int64 of bytes and the bytes themselves. The answer: an int64 of text, the text
// (what the launcher returned, empty for none), and the arrays likewise; to kScratchBytes, one
// int64.
#include "../../csrc/cuda/scratch.h"
#include "../../csrc/cuda/step.h"
#include "messages.h"
#include "step_arrays.h"

#include "cuda_runtime.h"  // last: its __noinline__ is another one than the standard library's

namespace {

enum Op : int64_t { kAnderson, kBroyden, kScratchBytes };
enum Word { kOp, kSeed, kState, kHistory, kRows, kDim, kDepth, kMaxSteps, kOffset, kWords };

}  // namespace

int main() {
  int64_t words[kWords];
  double reals[3];
  while (read(words, sizeof words)) {
    if (!read(reals, sizeof reals)) fail("cut short");
    std::vector<Memory> arrays(kStepArrays);
    // The offset makes the arrays of the state unfit for vector accesses.
    for (int a = 0; a < kStepArrays; ++a) read_array(arrays[a], a == kX ? words[kOffset] : 0);
    const auto state = static_cast<fpi::StateType>(words[kState]);
    const auto history = static_cast<fpi::StateType>(words[kHistory]);
    fpi::StepParams p =
        step_params_of([&arrays](int a) { return static_cast<void*>(arrays[a].data()); });
    p.rows = words[kRows];
    p.dim = words[kDim];
    p.depth = static_cast<int32_t>(words[kDepth]);
    p.max_steps = words[kMaxSteps];
    p.rtol = reals[0];
    p.beta = reals[1];
    p.ridge = reals[2];
    emulation::set_seed(static_cast<unsigned>(words[kSeed]));

    if (words[kOp] == kScratchBytes) {
      const int64_t bytes = fpi::step_scratch_bytes(p.rows, p.dim, state);
      write(&bytes, sizeof bytes);
      std::fflush(stdout);
      continue;
    }
    const auto step = words[kOp] == kAnderson ? fpi::anderson_step_cuda : fpi::broyden_step_cuda;
    const char* error = step(p, state, history, arrays[kScratch].data(), nullptr);
    write_text(error);
    write_arrays(arrays);
    std::fflush(stdout);
  }
  return 0;
}

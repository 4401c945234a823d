// Runs steps of the CUDA kernels under emulation for tests/emulated.py: reads requests on stdin,
// answers on stdout.
//
// A request: the int64 words of kWords, the doubles {rtol, beta, ridge}, then every array of
// kArrays as an int64 of bytes and the bytes themselves. The answer: an int64 of text, the text
// (what the launcher returned, empty for none), and the arrays likewise; to kScratchBytes, one
// int64.
#include "../../csrc/cuda/scratch.h"
#include "../../csrc/cuda/step.h"
#include "messages.h"

#include "cuda_runtime.h"  // last: its __noinline__ is another one than the standard library's

namespace {

enum Op : int64_t { kAnderson, kBroyden, kScratchBytes };
enum Word { kOp, kSeed, kState, kHistory, kRows, kDim, kDepth, kMaxSteps, kOffset, kWords };
enum Array {
  kX, kGx, kSampleOf, kBest, kAnchor, kFPrevious, kPartner, kColumnsF, kColumnsG, kGram, kControl,
  kAtol, kStatus, kNumSteps, kResidual, kScratch, kArrays,
};

}  // namespace

int main() {
  int64_t words[kWords];
  double reals[3];
  while (read(words, sizeof words)) {
    if (!read(reals, sizeof reals)) fail("cut short");
    std::vector<Memory> arrays(kArrays);
    // The offset makes the arrays of the state unfit for vector accesses.
    for (int a = 0; a < kArrays; ++a) read_array(arrays[a], a == kX ? words[kOffset] : 0);
    const auto state = static_cast<fpi::StateType>(words[kState]);
    const auto history = static_cast<fpi::StateType>(words[kHistory]);
    fpi::StepParams p{};
    p.x = arrays[kX].data();
    p.gx = arrays[kGx].data();
    p.sample_of = reinterpret_cast<int64_t*>(arrays[kSampleOf].data());
    p.best = arrays[kBest].data();
    p.anchor = arrays[kAnchor].data();
    p.f_previous = arrays[kFPrevious].data();
    p.partner_previous = arrays[kPartner].data();
    p.columns_f = arrays[kColumnsF].data();
    p.columns_g = arrays[kColumnsG].data();
    p.gram = reinterpret_cast<double*>(arrays[kGram].data());
    p.control = reinterpret_cast<double*>(arrays[kControl].data());
    p.atol = reinterpret_cast<double*>(arrays[kAtol].data());
    p.status = reinterpret_cast<int8_t*>(arrays[kStatus].data());
    p.num_steps = reinterpret_cast<int32_t*>(arrays[kNumSteps].data());
    p.residual = reinterpret_cast<double*>(arrays[kResidual].data());
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
    const auto step =
        words[kOp] == kAnderson ? fpi::anderson_step_cuda : fpi::broyden_step_cuda;
    const char* error = step(p, state, history, arrays[kScratch].data(), nullptr);
    write_text(error);
    write_arrays(arrays);
    std::fflush(stdout);
  }
  return 0;
}

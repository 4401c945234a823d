// Runs steps of the CUDA kernels under emulation for tests/emulated.py: reads requests on stdin,
// answers on stdout. Arrays live in blocks of their exact size, so that ASan sees each one's ends.
//
// A request: the int64 words of kWords, the doubles {rtol, beta, ridge}, then every array of
// kArrays as an int64 of bytes and the bytes themselves. The answer: an int64 of text, the text
// (what the launcher returned, empty for none), and the arrays likewise; to kScratchBytes, one
// int64.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cuda/scratch.h"
#include "../../csrc/cuda/step.h"
#include "cuda_runtime.h"

namespace {

enum Op : int64_t { kAnderson, kBroyden, kScratchBytes };
enum Word { kOp, kSeed, kState, kHistory, kRows, kDim, kDepth, kMaxSteps, kOffset, kWords };
enum Array {
  kX, kGx, kSampleOf, kBest, kAnchor, kFPrevious, kPartner, kColumnsF, kColumnsG, kGram, kControl,
  kAtol, kStatus, kNumSteps, kResidual, kScratch, kArrays,
};

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "driver: %s\n", what);
  std::exit(2);
}

bool read(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }
void write(const void* from, size_t bytes) {
  if (std::fwrite(from, 1, bytes, stdout) != bytes) fail("cannot write");
}

// `offset` bytes into an aligned block that ends where the array does; null where it is empty.
struct Memory {
  std::unique_ptr<char[]> block;
  int64_t bytes = 0;
  int64_t offset = 0;
  char* data() const { return bytes ? block.get() + offset : nullptr; }
};

void read_array(Memory& m, int64_t offset) {
  if (!read(&m.bytes, sizeof m.bytes)) fail("cut short");
  m.offset = offset;
  m.block.reset(new char[m.bytes + offset]);
  if (!read(m.block.get() + offset, m.bytes)) fail("cut short");
}

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
    const std::string text = error ? error : "";
    const int64_t length = static_cast<int64_t>(text.size());
    write(&length, sizeof length);
    write(text.data(), text.size());
    for (const Memory& m : arrays) {
      write(&m.bytes, sizeof m.bytes);
      if (m.bytes) write(m.data(), m.bytes);
    }
    std::fflush(stdout);
  }
  return 0;
}

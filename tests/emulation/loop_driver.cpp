// Runs the CUDA loop of lowered cells under emulation for tests/emulation/emulated_loop.py: reads requests on
// stdin, answers on stdout.
//
// A request: the int64 words of kWords, the doubles {carry, rtol, beta, ridge}, then every array of
// CellLoopArray as an int64 of bytes and the bytes themselves; a layer's weight begins at its first
// element. The answer: an int64 of text, the text (what the launcher returned, empty for none), the
// arrays likewise, and the int64s of kAnswers.
#include <cstring>

#include "../../csrc/common/control.h"
#include "../../csrc/cuda/cell_loop.h"
#include "cell_loop_arrays.h"
#include "messages.h"

#include "cuda_runtime.h"  // last: its __noinline__ is another one than the standard library's

namespace {

enum Word {
  kSeed,
  kFloat64,
  kPrecision,
  kBatch,
  kDim,
  kHidden,
  kActivation1,
  kActivation2,
  kDepth,
  kMaxSteps,
  kOutputStride1,
  kInputStride1,
  kOutputStride2,
  kInputStride2,
  kCores,
  kSharedBytes,
  kSlots,
  kWarps,
  kWords,
};
enum Answer { kTile, kBlocks, kResident, kOperandShared, kHistoryShared, kAnswers };

}  // namespace

int main() {
  int64_t words[kWords];
  double reals[4];
  while (read(words, sizeof words)) {
    if (!read(reals, sizeof reals)) fail("cut short");
    std::vector<Memory> arrays(kCellLoopArrays);
    for (Memory& array : arrays) read_array(array, 0);
    const int64_t dim = words[kDim], hidden = words[kHidden];
    fpi::CellLoopParams p =
        cell_loop_params_of([&arrays](int a) { return static_cast<void*>(arrays[a].data()); },
                            words[kBatch], dim, hidden);
    for (int l = 0; l < p.num_layers; ++l) {
      fpi::CellLayer& layer = p.layers[l];
      layer.output_stride = words[l ? kOutputStride2 : kOutputStride1];
      layer.input_stride = words[l ? kInputStride2 : kInputStride1];
      layer.activation = static_cast<fpi::Activation>(words[l ? kActivation2 : kActivation1]);
    }
    p.depth = static_cast<int32_t>(words[kDepth]);
    p.max_steps = words[kMaxSteps];
    p.carry = reals[0];
    p.rtol = reals[1];
    p.beta = reals[2];
    p.ridge = reals[3];
    p.precision = static_cast<fpi::Precision>(words[kPrecision]);
    const auto state = words[kFloat64] ? fpi::StateType::kFloat64 : fpi::StateType::kFloat32;
    const fpi::CellLoopPlan plan =
        fpi::cell_loop_plan(p, state, {words[kCores], words[kSharedBytes]},
                            static_cast<int>(words[kSlots]), static_cast<int>(words[kWarps]));
    if (plan.shared_bytes > words[kSharedBytes]) fail("more shared memory than the device has");
    // NaNs, so that what nobody wrote is seen in the results.
    const auto bytes = static_cast<size_t>(plan.workspace_bytes);
    const std::unique_ptr<void, void (*)(void*)> workspace(std::aligned_alloc(128, bytes),
                                                           std::free);
    std::memset(workspace.get(), 0xff, bytes);
    emulation::set_seed(static_cast<unsigned>(words[kSeed]));
    write_text(fpi::cell_loop_cuda(p, state, plan, workspace.get(), nullptr));
    write_arrays(arrays);
    const int64_t answers[kAnswers] = {plan.slots, plan.blocks, plan.resident,
                                       plan.operand[0].shared, plan.columns_g.shared};
    write(answers, sizeof answers);
    std::fflush(stdout);
  }
  return 0;
}

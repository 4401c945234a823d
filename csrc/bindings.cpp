// The ops of torch.ops.fpi_cuda, on the LibTorch stable ABI: no Python, no c10.
#include <string>

#include <torch/csrc/stable/library.h>

#include "common/activation.h"
#include "interface.h"

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

// What was built, as lines "key=value"; setup.py defines one of the two CUDA macros.
std::string build_info() {
  std::string info = "interface=" + std::to_string(fpi::kInterface);
  info += std::string("\ncompiler=") + kCompiler;
  info += "\ntorch_headers=" TORCH_VERSION;
  info += "\ntorch_target=" + std::to_string(TORCH_TARGET_VERSION >> 56) + "." +
          std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
#ifdef FPI_CUDA_ARCHS
  info += "\ncuda=" FPI_CUDA_ARCHS;
#else
  info += "\nno_cuda=" FPI_NO_CUDA;
#endif
  return info;
}

}  // namespace

STABLE_TORCH_LIBRARY(fpi_cuda, m) { m.def("build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fpi_cuda, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}

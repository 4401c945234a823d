// Runs every CUDA kernel of the library a few times on awkward sizes, without torch: short enough
// for all tools of compute-sanitizer on a GPU, and under ASan in the emulation of tests/emulation.
// Built by .ci/build_sanitize_driver.py; for the emulation by tests/project/test_sanitize_driver.py.
//
//   sanitize_kernels [--list] [--only NAME]   of a family, or of those that begin so
//
// One line for each family; the digests are those of the results, the same in every run and under
// every tool. Exits with
// 1 where a launch fails or a result is wrong, with 2 where the options are.
#include <cstring>

#include "families.h"

namespace {

struct Entry {
  const char* name;
  void (*run)(Family&);
};

constexpr Entry kFamilies[] = {
    {"picard", picard},
    {"anderson_warp", anderson_warp},
    {"anderson_block", anderson_block},
    {"anderson_split", anderson_split},
    {"broyden_warp", broyden_warp},
    {"broyden_block", broyden_block},
    {"broyden_split", broyden_split},
    {"cell_loop_float64", cell_loop_float64},
    {"cell_loop_float32", cell_loop_float32},
    {"cell_loop_tf32x3", cell_loop_tf32x3},
    {"cell_loop_tf32", cell_loop_tf32},
    {"cell_loop_bf16", cell_loop_bf16},
#ifdef __CUDACC__
    {"device_loop", device_loop},
#endif
};

// "broyden" stands for broyden_warp and its like.
bool stands_for(const char* text, const char* name) {
  const size_t length = std::strlen(text);
  return std::strncmp(name, text, length) == 0 && (name[length] == '\0' || name[length] == '_');
}

}  // namespace

int main(int count, char** arguments) {
  bool list = false;
  const char* only = nullptr;
  for (int i = 1; i < count; ++i) {
    const bool last = i + 1 == count;
    if (std::strcmp(arguments[i], "--list") == 0) {
      list = true;
    } else if (std::strcmp(arguments[i], "--only") == 0 && !last) {
      only = arguments[++i];
    } else {
      std::fprintf(stderr, "usage: sanitize_kernels [--list] [--only NAME]\n");
      return 2;
    }
  }
  int families = 0, launches = 0;
  for (const Entry& entry : kFamilies) {
    if (only && !stands_for(only, entry.name)) continue;
    ++families;
    if (list) {
      std::printf("%s\n", entry.name);
      continue;
    }
    Family family(entry.name);
    entry.run(family);
    family.report();
    launches += family.launches();
  }
  if (families == 0) {
    std::fprintf(stderr, "sanitize_kernels: no such family; --list names them\n");
    return 2;
  }
  if (!list) std::printf("%d launches ok\n", launches);
  return 0;
}

// Prints the launch for each size on the command line; the first argument is bytes of a number.
#include "../../csrc/cuda/launch_config.h"

#include <cstdio>
#include <cstdlib>

int main(int count, char** arguments) {
  const size_t bytes = std::strtoull(arguments[1], nullptr, 10);
  for (int i = 2; i < count; ++i) {
    const int64_t dim = std::strtoll(arguments[i], nullptr, 10);
    const fpi::LaunchConfig c = fpi::launch_config(dim, bytes);
    std::printf("%d %d %d %lld %d\n", static_cast<int>(c.shape), c.threads, c.parts,
                static_cast<long long>(c.tiles_per_part), fpi::tile_elements(bytes));
  }
}

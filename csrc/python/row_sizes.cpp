#include "python/row_sizes.h"

#include <cmath>
#include <limits>

namespace fpi {

std::pair<double, double> row_sizes(std::uintptr_t rows, std::int64_t batch, std::int64_t dim,
                                    double factor, std::uintptr_t scaled_norms) {
  const auto* row = reinterpret_cast<const float*>(rows);
  auto* const norms = reinterpret_cast<double*>(scaled_norms);
  double least = std::numeric_limits<double>::infinity(), largest = 0.0;
  for (std::int64_t i = 0; i < batch; ++i, row += dim) {
    // Squares of float32 neither overflow nor vanish in double.
    double most = 0.0, squares = 0.0;
    for (std::int64_t j = 0; j < dim; ++j) {
      const double size = std::fabs(static_cast<double>(row[j]));
      if (size > most) most = size;
      squares += size * size;
    }
    norms[i] = factor * std::sqrt(squares);
    if (std::isnan(squares)) most = squares;
    if (most < least) least = most;
    if (!(most <= largest) && !std::isnan(largest)) largest = most;
  }
  return {least, largest};
}

}  // namespace fpi

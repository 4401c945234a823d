// fpi_cuda._C.row_sizes: what a look at a few rows tells.
#pragma once

#include <cstdint>
#include <utility>

namespace fpi {

// The largest number, by size, of the row (batch, dim) where that is least, and of all rows; NaN is
// larger than any. scaled_norms (batch,) get `factor` times the norm of each row.
std::pair<double, double> row_sizes(std::uintptr_t rows, std::int64_t batch, std::int64_t dim,
                                    double factor, std::uintptr_t scaled_norms);

}  // namespace fpi

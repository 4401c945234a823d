// What Python and the two compiled files rely on.
#pragma once

namespace fpi {

// Raised with every change to the ops' schemas, the functions of the files api.h, the classes of
// fpi_cuda._C, or what their arguments mean, here and in fpi_cuda/_extension.py.
constexpr int kInterface = 5;

}  // namespace fpi

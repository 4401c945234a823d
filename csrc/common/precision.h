// How the products of a fused loop are computed. The order is that of fpi_cuda.precision.NAMES.
#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

namespace fpi {

// Of a product's operands; sums are float32 but for float64 states, which are always kIeee.
enum class Precision : int64_t {
  kIeee,    // as they are
  kTf32x3,  // in two parts each, of which the three larger products are summed
  kTf32,    // to 10 bits after the leading one
  kBf16,    // to 7
};
constexpr int64_t kPrecisions = 4;

FPI_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FPI_HD float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// To nearest, ties away from zero, as the conversion of the devices rounds; a NaN stays one.
FPI_HD float round_tf32(float value) {
  const float rounded = float_of((bits_of(value) + 0x1000u) & 0xffffe000u);
  return value == value ? rounded : value;
}

// To nearest, ties to even; a NaN stays one.
FPI_HD float round_bf16(float value) {
  const uint32_t bits = bits_of(value);
  const float rounded = float_of((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
  return value == value ? rounded : value;
}

}  // namespace fpi

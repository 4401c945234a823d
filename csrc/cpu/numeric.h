// Number types of the CPU kernels: what is stored, and what is computed in.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
// One portable build that still uses the wide registers of the machine it runs on. By features:
// "arch=haswell" would ask for that very model, and no other vendor's.
#define FPI_WIDE_TARGETS
#if __GNUC__ >= 12
#define FPI_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FPI_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define FPI_CLONES
#endif
#define FPI_INLINE inline __attribute__((always_inline))

namespace fpi {

struct BFloat16 {
  uint16_t bits;
  FPI_INLINE operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  BFloat16() = default;
  FPI_INLINE explicit BFloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    const bool nan = (wide & 0x7fffffffu) > 0x7f800000u;
    // Round to nearest, ties to even; a NaN stays one.
    const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
  }
};

template <class T>
struct Numeric {
  using Compute = T;
  static constexpr double kEpsilon = std::numeric_limits<T>::epsilon();
};
template <>
struct Numeric<BFloat16> {
  using Compute = float;
  static constexpr double kEpsilon = 0.0078125;
};

}  // namespace fpi

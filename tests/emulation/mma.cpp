// Products on tensor cores: what each lane gives is put into two matrices by PTX's tables of
// fragments, multiplied, and handed back.
#include <cstdio>
#include <cstdlib>

#include "../../csrc/common/precision.h"
#include "cuda_runtime.h"

namespace emulation {
namespace {

constexpr int kRows = 16, kColumns = 8, kMostDepth = 16;

struct Fragments {
  unsigned a[4], b[2];
};

// Devices read tf32 operands without the bits that the format lacks.
float read_tf32(unsigned bits) {
  if (bits & 0x1fffu) {
    std::fprintf(stderr, "emulation: an operand that was not rounded to tf32\n");
    std::abort();
  }
  return fpi::float_of(bits);
}

float read_bf16(unsigned bits, int half) {
  return fpi::float_of(half ? bits & 0xffff0000u : bits << 16);
}

// read(a, b, lane, its fragments) fills a (16, depth) and b (depth, 8): here as far as this lane's
// own sums need them.
template <class Read>
void multiply(float (&sum)[4], const Fragments& own, int depth, Read&& read) {
  Fragments all[32];
  exchange_all(&own, all, sizeof own);
  float a[kRows][kMostDepth], b[kMostDepth][kColumns];
  const int group = lane() / 4, pair = lane() % 4;
  for (int l = 0; l < 32; ++l) {
    if (l / 4 == group || l / 8 == pair) read(a, b, l, all[l]);
  }
  for (int i = 0; i < 4; ++i) {
    const int row = group + i / 2 * 8, column = pair * 2 + i % 2;
    for (int k = 0; k < depth; ++k) sum[i] += a[row][k] * b[k][column];
  }
}

}  // namespace

void mma_tf32(float (&sum)[4], const uint4& a, unsigned b0, unsigned b1) {
  multiply(sum, {{a.x, a.y, a.z, a.w}, {b0, b1}}, 8,
           [](auto& left, auto& right, int l, const Fragments& f) {
             const int group = l / 4, place = l % 4;
             for (int i = 0; i < 4; ++i) {
               left[group + i % 2 * 8][place + i / 2 * 4] = read_tf32(f.a[i]);
             }
             for (int i = 0; i < 2; ++i) right[place + 4 * i][group] = read_tf32(f.b[i]);
           });
}

void mma_bf16(float (&sum)[4], const uint4& a, unsigned b0, unsigned b1) {
  multiply(sum, {{a.x, a.y, a.z, a.w}, {b0, b1}}, 16,
           [](auto& left, auto& right, int l, const Fragments& f) {
             const int group = l / 4, place = l % 4;
             for (int half = 0; half < 2; ++half) {
               for (int i = 0; i < 4; ++i) {
                 left[group + i % 2 * 8][2 * place + i / 2 * 8 + half] = read_bf16(f.a[i], half);
               }
               for (int i = 0; i < 2; ++i) {
                 right[2 * place + 8 * i + half][group] = read_bf16(f.b[i], half);
               }
             }
           });
}

}  // namespace emulation

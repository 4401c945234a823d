// The small least-squares problem of one Anderson step, from its Gram matrix.
#pragma once

#include <cmath>

#include "control.h"
#include "is_finite.h"
#include "macros.h"

namespace fpi {

constexpr double kSmallestPivot = 1e-10;
constexpr double kLeastGain = 1.0 - 0.99 * 0.99;  // of ||f||^2

// A Gram matrix is symmetric: its lower triangle is kept, row by row of slots.
FPI_HD int gram_size(int depth) { return depth * (depth + 1) / 2; }
FPI_HD int gram_place(int i, int j) { return i > j ? gram_size(i) + j : gram_size(j) + i; }

// Scratch of one small solve; in shared memory on a GPU.
struct SmallSolve {
  // Cholesky factor of the kept columns, its diagonal inverted: divisions are slow in double.
  double factor[kMaxDepth][kMaxDepth];
  double inverse_norm[kMaxDepth];  // 1 / ||column||
  int slots[kMaxDepth];            // by age
  double gamma[kMaxDepth];         // solution, by slot
  bool kept[kMaxDepth];
};

// Minimises ||f - dF gamma||^2 + ridge |D gamma|^2, D the column norms, over `columns` differences.
//
// gram is the triangle by slot, rhs[slot] = <dF_slot, f>; slots run from `head`, the newest,
// backwards. Columns are scaled to unit norm, so that the ridge means the same at every step, and
// factored newest first, so that a column which adds nothing is an old one: it is skipped.
// Source: Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011, section 4 (on conditioning).
FPI_HD void solve_small(const double* gram, const double* rhs, int depth, int columns, int head,
                        double ridge, SmallSolve& s) {
  for (int slot = 0; slot < depth; ++slot) s.gamma[slot] = 0.0;
  for (int a = 0; a < columns; ++a) {
    const int slot = head >= a ? head - a : head - a + depth;
    s.slots[a] = slot;
    const double square = gram[gram_place(slot, slot)];
    s.inverse_norm[a] = square > 0.0 ? 1.0 / sqrt(square) : 0.0;
    double pivot = square > 0.0 ? 1.0 + ridge : 0.0;
    double value = rhs[slot] * s.inverse_norm[a];
    for (int b = 0; b < a; ++b) {
      if (!s.kept[b]) continue;
      double entry = gram[gram_place(slot, s.slots[b])] * s.inverse_norm[a] * s.inverse_norm[b];
      for (int k = 0; k < b; ++k) {
        if (s.kept[k]) entry -= s.factor[a][k] * s.factor[b][k];
      }
      entry *= s.factor[b][b];
      s.factor[a][b] = entry;
      pivot -= entry * entry;
      value -= entry * s.gamma[s.slots[b]];
    }
    // A NaN or Inf in the Gram matrix fails this test too.
    s.kept[a] = pivot >= kSmallestPivot && is_finite(value) && is_finite(pivot);
    if (!s.kept[a]) continue;
    s.factor[a][a] = 1.0 / sqrt(pivot);
    s.gamma[slot] = value * s.factor[a][a];
  }
  for (int a = columns - 1; a >= 0; --a) {
    const int slot = s.slots[a];
    if (!s.kept[a]) continue;
    double value = s.gamma[slot];
    for (int b = a + 1; b < columns; ++b) {
      if (s.kept[b]) value -= s.factor[b][a] * s.gamma[s.slots[b]];
    }
    s.gamma[slot] = value * s.factor[a][a];
  }
  for (int a = 0; a < columns; ++a) s.gamma[s.slots[a]] *= s.inverse_norm[a];
}

// Whether the solution takes enough off ||f||^2 = ff to be worth a step that is not Picard's: less
// than a hundredth of ||f|| is what a history gives that knows nothing of the map at this point.
FPI_HD bool worth_mixing(const SmallSolve& s, const double* rhs, int depth, double ff) {
  double explained = 0.0;
  for (int slot = 0; slot < depth; ++slot) {
    if (s.gamma[slot] != 0.0) explained += s.gamma[slot] * rhs[slot];
  }
  return explained >= kLeastGain * ff;
}

}  // namespace fpi

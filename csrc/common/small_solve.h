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
  // L of the kept columns' L D L^T, and on its diagonal the inverse of D.
  double factor[kMaxDepth][kMaxDepth];
  double entries[kMaxDepth];  // of the present column's row of L D
  int slots[kMaxDepth];       // of the kept columns, newest first
  double gamma[kMaxDepth];    // solution, by slot
};

// Minimises ||f - dF gamma||^2 + ridge |D gamma|^2, D the column norms, over `columns` differences.
//
// gram is the triangle by slot, rhs[slot] = <dF_slot, f>; slots run from `head`, the newest,
// backwards. A column is factored newest first, so that one which adds nothing is an old one: it is
// skipped. Ridge and pivots are relative to a column's own square, as if it had unit norm; without
// a square root, L D L^T is that of the columns as they are.
// Source: Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011, section 4 (on conditioning).
FPI_HD void solve_small(const double* gram, const double* rhs, int depth, int columns, int head,
                        double ridge, SmallSolve& s) {
  for (int slot = 0; slot < depth; ++slot) s.gamma[slot] = 0.0;
  int kept = 0;
  for (int a = 0; a < columns; ++a) {
    const int slot = head >= a ? head - a : head - a + depth;
    const double square = gram[gram_place(slot, slot)];
    double pivot = square * (1.0 + ridge);
    double value = rhs[slot];
    double* row = s.factor[kept];
    for (int b = 0; b < kept; ++b) {
      double entry = gram[gram_place(slot, s.slots[b])];
      for (int k = 0; k < b; ++k) entry -= s.entries[k] * s.factor[b][k];
      s.entries[b] = entry;
      row[b] = entry * s.factor[b][b];
      pivot -= entry * row[b];
      value -= row[b] * s.gamma[s.slots[b]];
    }
    const double inverse = 1.0 / pivot;
    // A NaN or Inf in the Gram matrix fails this test too.
    if (!(square > 0.0 && pivot >= kSmallestPivot * square) || !is_finite(value) ||
        !is_finite(pivot) || !is_finite(inverse)) {
      continue;
    }
    row[kept] = inverse;
    s.gamma[slot] = value;
    s.slots[kept++] = slot;
  }
  for (int a = kept - 1; a >= 0; --a) {
    double value = s.gamma[s.slots[a]] * s.factor[a][a];
    for (int b = a + 1; b < kept; ++b) value -= s.factor[b][a] * s.gamma[s.slots[b]];
    s.gamma[s.slots[a]] = value;
  }
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

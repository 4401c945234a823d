// What the threads of a team share while they work on one sample, and the sums that they take
// together. All of it is called by every thread of the team.
#pragma once

#include "row.cuh"
#include "team.cuh"

namespace fpi {

template <class Step>
struct TeamMemory {
  typename Step::Sums sums;
  typename Step::Plan plan;
  typename Step::SmallProblem small;
  Control control;
  bool last;
};

template <class Step, class TeamOf>
struct Shared {
  using Team = TeamOf;
  using C = typename Step::C;
  static constexpr int kSums = sizeof(typename Step::Sums) / sizeof(double);

  TeamMemory<Step>& memory;
  double* gram;  // as in small_solve.h
  double* slab;  // (warps, kSums): the sums of each warp

  // `room` holds bytes(), in shared memory.
  __device__ Shared(void* room, int depth)
      : memory(*static_cast<TeamMemory<Step>*>(room)),
        gram(reinterpret_cast<double*>(&memory + 1)),
        slab(gram + (Step::kUsesGram ? gram_size(depth) : 0)) {}

  static FPI_HD size_t bytes(int depth, int warps) {
    const size_t doubles = (Step::kUsesGram ? gram_size(depth) : 0) + warps * kSums;
    return sizeof(TeamMemory<Step>) + doubles * sizeof(double);
  }

  __device__ typename Step::Sums& warp_sums() const {
    return *reinterpret_cast<typename Step::Sums*>(slab + Team::warp() * kSums);
  }

  __device__ void clear() const {
    for (int k = lane_index(); k < kSums; k += kWarpThreads) slab[Team::warp() * kSums + k] = 0.0;
    __syncwarp();
  }

  // memory.sums = the warps' sums, added in the order of the warps.
  __device__ void combine() const {
    Team::sync();
    double* total = reinterpret_cast<double*>(&memory.sums);
    for (int k = Team::thread(); k < kSums; k += Team::threads()) {
      double sum = 0.0;
      for (int w = 0; w < Team::warps(); ++w) sum += slab[w * kSums + k];
      total[k] = sum;
    }
    Team::sync();
  }

  __device__ void fetch(const StepParams& p, int64_t sample) const {
    double* control = reinterpret_cast<double*>(&memory.control);
    for (int k = Team::thread(); k < kControlSize; k += Team::threads()) {
      control[k] = p.control[sample * kControlSize + k];
    }
    if (Step::kUsesGram) {
      const int size = gram_size(p.depth);
      const double* kept = p.gram + sample * size;
      const bool empty = p.num_steps[sample] == 0;  // nothing was ever written to it
      for (int k = Team::thread(); k < size; k += Team::threads()) {
        gram[k] = empty ? 0.0 : kept[k];
      }
    }
    Team::sync();
  }

  __device__ void write_back(const StepParams& p, int64_t sample) const {
    const double* control = reinterpret_cast<const double*>(&memory.control);
    for (int k = Team::thread(); k < kControlSize; k += Team::threads()) {
      p.control[sample * kControlSize + k] = control[k];
    }
    if (Step::kUsesGram) {
      const int size = gram_size(p.depth);
      double* kept = p.gram + sample * size;
      for (int k = Team::thread(); k < size; k += Team::threads()) kept[k] = gram[k];
    }
  }
};

// Which vector of a sample a norm is taken of.
enum class Of { kResidual, kImage, kPoint };

// sqrt(sum of squares) without overflow or underflow, for the rare sample that needs it.
template <class Step, class Team, class Row>
__device__ __noinline__ double scaled_norm(Shared<Step, Team> shared, Row row, Of of,
                                           TileRange range) {
  using C = typename Row::C;
  const auto for_each = [&](auto&& visit) {
    for_each_tile<Team, C>(range, row.dim, row.aligned, [&](const Tile<C>& tile) {
      C x[Tile<C>::kElements], gx[Tile<C>::kElements];
      tile.load(row.x, x);
      tile.load(row.gx, gx);
#pragma unroll
      for (int e = 0; e < Tile<C>::kElements; ++e) {
        visit(static_cast<double>(of == Of::kPoint   ? x[e]
                                  : of == Of::kImage ? gx[e]
                                                     : gx[e] - x[e]));
      }
    });
  };
  double largest = 0.0;
  // fmax() drops a NaN; this keeps it.
  const auto keep = [&largest](double v) { largest = largest >= v ? largest : v; };
  for_each([&](double v) {
    if (largest == largest) keep(fabs(v));
  });
  for (int step = kWarpThreads / 2; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, largest, step);
    if (largest == largest) keep(other);
  }
  Team::sync();
  if (lane_index() == 0) shared.slab[Team::warp()] = largest;
  Team::sync();
  for (int w = 0; w < Team::warps(); ++w) {
    if (largest == largest) keep(shared.slab[w]);
  }
  Team::sync();
  if (!is_finite(largest) || largest == 0.0) return largest;
  double sum = 0.0;
  for_each([&](double v) { sum += v / largest * (v / largest); });
  if (lane_index() == 0) shared.slab[Team::warp()] = 0.0;
  __syncwarp();
  add_one(sum, shared.slab + Team::warp());
  Team::sync();
  sum = 0.0;
  for (int w = 0; w < Team::warps(); ++w) sum += shared.slab[w];
  Team::sync();
  return largest * sqrt(sum);
}

// The norms behind the sums of squares. Float sums were taken again in double where they left
// their range; double sums have nothing wider, and are scaled.
template <class Step, class Team, class Row>
__device__ __forceinline__ Measured measured_from(const Shared<Step, Team>& shared, const Row& row,
                                                  bool first, const TileRange& range) {
  const double ff = shared.memory.sums.ff, gg = shared.memory.sums.gg;
  const double xx = first ? shared.memory.sums.xx : 0.0;
  Measured at{sqrt(ff), sqrt(gg), sqrt(xx)};
  if constexpr (sizeof(typename Row::C) == 8) {
    if (!trustworthy<double>(ff, row.dim)) {
      at.residual = scaled_norm(shared, row, Of::kResidual, range);
    }
    const bool image = trustworthy<double>(gg, row.dim);
    if (!image) at.norm_gx = scaled_norm(shared, row, Of::kImage, range);
    // Only the larger of the two is ever used: a point that starts at zero needs no second look.
    if (first && !trustworthy<double>(xx, row.dim) && !(image && xx <= gg)) {
      at.norm_x = scaled_norm(shared, row, Of::kPoint, range);
    }
  }
  return at;
}

}  // namespace fpi

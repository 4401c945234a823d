// Products of one panel of weights with a tile of samples, one kind for each precision. A lane's
// sums run over the inputs one after another, whichever samples share the tile.
//
// A Product says where and how a weight lies in its chunk (put_weight) and a sample's input in the
// tile's operand (put), and what one warp does with a chunk (Sums).
#pragma once

#include "mma.cuh"
#include "product_shape.h"
#include "tile.cuh"

namespace fpi {

template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Run {
  T value[kCount];
};

// In the dtype of the state, by fused multiply-adds: a lane holds four outputs of some samples.
template <class T>
struct IeeeProduct {
  using Number = T;
  static constexpr StateType kState = sizeof(T) == 8 ? StateType::kFloat64 : StateType::kFloat32;
  static constexpr ProductShape kShape = product_shape(kState, Precision::kIeee);

  static __device__ void put_weight(unsigned char* chunk, int output, int input, T value) {
    reinterpret_cast<T*>(chunk)[input * kPanelOutputs + output] = value;
  }
  static __device__ __forceinline__ void put(unsigned char* operand, int64_t input, int stride,
                                             int column, T value) {
    reinterpret_cast<T*>(operand)[input * stride + column] = value;
  }

  template <int kColumns>
  struct Sums {
    static constexpr int kMine = kColumns / kSlotGroup;
    T sum[kMine][kQuad] = {};

    __device__ __forceinline__ void add(const unsigned char* chunk, const unsigned char* operand,
                                        int stride) {
      const auto* weights = reinterpret_cast<const Run<T, kQuad>*>(chunk) + lane_index() % kQuad;
      const T* inputs = reinterpret_cast<const T*>(operand) + lane_index() / kQuad * kMine;
#pragma unroll 8
      for (int k = 0; k < kShape.chunk_inputs; ++k) {
        const Run<T, kQuad> w = weights[k * (kPanelOutputs / kQuad)];
        const auto x = *reinterpret_cast<const Run<T, kMine>*>(inputs + k * stride);
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
#pragma unroll
          for (int j = 0; j < kQuad; ++j) {
            sum[i][j] = static_cast<T>(fma(x.value[i], w.value[j], sum[i][j]));
          }
        }
      }
    }

    // visit(output of the panel, column, sum)
    template <class Visit>
    __device__ __forceinline__ void for_each(Visit&& visit) const {
      const int output = lane_index() % kQuad * kQuad, column = lane_index() / kQuad * kMine;
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) visit(output + j, column + i, sum[i][j]);
      }
    }
  };
};

// On tensor cores: a lane holds two outputs of two samples of every group of eight.
template <int kColumns>
struct TensorSums {
  static constexpr int kGroups = kColumns / kSlotGroup;
  float sum[kGroups][4] = {};

  template <class Visit>
  __device__ __forceinline__ void for_each(Visit&& visit) const {
    const int output = lane_index() / 4, column = lane_index() % 4 * 2;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        visit(output + i / 2 * 8, n * kSlotGroup + column + i % 2, sum[n][i]);
      }
    }
  }
};

// What tensor cores read of a NaN may be the bits of an infinity.
__device__ __forceinline__ float readable(float value) {
  return value == value ? value : float_of(0x7fffe000u);
}
__device__ __forceinline__ float to_tf32(float value) { return readable(round_tf32(value)); }

constexpr int kTf32Inputs = 8;  // of one product on tensor cores
constexpr int kBf16Inputs = 16;
constexpr int kTensorWords = 4 * kWarpThreads;  // registers that hold its weights, 32 bits each

// Where the lanes find a weight among the words of a product in tf32.
__device__ __forceinline__ int tf32_word(int output, int input) {
  const int lane = output % 8 * 4 + input % 4, which = output / 8 + input % kTf32Inputs / 4 * 2;
  return input / kTf32Inputs * kTensorWords + lane * 4 + which;
}

struct Tf32Product {
  using Number = float;
  static constexpr ProductShape kShape = product_shape(StateType::kFloat32, Precision::kTf32);

  static __device__ void put_weight(unsigned char* chunk, int output, int input, float value) {
    reinterpret_cast<float*>(chunk)[tf32_word(output, input)] = to_tf32(value);
  }
  static __device__ __forceinline__ void put(unsigned char* operand, int64_t input, int stride,
                                             int column, float value) {
    reinterpret_cast<float*>(operand)[input * stride + column] = to_tf32(value);
  }

  template <int kColumns>
  struct Sums : TensorSums<kColumns> {
    __device__ __forceinline__ void add(const unsigned char* chunk, const unsigned char* operand,
                                        int stride) {
      const uint4* weights = reinterpret_cast<const uint4*>(chunk) + lane_index();
      const uint32_t* inputs =
          reinterpret_cast<const uint32_t*>(operand) + lane_index() % 4 * stride + lane_index() / 4;
#pragma unroll
      for (int k = 0; k < kShape.chunk_inputs; k += kTf32Inputs) {
        const uint4 w = weights[k / kTf32Inputs * kWarpThreads];
#pragma unroll
        for (int n = 0; n < this->kGroups; ++n) {
          const uint32_t* x = inputs + k * stride + n * kSlotGroup;
          mma_tf32(this->sum[n], w, x[0], x[4 * stride]);
        }
      }
    }
  };
};

// Every number in two parts of 10 bits each. Of the four products of parts, the smallest is
// below the rounding of float32 and is left out. Weights are parted when they are read: half as
// many bytes are on their way then.
struct Tf32x3Product {
  using Number = float;
  static constexpr ProductShape kShape = product_shape(StateType::kFloat32, Precision::kTf32x3);

  static __device__ void put_weight(unsigned char* chunk, int output, int input, float value) {
    reinterpret_cast<float*>(chunk)[tf32_word(output, input)] = value;
  }
  static __device__ __forceinline__ void part(uint32_t weight, uint32_t& high, uint32_t& low) {
    const float value = float_of(weight), rounded = to_tf32(value);
    high = bits_of(rounded);
    low = bits_of(to_tf32(value - rounded));
  }
  static __device__ __forceinline__ void put(unsigned char* operand, int64_t input, int stride,
                                             int column, float value) {
    const float high = to_tf32(value);
    reinterpret_cast<Run<float, 2>*>(operand)[input * stride + column] = {
        {high, to_tf32(value - high)}};
  }

  template <int kColumns>
  struct Sums : TensorSums<kColumns> {
    __device__ __forceinline__ void add(const unsigned char* chunk, const unsigned char* operand,
                                        int stride) {
      const uint4* weights = reinterpret_cast<const uint4*>(chunk) + lane_index();
      const uint2* inputs =
          reinterpret_cast<const uint2*>(operand) + lane_index() % 4 * stride + lane_index() / 4;
#pragma unroll
      for (int k = 0; k < kShape.chunk_inputs; k += kTf32Inputs) {
        const uint4 w = weights[k / kTf32Inputs * kWarpThreads];
        uint4 high, low;
        part(w.x, high.x, low.x);
        part(w.y, high.y, low.y);
        part(w.z, high.z, low.z);
        part(w.w, high.w, low.w);
#pragma unroll
        for (int n = 0; n < this->kGroups; ++n) {
          const uint2* x = inputs + k * stride + n * kSlotGroup;
          const uint2 first = x[0], second = x[4 * stride];
          // The small ones first: they lose least there.
          mma_tf32(this->sum[n], low, first.x, second.x);
          mma_tf32(this->sum[n], high, first.y, second.y);
          mma_tf32(this->sum[n], high, first.x, second.x);
        }
      }
    }
  };
};

struct Bf16Product {
  using Number = float;
  static constexpr ProductShape kShape = product_shape(StateType::kFloat32, Precision::kBf16);

  static __device__ __forceinline__ uint16_t upper_half(float value) {
    return static_cast<uint16_t>(bits_of(readable(round_bf16(value))) >> 16);
  }
  static __device__ void put_weight(unsigned char* chunk, int output, int input, float value) {
    const int inner = input % kBf16Inputs;
    const int lane = output % 8 * 4 + inner % 8 / 2, which = output / 8 + inner / 8 * 2;
    const int word = input / kBf16Inputs * kTensorWords + lane * 4 + which;
    reinterpret_cast<uint16_t*>(chunk)[word * 2 + inner % 2] = upper_half(value);
  }
  static __device__ __forceinline__ void put(unsigned char* operand, int64_t input, int stride,
                                             int column, float value) {
    const int64_t word = input / 2 * stride + column;
    reinterpret_cast<uint16_t*>(operand)[word * 2 + input % 2] = upper_half(value);
  }

  template <int kColumns>
  struct Sums : TensorSums<kColumns> {
    __device__ __forceinline__ void add(const unsigned char* chunk, const unsigned char* operand,
                                        int stride) {
      const uint4* weights = reinterpret_cast<const uint4*>(chunk) + lane_index();
      const uint32_t* inputs =
          reinterpret_cast<const uint32_t*>(operand) + lane_index() % 4 * stride + lane_index() / 4;
#pragma unroll
      for (int k = 0; k < kShape.chunk_inputs; k += kBf16Inputs) {
        const uint4 w = weights[k / kBf16Inputs * kWarpThreads];
#pragma unroll
        for (int n = 0; n < this->kGroups; ++n) {
          const uint32_t* x = inputs + k / 2 * stride + n * kSlotGroup;
          mma_bf16(this->sum[n], w, x[0], x[4 * stride]);
        }
      }
    }
  };
};

}  // namespace fpi

// Products of small matrices by all lanes of a warp, on tensor cores: sum (16, 8) += a (16, k)
// b (k, 8), with k = 8 numbers in tf32 or 16 in bf16, sums in float32.
//
// Which lane holds what is that of PTX's mma.sync, m16n8k8 and m16n8k16. With group = lane / 4 and
// place = lane % 4: sum[i] is row group + 8 (i / 2), column 2 place + i % 2. In tf32, a[i] is row
// group + 8 (i % 2), column place + 4 (i / 2), and b[i] is row place + 4 i, column group. In bf16
// each register holds two neighbours along k, the first in its low half: a[i] is row group +
// 8 (i % 2), columns from 2 place + 8 (i / 2), and b[i] rows from 2 place + 8 i, column group.
//
// volatile: all lanes must come to it together, so it may not sink into a branch that only some of
// them take, as what merely computes a value may.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fpi {

#ifdef __CUDACC__

__device__ __forceinline__ void mma_tf32(float (&sum)[4], const uint4& a, uint32_t b0,
                                         uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
#else
  __trap();  // cell_loop_cuda() does not launch it there
#endif
}

__device__ __forceinline__ void mma_bf16(float (&sum)[4], const uint4& a, uint32_t b0,
                                         uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
#else
  __trap();
#endif
}

#else  // the emulation of tests/emulation

inline void mma_tf32(float (&sum)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  emulation::mma_tf32(sum, a, b0, b1);
}
inline void mma_bf16(float (&sum)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  emulation::mma_bf16(sum, a, b0, b1);
}

#endif

}  // namespace fpi

// Marks that let one rule compile for the CPU, for CUDA, and for the emulation tests.
#pragma once

#if defined(__CUDACC__)
#define FPI_HD __host__ __device__ __forceinline__
#else
#define FPI_HD inline
#endif

// Marks what is compiled for the host and, by nvcc, for the device.
#pragma once

#if defined(__CUDACC__)
#define METAAUG_HD __host__ __device__ __forceinline__
#else
#define METAAUG_HD inline __attribute__((always_inline))
#endif

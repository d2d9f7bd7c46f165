// The engine with the vectors and tiles of AVX-512 for any processor: the compiler makes a vector of 64 bytes of what
// there is. Linked in the place of isa/avx512.cpp where the processor lacks it.
#include "cpu/isa/standard.h"

#define METAAUG_ISA avx512
#define METAAUG_VECTOR_BYTES 64
#include "cpu/isa/engine_isa.h"

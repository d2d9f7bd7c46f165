#include "standard.h"

#define METAAUG_ISA baseline
#define METAAUG_VECTOR_BYTES 16
#include "engine_isa.h"

// What one instruction set provides. Every kernels_<isa>.cpp defines one such table.
#pragma once

#include "attention/attention.h"
#include "attention/tokens.h"
#include "nearest/nearest.h"
#include "vectors/trellis.h"
#include "vectors/vectors.h"

namespace sixfold {

struct Kernels {
    const char* isa;
    VectorKernels vectors;
    TrellisKernels trellis;
    AttentionKernels attention;
    TokenKernels tokens;
    NearestKernels nearest;
};

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& neon_kernels();

}  // namespace sixfold

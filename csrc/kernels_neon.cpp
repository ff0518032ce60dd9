#include "kernels.h"
#include "lanes_neon.h"
#include "simd_neon.h"

#include "attention-inl.h"
#include "tokens-inl.h"
#include "vectors-inl.h"

namespace sixfold {

const Kernels& neon_kernels() {
    static const Kernels table{"neon", vectors::kVectorKernels, attention_kernels,
                               vectors::kTokenKernels};
    return table;
}

}  // namespace sixfold

#include "isa/kernels.h"
#include "isa/lanes_neon.h"
#include "isa/simd_neon.h"

#include "attention/attention-inl.h"
#include "attention/tokens-inl.h"
#include "vectors/vectors-inl.h"

namespace sixfold {

const Kernels& neon_kernels() {
    static const Kernels table{"neon", vectors::kVectorKernels, attention_kernels,
                               vectors::kTokenKernels};
    return table;
}

}  // namespace sixfold

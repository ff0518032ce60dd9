#include "isa/kernels.h"
#include "isa/lanes_portable.h"
#include "isa/simd_portable.h"

#include "attention/attention-inl.h"
#include "attention/tokens-inl.h"
#include "vectors/vectors-inl.h"

namespace sixfold {

const Kernels& portable_kernels() {
    static const Kernels table{"portable", vectors::kVectorKernels, attention_kernels,
                               vectors::kTokenKernels};
    return table;
}

}  // namespace sixfold

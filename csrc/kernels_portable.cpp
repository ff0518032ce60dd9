#include "kernels.h"
#include "lanes_portable.h"
#include "simd_portable.h"

#include "attention-inl.h"
#include "tokens-inl.h"
#include "vectors-inl.h"

namespace sixfold {

const Kernels& portable_kernels() {
    static const Kernels table{"portable", vectors::kVectorKernels, attention_kernels,
                               vectors::kTokenKernels};
    return table;
}

}  // namespace sixfold

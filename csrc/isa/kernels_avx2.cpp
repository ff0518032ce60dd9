#include "isa/kernels.h"
#include "isa/lanes_avx2.h"
#include "isa/simd_avx2.h"

#include "attention/attention-inl.h"
#include "attention/tokens-inl.h"
#include "vectors/vectors-inl.h"

namespace sixfold {

const Kernels& avx2_kernels() {
    static const Kernels table{"avx2", vectors::kVectorKernels, attention_kernels,
                               vectors::kTokenKernels};
    return table;
}

}  // namespace sixfold

#include "isa/kernels.h"
#include "isa/lanes_avx512.h"
#include "isa/simd_avx512.h"

#include "attention/attention-inl.h"
#include "attention/tokens-inl.h"
#include "vectors/vectors-inl.h"

namespace sixfold {

const Kernels& avx512_kernels() {
    static const Kernels table{"avx512", vectors::kVectorKernels, attention_kernels,
                               vectors::kTokenKernels};
    return table;
}

}  // namespace sixfold

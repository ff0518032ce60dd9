#include "kernels.h"
#include "lanes_avx512.h"
#include "simd_avx512.h"

#include "attention-inl.h"
#include "tokens-inl.h"
#include "vectors-inl.h"

namespace sixfold {

const Kernels& avx512_kernels() {
    static const Kernels table{"avx512", vectors::kVectorKernels, attention_kernels,
                               vectors::kTokenKernels};
    return table;
}

}  // namespace sixfold

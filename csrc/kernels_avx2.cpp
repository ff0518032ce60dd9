#include "kernels.h"
#include "lanes_avx2.h"
#include "simd_avx2.h"

#include "attention-inl.h"
#include "tokens-inl.h"
#include "vectors-inl.h"

namespace sixfold {

const Kernels& avx2_kernels() {
    static const Kernels table{"avx2", vectors::kVectorKernels, attention_kernels,
                               vectors::kTokenKernels};
    return table;
}

}  // namespace sixfold

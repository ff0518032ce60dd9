// All kernels on the registers of one instruction set. Included once by every kernels_<isa>.cpp,
// after its simd_<isa>.h and tiles.
#pragma once

#include "attention/attention-inl.h"
#include "attention/tokens-inl.h"
#include "isa/kernels.h"
#include "nearest/nearest-inl.h"
#include "vectors/vectors-inl.h"

namespace sixfold {
namespace {

constexpr Kernels kernels_named(const char* isa) {
    return {isa, vectors::kVectorKernels, vectors::kTrellisKernels, kAttentionKernels,
            vectors::kTokenKernels, kNearestKernels};
}

}  // namespace
}  // namespace sixfold

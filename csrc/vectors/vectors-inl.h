// The kernels of vectors.h, for the ISA whose lanes_<isa>.h was included before.
#pragma once

#include "vectors/codes-inl.h"
#include "vectors/rotate-inl.h"

#include "vectors/decode-inl.h"
#include "vectors/encode-inl.h"
#include "vectors/scores-inl.h"

namespace sixfold::vectors {
namespace {

constexpr VectorKernels kVectorKernels{rotate_tile<Lanes>, encode_tile<Lanes>, decode_tile<Lanes>,
                                       score_tile<Lanes>};

}  // namespace
}  // namespace sixfold::vectors

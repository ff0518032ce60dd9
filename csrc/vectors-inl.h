// The kernels of vectors.h, for the ISA whose lanes_<isa>.h was included before.
#pragma once

#include "codes-inl.h"
#include "rotate-inl.h"

#include "decode-inl.h"
#include "encode-inl.h"
#include "scores-inl.h"

namespace sixfold::vectors {
namespace {

constexpr VectorKernels kVectorKernels{rotate_tile<Lanes>, encode_tile<Lanes>, decode_tile<Lanes>,
                                       score_tile<Lanes>};

}  // namespace
}  // namespace sixfold::vectors
